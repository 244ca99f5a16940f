"""Embed a further data loader, such as the bank of a nearest-neighbour classifier, within a validation."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from simo_lightning.distributed import gather_rows
from simo_lightning.lightning_private import transfer_batch

# Embeddings (N, D) and labels (N,) of a batch as the module's validation step receives it.
EmbedBatch = Callable[[LightningModule, Any], tuple[Tensor, Tensor]]


def embed_images(pl_module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of a batch ``(images, labels)``: by the module's ``embed`` if it has one, else ``forward``.

    Args:
        pl_module: Maps images ``(N, ...)`` to embeddings ``(N, D)``.
        batch: A tuple or list that begins with images ``(N, ...)`` and labels ``(N,)``.

    Returns:
        ``(N, D)`` and ``(N,)``.

    Raises:
        TypeError: If the batch is anything else.
    """
    is_pair = (
        isinstance(batch, tuple | list) and len(batch) >= 2 and all(isinstance(each, Tensor) for each in batch[:2])
    )
    if not is_pair:
        raise TypeError(
            f"a batch to embed must be (images, labels), got {type(batch).__name__}: pass embed=function, which maps "
            "(module, batch) to (embeddings, labels)"
        )
    embed: Any = getattr(pl_module, "embed", None)
    return (embed if callable(embed) else pl_module)(batch[0]), batch[1]


def embed_loader(
    trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any], embed: EmbedBatch | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of a data loader, over all processes: what :func:`embed_share` returns, gathered.

    Args:
        trainer: In validation or test.
        pl_module: Embeds.
        loader: This process's share of the batches. :func:`own_batches` takes it from a loader of the whole data set.
        embed: Maps the module and a batch to embeddings ``(N, D)`` and labels ``(N,)``; None: :func:`embed_images`.

    Returns:
        ``(N, D)`` in float32 or float64 and ``(N,)``, on the trainer's device, ordered by process, then as loaded.

    Raises:
        TypeError: If a batch is not ``(images, labels)`` and ``embed`` is None.
        ValueError: If no process has a batch.
    """
    embeddings, labels = embed_share(trainer, pl_module, loader, embed)
    return gather_rows(embeddings), gather_rows(labels)


@torch.no_grad()
def embed_share(
    trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any], embed: EmbedBatch | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of this process's share of a data loader, in eval mode and the trainer's precision.

    A batch reaches the module as a batch of validation does: through the trainer's batch-transfer hooks. With a data
    module that has ``prepare(batch, augment)``, such as a PairDataModule, it goes through that, without augmentation.
    Afterwards every submodule is in its previous mode. Every process calls this function.

    Args:
        trainer: In validation or test.
        pl_module: Embeds.
        loader: This process's share of the batches. :func:`own_batches` takes it from a loader of the whole data set.
        embed: Maps the module and a batch to embeddings ``(N, D)`` and labels ``(N,)``; None: :func:`embed_images`.

    Returns:
        ``(N, D)`` in float32 or float64 and ``(N,)``, on the trainer's device, as loaded; N may be 0.

    Raises:
        TypeError: If a batch is not ``(images, labels)`` and ``embed`` is None.
        ValueError: If no process has a batch.
    """
    embed = embed_images if embed is None else embed
    precision, device = trainer.precision_plugin, trainer.strategy.root_device
    embeddings, labels = [], []
    with _eval_mode(pl_module):
        for batch in loader:
            converted = precision.convert_input(_transferred(trainer, batch))
            with precision.forward_context():
                rows, row_labels = embed(pl_module, converted)
            embeddings.append(rows if rows.dtype == torch.float64 else rows.float())
            labels.append(row_labels)
    # a process without a share does not know D and the precision, and must take part in the collectives
    own = [embeddings[0].shape[1], embeddings[0].dtype == torch.float64] if embeddings else [0, 0]
    dim, is_double = gather_rows(torch.tensor([own], device=device)).amax(dim=0).tolist()
    if dim == 0:
        raise ValueError("the data loader to embed must return at least one batch, got none")
    if not embeddings:
        embeddings.append(torch.zeros(0, dim, device=device, dtype=torch.float64 if is_double else torch.float32))
        labels.append(torch.zeros(0, dtype=torch.long, device=device))
    return torch.cat(embeddings), torch.cat(labels).long()


# Embeddings of the data modules' banks in the evaluation that runs, so that several callbacks embed each once.
_BANKS: WeakKeyDictionary[Trainer, dict[tuple[int | None, int], tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def embed_bank(
    trainer: Trainer,
    pl_module: LightningModule,
    bank: DataLoader | None = None,
    limit: int | None = None,
    embed: EmbedBatch | None = None,
) -> tuple[Tensor, Tensor]:
    """This process's share of the bank, as :func:`embed_share`; callbacks of one evaluation use the same.

    Args:
        trainer: In validation or test.
        pl_module: Embeds.
        bank: A loader of the whole bank, which is not shared; None: the data module's ``bank_dataloader``.
        limit: Of that method.
        embed: As for :func:`embed_share`.

    Returns:
        ``(N, D)`` and ``(N,)``, N may be 0. They must not be changed.
    """
    if bank is not None:
        return embed_share(trainer, pl_module, bank_batches(trainer, bank), embed)
    banks = _BANKS.setdefault(trainer, {})
    key = (limit, id(embed))
    if key not in banks:
        banks[key] = embed_share(trainer, pl_module, bank_batches(trainer, None, limit), embed)
    return banks[key]


def bank_batches(trainer: Trainer, bank: DataLoader | None, limit: int | None = None) -> Iterable[Any]:
    """This process's share of a bank that was given, else of the data module's with at most ``limit`` images."""
    if bank is not None:
        return own_batches(trainer, bank)
    datamodule: Any = getattr(trainer, "datamodule", None)
    loader: Iterable[Any] = datamodule.bank_dataloader(limit=limit)
    return loader


def forget_banks(trainer: Trainer) -> None:
    """Drop the embeddings that :func:`embed_bank` shares, because the evaluation begins or has ended."""
    _BANKS.pop(trainer, None)


def own_batches(trainer: Trainer, loader: Iterable[Any]) -> Iterable[Any]:
    """This process's share of a data loader that the trainer does not know.

    Args:
        trainer: With the processes.
        loader: A DataLoader that reads the whole data set in order is split by batches; one with a sampler of its own,
            and any other iterable, holds this process's share already.

    Returns:
        The batches.

    Raises:
        ValueError: If each of several processes shuffles the whole data set by itself.
    """
    if trainer.world_size == 1 or not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.sampler, RandomSampler):
        raise ValueError(
            "a data loader to embed on several processes must have shuffle=False or a sampler of each process's share, "
            "got shuffle=True"
        )
    if isinstance(loader.sampler, SequentialSampler):
        return islice(loader, trainer.global_rank, None, trainer.world_size)
    return loader


def _transferred(trainer: Trainer, batch: Any) -> Any:
    datamodule: Any = getattr(trainer, "datamodule", None)
    if callable(getattr(datamodule, "prepare", None)):
        return datamodule.prepare(move_data_to_device(batch, trainer.strategy.root_device), augment=False)
    return transfer_batch(trainer, batch)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards every submodule is in its previous mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
