"""A loss for batches of which some images have a class and others only their views."""

import torch
from torch import Tensor, nn

from simo_lightning.losses import SimOLoss


class SemiSupervisedLoss(nn.Module):
    """One loss among the labelled rows, another among the unlabelled ones, and nothing between the two.

        labelled(rows of classes) + unlabelled_weight * unlabelled(rows of single images)

    One loss over all rows, which any loss here takes as well, has every labelled row flee the unlabelled images of its
    own class, as each is a class of its own.

    Args:
        num_classes: C: a label in ``0..C - 1`` is a class; any other is an image of which only the views are alike.
        labelled: ``(embeddings, labels) -> scalar``; None: ``SimOLoss()``.
        unlabelled: The same; None: the similar side of SimO alone, by pairs of views and as a logarithm. It has no
            dissimilar side, as two unlabelled images may be of one class; what keeps it from collapse is the labelled
            part.
        unlabelled_weight: Weight of the unlabelled part, >= 0.

    Raises:
        ValueError: If ``num_classes`` is under 1 or the weight is negative.

    Example:
        >>> loss = SemiSupervisedLoss(num_classes=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
        >>> loss.terms(embeddings, torch.tensor([0, 0, 1, 1, 9, 9]))["unlabelled"]
        tensor(0.0824)

    Source:
        Ours. Two views that should come out alike are the Pi-model's, Laine & Aila, arXiv 1610.02242.
    """

    def __init__(
        self,
        num_classes: int,
        labelled: nn.Module | None = None,
        unlabelled: nn.Module | None = None,
        unlabelled_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 <= unlabelled_weight < float("inf"):
            raise ValueError(f"unlabelled_weight must be finite and >= 0, got {unlabelled_weight}")
        self.num_classes, self.unlabelled_weight = num_classes, unlabelled_weight
        self.labelled = SimOLoss() if labelled is None else labelled
        self.unlabelled = SimOLoss("pair", "log", eps=0.01, dissimilar_weight=0.0) if unlabelled is None else unlabelled

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            Scalar.
        """
        return torch.stack(list(self.terms(embeddings, labels).values())).sum()

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted parts by name; a part without a row is a zero that has a gradient.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            ``labelled`` and ``unlabelled``.
        """
        known = (labels >= 0) & (labels < self.num_classes)
        return {
            "labelled": _of(self.labelled, embeddings[known], labels[known]),
            "unlabelled": self.unlabelled_weight * _of(self.unlabelled, embeddings[~known], labels[~known]),
        }


def _of(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = loss(embeddings, labels) if len(labels) else embeddings.sum()
    return value
