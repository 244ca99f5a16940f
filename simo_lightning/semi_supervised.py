"""A loss for batches of which some images have a class and others only their views."""

import torch
from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.functional.agreement import agreement_term
from simo_lightning.functional.frame import class_axes
from simo_lightning.functional.simo import Batch, Exchange
from simo_lightning.losses import SimOLoss


class SemiSupervisedLoss(InitArgumentsMixin, nn.Module):
    """One loss among the labelled rows, and two for the unlabelled ones: views of an image are alike, and where some
    views are sure of a class the others learn it.

        labelled(rows of classes) + unlabelled_weight * unlabelled(rows of images) + agreement_weight * agreement

    One loss over all rows, which any loss here takes as well, has every labelled row flee the unlabelled images of its
    own class, as each is a class of its own.

    Args:
        num_classes: C: a label in ``0..C - 1`` is a class; any other is an image of which only the views are alike.
        labelled: ``(embeddings, labels) -> scalar``; None: ``SimOLoss(form="softmax")``, whose
            probabilities agreement needs.
        unlabelled: The same; None: the similar side of SimO alone, by pairs of views and as a logarithm. It has no
            dissimilar side, as two unlabelled images may be of one class; what keeps it from collapse is the labelled
            part.
        unlabelled_weight: Weight of that part, >= 0.
        agreement_weight: Weight, >= 0, of the cross-entropy of each view with the class that the image's other views
            are sure of (:func:`~simo_lightning.functional.agreement.agreement_term`). The classes are those of the
            batch's labelled rows, their centres and probabilities those of the centroid level's softmax form: with the
            arguments of ``labelled`` where that is a SimOLoss of that kind, with its defaults where it is not.
        confidence: How sure the other views must be, in 0..1.

    Raises:
        ValueError: If ``num_classes`` is under 1, a weight is negative or the confidence is outside of 0..1.

    Example:
        >>> loss = SemiSupervisedLoss(num_classes=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
        >>> loss.terms(embeddings, torch.tensor([0, 0, 1, 1, 9, 9]))["agreement"]
        tensor(1.3067)

    Source:
        Ours. Two views that should come out alike are the Pi-model's, Laine & Aila, arXiv 1610.02242; the sure class as
        a target is FixMatch's, Sohn et al., arXiv 2001.07685.
    """

    def __init__(
        self,
        num_classes: int,
        labelled: nn.Module | None = None,
        unlabelled: nn.Module | None = None,
        unlabelled_weight: float = 0.0,
        agreement_weight: float = 1.0,
        confidence: float = 0.7,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        for name, weight in (("unlabelled_weight", unlabelled_weight), ("agreement_weight", agreement_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {weight}")
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must be in 0..1, got {confidence}")
        self.num_classes, self.unlabelled_weight = num_classes, unlabelled_weight
        self.agreement_weight, self.confidence = agreement_weight, confidence
        self.labelled = SimOLoss(form="softmax") if labelled is None else labelled
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
            ``labelled``, and ``unlabelled`` and ``agreement`` where their weight is not 0.
        """
        known = (labels >= 0) & (labels < self.num_classes)
        parts = {"labelled": _of(self.labelled, embeddings[known], labels[known])}
        if self.unlabelled_weight:
            part = _of(self.unlabelled, embeddings[~known], labels[~known])
            parts["unlabelled"] = self.unlabelled_weight * part
        if self.agreement_weight:
            parts["agreement"] = self.agreement_weight * self._agreement(embeddings, labels, known)
        return parts

    def _agreement(self, embeddings: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        if not known.any() or known.all():
            return embeddings.sum() * 0.0
        judge = self.labelled
        if not isinstance(judge, SimOLoss) or (judge.level, judge.form) != ("centroid", "softmax"):
            judge = SimOLoss(form="softmax")
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            batch = Batch.of(rows[known].detach(), labels[known], judge.normalize)
            axes = class_axes(labels[known].unique(), rows.shape[1], rows.dtype)
            centers = batch.means.lerp(axes, judge.frame)
            views = torch.nn.functional.normalize(rows[~known], dim=1) if judge.normalize else rows[~known]
            exchange = Exchange("softmax", judge.eps, judge.orthogonality_leaning)
            term, _ = agreement_term(views, labels[~known], centers, exchange, self.confidence, judge.label_smoothing)
        return term


def _of(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = loss(embeddings, labels) if len(labels) else embeddings.sum()
    return value
