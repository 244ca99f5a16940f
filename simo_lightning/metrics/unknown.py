"""How well a score tells images of known classes from others, as a torchmetrics metric beside its BinaryAUROC."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from simo_lightning.functional.unknown import fpr_at_recall


class FPRAtRecall(Metric):
    """Share of unknown images that are accepted where a threshold accepts ``recall`` of the known images.

    By :func:`.functional.unknown.fpr_at_recall`. For the area under the ROC curve use torchmetrics' ``BinaryAUROC``.

    Args:
        recall: In (0, 1].
        options: Keyword arguments of torchmetrics.Metric.

    Raises:
        ValueError: If recall is not in (0, 1].

    Example:
        >>> metric = FPRAtRecall()
        >>> metric.update(torch.tensor([0.9, 0.8, 0.3, 0.4, 0.1]), torch.tensor([1, 1, 1, 0, 0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    known: list[Tensor]
    unknown: list[Tensor]

    def __init__(self, recall: float = 0.95, **options: Any) -> None:
        super().__init__(**options)
        fpr_at_recall(torch.zeros(0), torch.zeros(0), recall)  # raises for a wrong recall
        self.recall = recall
        for name in ("known", "unknown"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_known: Tensor) -> None:
        """Add a batch.

        Args:
            scores: Higher for images that are more likely to belong to a known class, ``(N,)``; kept in float32.
            is_known: Whether each image does, bool or 0 and 1, ``(N,)``.

        Raises:
            ValueError: If a shape is wrong.
        """
        if scores.ndim != 1 or scores.shape != is_known.shape:
            raise ValueError(
                f"scores and is_known must have the same shape (N,), got {tuple(scores.shape)} and "
                f"{tuple(is_known.shape)}"
            )
        scores, is_known = scores.detach().float(), is_known.bool()
        self.known.append(scores[is_known])  # also where none is: every process needs a tensor to gather
        self.unknown.append(scores[~is_known])

    def compute(self) -> Tensor:
        """The share over all images seen, of all processes; ``nan`` without known or without unknown images."""
        return fpr_at_recall(self._joined(self.known), self._joined(self.unknown), self.recall)

    def _joined(self, parts: list[Tensor] | Tensor) -> Tensor:
        """All scores; after a sync they are one tensor already."""
        if isinstance(parts, Tensor):
            return parts
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)
