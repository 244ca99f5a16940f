"""How a loss gets the number of classes and the dimension of the embeddings."""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class ConfigurableLoss(Protocol):
    """A loss that depends on the number of classes or on the dimension of the embeddings.

    :class:`~simo_lightning.module.SimOModule` calls :meth:`configure` before it makes the optimizer. A loss fills in
    what its own arguments leave open, and creates its parameters there. The two numbers are stored in the checkpoint,
    and :meth:`configure` is called again with them when the module is loaded from it.
    """

    def configure(self, num_classes: int | None, embedding_dim: int | None) -> None:
        """Fill in what is not given.

        Args:
            num_classes: Number of classes of training, >= 1; None if the data module does not have it.
            embedding_dim: Dimension of the embeddings, >= 1; None if the encoder does not have it.

        Raises:
            ValueError: If a number is needed and neither given nor passed, or contradicts what was given.
        """
        ...


def configure_loss(loss: nn.Module | None, num_classes: int | None, embedding_dim: int | None) -> None:
    """Call ``loss.configure`` if there is one.

    Args:
        loss: Any loss.
        num_classes: Number of classes of training; None if unknown.
        embedding_dim: Dimension of the embeddings; None if unknown.

    Raises:
        ValueError: As the loss does.
    """
    if isinstance(loss, ConfigurableLoss):
        loss.configure(num_classes, embedding_dim)


def filled(owner: str, name: str, given: int | None, known: int | None, source: str) -> int:
    """A number that is given by the user, or else known from elsewhere.

    Args:
        owner: Name of the loss, for the message.
        name: Name of the argument.
        given: By the user.
        known: From the data or the encoder.
        source: What should know it, for the message.

    Returns:
        The number.

    Raises:
        ValueError: If it is neither given nor known.
    """
    value = known if given is None else given
    if value is None:
        raise ValueError(f"{name} of {owner} must be given, since {source}")
    return value


NO_CLASSES = "the data module has no num_classes"
NO_DIMENSION = "the encoder has no embedding_dim"


def check_classes(owner: str, given: int, known: int | None) -> None:
    """Raise ValueError if a loss was made for fewer classes than the data have."""
    if known is not None and given < known:
        raise ValueError(f"num_classes of {owner} must be at least {known}, the classes of the data, got {given}")


def check_dimension(owner: str, name: str, given: int, known: int | None) -> None:
    """Raise ValueError if a loss was made for embeddings of another dimension than the encoder's."""
    if known is not None and given != known:
        raise ValueError(f"{name} of {owner} must be {known}, the encoder's embedding_dim, got {given}")
