"""A weighted sum of losses."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.losses.configure import configure_loss


class JointLoss(InitArgumentsMixin, nn.Module):
    """Weighted sum of losses of the same embeddings, such as SimO beside the cross-entropy of a classifier.

    Classifiers, proxies and projection heads of the losses are trained with the encoder and are not used afterwards.

    Args:
        losses: Losses ``(embeddings, labels) -> scalar`` by name; the names are those of the logged terms.
        weights: Weights by name, finite and >= 0; 1 for a loss that is not named. None: 1 for all.

    Raises:
        ValueError: If there is no loss, a name is no identifier, taken or begins with another one, or a weight is out
            of its range or names no loss.

    Example:
        >>> import torch
        >>> from simo_lightning import ClassifierLoss, SimOLoss
        >>> loss = JointLoss({"simo": SimOLoss(), "classifier": ClassifierLoss(2, 2)}, {"simo": 0.5})
        >>> list(loss.terms(torch.eye(2), torch.tensor([0, 1])))
        ['simo_similar', 'simo_dissimilar', 'simo_mean', 'classifier']
    """

    def __init__(self, losses: dict[str, nn.Module], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses must hold at least one loss, got none")
        for name in losses:
            if not name.isidentifier():
                raise ValueError(f"names of losses must be identifiers, got {name!r}")
            if hasattr(nn.ModuleDict, name):
                raise ValueError(f"no name of losses may be that of an attribute of nn.ModuleDict, got {name!r}")
            if any(name.startswith(f"{other}_") for other in losses):  # the names of their terms could be the same
                raise ValueError(f"no name of losses may begin with another one and '_', got {name!r}")
        for name, weight in (weights or {}).items():
            if name not in losses:
                raise ValueError(f"weights must be of the losses {', '.join(losses)}, got {name!r}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights must be finite and >= 0, got {weight} for {name!r}")
        self.weights: Mapping[str, float] = {**dict.fromkeys(losses, 1.0), **(weights or {})}
        self.losses = nn.ModuleDict(losses)

    def configure(self, num_classes: int | None, embedding_dim: int | None) -> None:
        """Configure every loss.

        Args:
            num_classes: Number of classes of training.
            embedding_dim: Dimension of the embeddings.

        Raises:
            ValueError: As the losses do.
        """
        for loss in self.losses.values():
            configure_loss(loss, num_classes, embedding_dim)

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted parts of the loss by name; their sum is the loss.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            Each loss by its name; of one with terms each term, as ``NAME_TERM``.

        Raises:
            ValueError: As the losses do.
        """
        return {
            f"{name}_{term}" if term else name: self.weights[name] * value
            for name, loss in self.losses.items()
            for term, value in terms_of(loss, embeddings, labels)
        }

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: the sum of :meth:`terms`.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            Scalar.

        Raises:
            ValueError: As the losses do.
        """
        first, *others = self.terms(embeddings, labels).values()
        return sum(others, first)

    def extra_repr(self) -> str:
        """The weights, for printing the module."""
        return f"weights={self.weights}"


def terms_of(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> list[tuple[str, Tensor]]:
    """Terms of a loss with their names; of one without terms the loss itself, with an empty name."""
    own = getattr(loss, "terms", None)
    return list(own(embeddings, labels).items()) if callable(own) else [("", loss(embeddings, labels))]
