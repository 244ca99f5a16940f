"""Class moments as a torchmetrics metric: states that add up, so batches and processes merge exactly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from simo_lightning.functional.moments import SECOND_BUDGET_MB, ClassMoments, check_embeddings


class ClassMomentsMetric(Metric):
    """Class moments of all embeddings seen; the state that every geometry metric shares.

    The state does not grow with the number of embeddings; it has about ``(C + D) D`` numbers: 3 kB for 10 classes in 16
    dimensions and float64, 43 MB for 10,000 in 512. Few metrics require ``C D^2`` more, within a budget: 20 kB and
    20 GB.

    Args:
        num_classes: C.
        embedding_dim: D.
        dtype: Of the sums. torch.float32 is for devices without float64 (MPS); what the additions round off is kept, in
            a state of the same size, and added in the end, so the error does not grow with the number of batches.
            Spreads below about 1e-2 of the norm count as zero there.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``. Default: 256 for
            a metric that requires them, else 0.
        options: Keyword arguments of the metric's function, such as ``directions`` of ``SubspaceOverlap``.

    Raises:
        ValueError: If a size is below 1, the metric requires second moments that exceed the budget, the other sums
            would take more than 4 GiB, or an option is out of range.
        TypeError: If the function does not take an option.

    Example:
        >>> metric = ClassMomentsMetric(num_classes=3, embedding_dim=2)
        >>> metric.update(torch.ones(4, 2), torch.tensor([0, 0, 0, 2]))
        >>> metric.compute().tolist()  # here the number of embeddings of each class; a subclass computes its own value
        [3.0, 0.0, 1.0]
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None

    _function: Callable[..., Tensor] = staticmethod(lambda moments: moments.counts)
    _needs_second = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        dtype: torch.dtype = torch.float64,
        second_budget_mb: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        if second_budget_mb is None:
            second_budget_mb = SECOND_BUDGET_MB if self._needs_second else 0
        zeros = ClassMoments.zeros(num_classes, embedding_dim, dtype, second_budget_mb=second_budget_mb)
        if self._needs_second:
            zeros.required_second(type(self).__name__)
        if options:
            self._function = partial(type(self)._function, **options)
            self._function(zeros)  # an invalid option raises here, not at the end of an epoch
        self._names = tuple(zeros.tensors())
        self._rests = tuple(f"{name}_rest" for name in self._names) if dtype != torch.float64 else ()
        for name, value in zip(self._names, zeros.tensors().values(), strict=True):
            self.add_state(name, value, dist_reduce_fx="sum")
            if self._rests:
                self.add_state(f"{name}_rest", torch.zeros_like(value), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Class of each embedding, ``(N,)``, integers in ``0..C - 1``.

        Raises:
            ValueError: If a type, shape or label is wrong.
        """
        if not torch.is_inference_mode_enabled():  # after a reset in inference mode, which forbids a change elsewhere
            for name in (*self._names, *self._rests):
                if getattr(self, name).is_inference():
                    setattr(self, name, getattr(self, name).clone())
        rest = self._moments(self._rests) if self._rests else None
        check_embeddings(embeddings, labels)
        self._moments(self._names).add_(embeddings.detach(), labels, rest)

    @property
    def moments(self) -> ClassMoments:
        """The sums as they are: of this process, and within ``sync_context()`` of all processes."""
        moments = self._moments(self._names)
        return moments.merge(self._moments(self._rests)) if self._rests else moments

    def _moments(self, states: tuple[str, ...]) -> ClassMoments:
        return ClassMoments(**{name: getattr(self, state) for name, state in zip(self._names, states, strict=True)})

    def compute(self) -> Tensor:
        """The metric's value over all embeddings seen, of all processes."""
        moments = self.moments
        if self.device.type == "mps":  # no eigenvalues there
            moments = moments.map(Tensor.cpu)
        return self._function(moments).to(self.device)
