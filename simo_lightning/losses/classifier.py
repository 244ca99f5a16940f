"""Cross-entropy of a linear classifier as a loss of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.losses.configure import NO_CLASSES, NO_DIMENSION, check_classes, check_dimension, filled


class ClassifierLoss(InitArgumentsMixin, nn.Module):
    """Cross-entropy of a linear classifier on the embeddings; the classifier is trained with the encoder.

    This is the usual baseline of metric learning. The classifier is not used after training.

    Args:
        num_classes: C; None: the classes of training.
        embedding_dim: D; None: the encoder's.
        label_smoothing: Share of the target spread over all classes, in 0..1.
        bias: Whether the classifier has a bias.

    Attributes:
        weight: Parameter ``(C, D)``, None until both numbers are known.
        bias: Parameter ``(C,)`` or None.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> loss = ClassifierLoss(num_classes=10, embedding_dim=16)
        >>> loss.weight.shape
        torch.Size([10, 16])
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        label_smoothing: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "embedding_dim": embedding_dim}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in 0..1, got {label_smoothing}")
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.label_smoothing, self.has_bias = label_smoothing, bias
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if num_classes is not None and embedding_dim is not None:
            self._make(num_classes, embedding_dim)

    def configure(self, num_classes: int | None, embedding_dim: int | None) -> None:
        """Create the classifier if it has not been.

        Args:
            num_classes: Number of classes of training.
            embedding_dim: Dimension of the embeddings.

        Raises:
            ValueError: If a number is neither given nor passed, or contradicts what was given.
        """
        name = type(self).__name__
        classes = filled(name, "num_classes", self.num_classes, num_classes, NO_CLASSES)
        dimension = filled(name, "embedding_dim", self.embedding_dim, embedding_dim, NO_DIMENSION)
        check_classes(name, classes, num_classes)
        check_dimension(name, "embedding_dim", dimension, embedding_dim)
        if self.weight is None:
            self._make(classes, dimension)

    def _make(self, num_classes: int, embedding_dim: int) -> None:
        layer = nn.Linear(embedding_dim, num_classes, self.has_bias)
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)`` in ``0..C - 1``.

        Returns:
            Scalar >= 0, float32, or float64 for float64 embeddings; 0 for an empty batch.

        Raises:
            ValueError: If a type, shape, device or label is wrong, or the classifier does not exist yet.
        """
        check_embeddings(embeddings, labels)
        if self.weight is None or self.num_classes is None:
            raise ValueError("num_classes and embedding_dim of ClassifierLoss must be given, or set by configure()")
        check_labels(type(self).__name__, labels, self.num_classes)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        bias = None if self.bias is None else self.bias.to(embeddings.dtype)
        logits = F.linear(embeddings, self.weight.to(embeddings.dtype), bias)  # (N, C)
        if len(labels) == 0:
            return logits.sum()
        return F.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        """The arguments, for printing the module."""
        return f"{self.num_classes}, {self.embedding_dim}, label_smoothing={self.label_smoothing}"


def check_labels(owner: str, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless all labels ``(N,)`` are in ``0..num_classes - 1``."""
    if len(labels):
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels of {owner} must be in 0..{num_classes - 1}, got {low}..{high}")
