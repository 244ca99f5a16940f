"""A loss behind a projection head."""

from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.losses.configure import NO_DIMENSION, check_dimension, configure_loss, filled
from simo_lightning.losses.joint import terms_of


class ProjectionHeadLoss(InitArgumentsMixin, nn.Module):
    """A loss of ``head(embeddings)``; the head is trained with the encoder and is not used afterwards.

    The embeddings themselves then keep more than what the loss asks for, which serves classes without training images.
    They are not orthogonal between classes as those of SimO without a head are. The head is a linear layer, BatchNorm,
    ReLU and a linear layer, and belongs to the loss in :class:`~simo_lightning.parameter_groups.ParameterGroups`. With
    ``projector: none`` of :class:`~simo_lightning.encoders.ImageEncoder` the embeddings are the features of the
    backbone.

    Args:
        loss: ``(embeddings, labels) -> scalar``.
        output_dim: Dimension of what the loss sees; None: D.
        hidden_dim: Width inside the head; None: D.
        embedding_dim: D, the dimension of the embeddings; None: the encoder's.

    Attributes:
        head: The head; None until D is known.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> import torch
        >>> from simo_lightning import SimOLoss
        >>> loss = ProjectionHeadLoss(SimOLoss(), output_dim=16, embedding_dim=128)
        >>> loss.head(torch.zeros(2, 128)).shape
        torch.Size([2, 16])

    Source:
        SimCLR (Chen et al., arXiv 2002.05709) and SupCon (Khosla et al., arXiv 2004.11362), whose heads have no
        BatchNorm where they are described. The paper has no head.
    """

    head: nn.Sequential | None

    def __init__(
        self,
        loss: nn.Module,
        output_dim: int | None = None,
        hidden_dim: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"output_dim": output_dim, "hidden_dim": hidden_dim, "embedding_dim": embedding_dim}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        self.output_dim, self.hidden_dim, self.embedding_dim = output_dim, hidden_dim, embedding_dim
        self.head, self.loss = None, loss
        if embedding_dim is not None:
            self._make(embedding_dim)

    def configure(self, num_classes: int | None, embedding_dim: int | None) -> None:
        """Create the head if it has not been, and configure the loss.

        Args:
            num_classes: Number of classes of training.
            embedding_dim: Dimension of the embeddings.

        Raises:
            ValueError: If the dimension is neither given nor passed, or contradicts what was given; or as the loss
                does.
        """
        name = type(self).__name__
        dimension = filled(name, "embedding_dim", self.embedding_dim, embedding_dim, NO_DIMENSION)
        check_dimension(name, "embedding_dim", dimension, embedding_dim)
        if self.head is None:
            self._make(dimension)
        configure_loss(self.loss, num_classes, self.output_dim)

    def _make(self, embedding_dim: int) -> None:
        hidden = embedding_dim if self.hidden_dim is None else self.hidden_dim
        output = embedding_dim if self.output_dim is None else self.output_dim
        self.embedding_dim, self.hidden_dim, self.output_dim = embedding_dim, hidden, output
        self.head = nn.Sequential(
            nn.Linear(embedding_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, output)
        )

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of the loss, or ``loss`` for one without terms; their sum is the loss.

        Args:
            embeddings: Float tensor ``(N, D)``, of at least two rows in training.
            labels: Integers ``(N,)``.

        Returns:
            Scalars by name.

        Raises:
            ValueError: If a type, shape or device is wrong, or the head does not exist yet; or as the loss does.
        """
        check_embeddings(embeddings, labels)
        if self.head is None:
            raise ValueError("embedding_dim of ProjectionHeadLoss must be given, or set by configure()")
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"embeddings must have {self.embedding_dim} dimensions, got {embeddings.shape[1]}")
        if self.training and len(embeddings) < 2:
            raise ValueError(f"embeddings must have at least 2 rows for BatchNorm in training, got {len(embeddings)}")
        projected = self.head(embeddings.to(next(self.head.parameters()).dtype))
        return {name or "loss": value for name, value in terms_of(self.loss, projected, labels)}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``, of at least two rows in training.
            labels: Integers ``(N,)``.

        Returns:
            Scalar.

        Raises:
            ValueError: As :meth:`terms`.
        """
        first, *others = self.terms(embeddings, labels).values()
        return sum(others, first)
