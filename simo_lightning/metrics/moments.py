"""Class moments as a torchmetrics metric: states that add up, so batches and processes merge exactly."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from simo_lightning.functional.moments import ClassMoments, class_moments

# Processes gather each other's states when they sync: what is larger than this would not fit there.
_LARGEST_STATE = 2**30  # bytes


class ClassMomentsMetric(Metric):
    """Class moments of all embeddings seen; the state that every geometry metric shares.

    The state does not grow with the embeddings; it is ``C * D * D`` numbers: 20 kB for 10 classes in 16 dimensions and
    float64, 210 MB for 100 classes in 512.

    Args:
        num_classes: C.
        embedding_dim: D.
        dtype: Of the sums. float64 loses nothing; torch.float32 is for devices without it (MPS), where spreads below
            about 1e-2 of the norm count as zero.

    Raises:
        ValueError: If a size is below 1, or the state would take more than 1 GiB.

    Example:
        >>> metric = ClassMomentsMetric(num_classes=3, embedding_dim=2)
        >>> metric.update(torch.ones(4, 2), torch.tensor([0, 0, 0, 2]))
        >>> metric.compute().tolist()  # a subclass gives its own value; this one the rows of each class
        [3.0, 0.0, 1.0]
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None

    _function: Callable[[ClassMoments], Tensor] = staticmethod(lambda moments: moments.counts)

    counts: Tensor
    sums: Tensor
    second: Tensor
    fourth: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        size = num_classes * embedding_dim**2 * dtype.itemsize
        if size > _LARGEST_STATE:
            raise ValueError(
                f"num_classes * embedding_dim^2 must fit in 1 GiB of {dtype}, got {num_classes} * {embedding_dim}^2 = "
                f"{size / 2**30:.1f} GiB; measure embeddings of fewer dimensions, or a subset of the classes"
            )
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        empty = class_moments(torch.zeros(0, embedding_dim), torch.zeros(0, dtype=torch.long), num_classes, dtype)
        for name, zeros in empty._asdict().items():
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Class of each row, ``(N,)``, integers in ``0..C - 1``.

        Raises:
            ValueError: If the shapes or labels are not as said.
        """
        if embeddings.shape[1:] != (self.embedding_dim,):
            raise ValueError(f"embeddings must have shape (N, {self.embedding_dim}), got {tuple(embeddings.shape)}")
        batch = class_moments(embeddings.detach(), labels, self.num_classes, self.sums.dtype)
        for name, value in self.moments.merge(batch)._asdict().items():
            setattr(self, name, value)

    @property
    def moments(self) -> ClassMoments:
        """The sums as they are: of this process, and within ``sync_context()`` of all processes."""
        return ClassMoments(self.counts, self.sums, self.second, self.fourth)

    def compute(self) -> Tensor:
        """The metric's value over all embeddings seen, of all processes."""
        moments = self.moments
        if self.device.type == "mps":  # no eigenvalues there
            moments = ClassMoments(*(value.cpu() for value in moments))
        return self._function(moments).to(self.device)
