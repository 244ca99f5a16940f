"""A loss for batches in which some images have a class label and others do not."""

import math

import torch
from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.pseudo_labels import pseudo_label_term
from simo_lightning.losses import SimOLoss, configure_loss
from simo_lightning.losses.configure import NO_CLASSES, check_classes, filled


class SemiSupervisedLoss(InitArgumentsMixin, nn.Module):
    """A supervised loss on the labelled embeddings, and two losses between the views of unlabelled images.

        labelled + unlabelled_weight * unlabelled + pseudo_label_weight * pseudo_label

    ``labelled`` is a loss between labelled embeddings, ``unlabelled`` one between the views of unlabelled images, and
    ``pseudo_label`` the cross-entropy of each view with the class that the image's other views are confident of
    (:func:`~simo_lightning.functional.pseudo_labels.pseudo_label_term`). A single loss over all embeddings, which any
    loss here computes as well, would push labelled embeddings away from the unlabelled images of their own class.

    Args:
        num_classes: C: a label in ``0..C - 1`` is a class; any other label is the number of an unlabelled image. None:
            the classes of training.
        labelled: ``(embeddings, labels) -> scalar``; None: ``SimOLoss.softmax()``.
        unlabelled: The same; None: the similar side of SimO alone, between pairs of views, in the log form. It has no
            dissimilar side, as two unlabelled images may be of one class; the labelled part prevents collapse.
        unlabelled_weight: Weight of that part, >= 0.
        pseudo_label_weight: Weight of the pseudo labels, >= 0.
        confidence: Mean probability, in 0..1, that the other views must give to a class.
        pseudo_label_loss: SimOLoss with level "centroid" and form "softmax", whose class centers and probabilities the
            pseudo labels take: the centers are those of the batch's labelled embeddings. None: ``labelled``.

    Raises:
        ValueError: If ``num_classes`` is under 1, a weight is negative, the confidence is outside of 0..1, or there are
            pseudo labels and neither ``pseudo_label_loss`` nor ``labelled`` is a SimOLoss of that level and form.

    Example:
        >>> loss = SemiSupervisedLoss(num_classes=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
        >>> loss.terms(embeddings, torch.tensor([0, 0, 1, 1, 9, 9]))["pseudo_label"]
        tensor(1.3067)

    Source:
        Ours. Consistency between two views is the Pi-model's, Laine & Aila, arXiv 1610.02242; a confident prediction as
        the target is FixMatch's, Sohn et al., arXiv 2001.07685.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        labelled: nn.Module | None = None,
        unlabelled: nn.Module | None = None,
        unlabelled_weight: float = 0.0,
        pseudo_label_weight: float = 1.0,
        confidence: float = 0.7,
        pseudo_label_loss: SimOLoss | None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        for name, weight in (("unlabelled_weight", unlabelled_weight), ("pseudo_label_weight", pseudo_label_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {weight}")
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must be in 0..1, got {confidence}")
        self.num_classes, self.unlabelled_weight = num_classes, unlabelled_weight
        self.pseudo_label_weight, self.confidence = pseudo_label_weight, confidence
        self.labelled = SimOLoss.softmax() if labelled is None else labelled
        self.unlabelled = SimOLoss("pair", "log", dissimilar_weight=0.0) if unlabelled is None else unlabelled
        self.pseudo_label_loss = pseudo_label_loss
        if pseudo_label_weight:
            self._classifier()  # raises where there is none

    def configure(self, num_classes: int | None, embedding_dim: int | None) -> None:
        """Set ``num_classes`` if it is None, and configure the losses inside.

        Args:
            num_classes: Number of classes of training.
            embedding_dim: Dimension of the embeddings.

        Raises:
            ValueError: If the number of classes is neither given nor passed, or is less than that of the data.
        """
        name = type(self).__name__
        self.num_classes = filled(name, "num_classes", self.num_classes, num_classes, NO_CLASSES)
        check_classes(name, self.num_classes, num_classes)
        for loss in (self.labelled, self.unlabelled):
            configure_loss(loss, self.num_classes, embedding_dim)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            Scalar.

        Raises:
            ValueError: If a type, shape, dtype or device is wrong, or a part of the loss raises it.
        """
        return torch.stack(list(self.terms(embeddings, labels).values())).sum()

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted parts by name; a part without embeddings is a zero that has a gradient.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            ``labelled``, and ``unlabelled`` and ``pseudo_label`` where their weight is not 0.

        Raises:
            ValueError: As :meth:`forward`.
        """
        check_embeddings(embeddings, labels)
        if self.num_classes is None:
            raise ValueError("num_classes of SemiSupervisedLoss must be given, or set by configure()")
        known = (labels >= 0) & (labels < self.num_classes)
        parts = {"labelled": _of(self.labelled, embeddings[known], labels[known])}
        if self.unlabelled_weight:
            part = _of(self.unlabelled, embeddings[~known], labels[~known])
            parts["unlabelled"] = self.unlabelled_weight * part
        if self.pseudo_label_weight:
            parts["pseudo_label"] = self.pseudo_label_weight * self._pseudo_label(embeddings, labels, known)
        return parts

    def _pseudo_label(self, embeddings: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        if not known.any() or known.all():
            return embeddings.sum() * 0.0
        loss = self._classifier()
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            centers = loss.class_centers(embeddings[known].detach(), labels[known])
            views = loss.normalized(embeddings[~known])
            term, _ = pseudo_label_term(
                views, labels[~known], centers, loss.similarity(len(centers)), self.confidence, loss.label_smoothing
            )
        return term

    def _classifier(self) -> SimOLoss:
        """The loss whose class centers and probabilities the pseudo labels take."""
        loss = self.pseudo_label_loss or self.labelled
        if not isinstance(loss, SimOLoss) or (loss.level, loss.form) != ("centroid", "softmax"):
            kind = f"level {loss.level!r} and form {loss.form!r}" if isinstance(loss, SimOLoss) else type(loss).__name__
            raise ValueError(
                "pseudo_label_loss (by default labelled) must be a SimOLoss with level 'centroid' and form 'softmax' "
                f"unless pseudo_label_weight is 0, got {kind}; SimOLoss.softmax() is one"
            )
        return loss


def _of(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = loss(embeddings, labels) if len(labels) else embeddings.sum()
    return value
