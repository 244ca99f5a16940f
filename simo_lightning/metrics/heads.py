"""Class means as classifiers, as torchmetrics metrics: against a head's weight, and on their own."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from simo_lightning.functional.geometry import nc3, nearest_class_mean_predict
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.metrics.moments import ClassMomentsMetric


class NC3(ClassMomentsMetric):
    """Self-duality of a linear head and the class means, by :func:`.geometry.nc3`.

    The weight is read when the value is computed, so the metric follows a head that trains or moves to another device.
    The head does not become a submodule of the metric: its parameters and checkpoint do not include it.

    Args:
        head: Module with a ``weight (C, D)``, such as ``torch.nn.Linear``; `update` takes its input.
        dtype: Of the sums.

    Raises:
        ValueError: If the head has no weight of two dimensions, or as :class:`ClassMomentsMetric`.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> metric = NC3(head)
        >>> metric.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 1]))
        >>> head.weight.data = torch.tensor([[-7.0, 0.0], [7.0, 0.0]])
        >>> metric.compute().item() < 1e-12
        True
    """

    higher_is_better = False

    def __init__(self, head: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(f"head must have a weight of shape (C, D), got {type(head).__name__} with {shape}")
        super().__init__(weight.shape[0], weight.shape[1], dtype)
        self.compute_with_cache = False  # the head may change without an update of the metric
        self._head = (head,)  # in a tuple, so that it does not become a submodule

    def compute(self) -> Tensor:
        """The metric's value over all embeddings seen, of all processes, with the head's weight as it is now."""
        return nc3(self.moments, self._head[0].get_parameter("weight"))


class NearestClassMeanAccuracy(Metric):
    """Share of the embeddings whose nearest class mean is that of their own class.

    Args:
        means: ``(C, D)``, usually of the training images; a class whose row is ``nan`` is never predicted.
        distance: "euclidean" or "cosine", as :func:`.geometry.nearest_class_mean_predict`.
        dtype: Of the distances; torch.float32 for devices without float64.

    Raises:
        ValueError: If the means are not ``(C, D)`` with a finite row.

    Example:
        >>> metric = NearestClassMeanAccuracy(means=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> metric.update(torch.tensor([[0.9, 0.0], [0.9, 0.1], [0.0, 5.0]]), torch.tensor([0, 1, 1]))
        >>> round(metric.compute().item(), 4)
        0.6667
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    means: Tensor
    correct: Tensor
    total: Tensor

    def __init__(
        self,
        means: Tensor,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        check_embeddings(means, name="means")
        nearest_class_mean_predict(means.new_empty(0, *means.shape[1:]), means, distance)  # raises for wrong arguments
        self.distance = distance
        self.register_buffer("means", means.detach().to(dtype), persistent=False)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Class of each embedding, integers ``(N,)``.

        Raises:
            ValueError: If a type or shape is wrong, or an embedding is not finite.
        """
        check_embeddings(embeddings, labels)
        predicted = nearest_class_mean_predict(embeddings.detach(), self.means, self.distance)
        self.correct = self.correct + (predicted == labels).sum()
        self.total = self.total + len(labels)

    def compute(self) -> Tensor:
        """Share in [0, 1] over all embeddings seen, of all processes; ``nan`` if there was none."""
        return self.correct.to(self.means.dtype) / self.total
