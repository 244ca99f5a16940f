"""Checks that the training batches of a data module suit a contrastive loss."""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.testing.trainers import quiet_and_seeded


def check_batch_composition(
    datamodule: Any,
    classes_per_batch: int | None = None,
    samples_per_class: int | None = None,
    epochs: int = 2,
    world_size: int = 2,
    unlabelled_per_batch: int | None = None,
) -> None:
    """Check that every training batch holds P classes x K images and that no image is repeated within an epoch.

    Also that an epoch is reproducible and differs from the previous one; and, for a data module with ``rank`` and
    ``world_size`` as in this package, that all processes have the same number of batches and share no image.

    With U unlabelled images per batch, each with a label of its own, labelled images are repeated within an epoch; no
    image may then be repeated within a step of all processes.

    Args:
        datamodule: Its ``train_dataloader()`` returns a DataLoader whose batches are images and labels.
        classes_per_batch: P; None for the data module's attribute of that name.
        samples_per_class: K; None for the data module's attribute of that name.
        epochs: Number of epochs to check.
        world_size: Number of processes whose batches are compared; 1 for no comparison.
        unlabelled_per_batch: U; None for the data module's attribute of that name, and 0 without one.

    Raises:
        AssertionError: If a batch or an epoch violates this.

    Example:
        >>> from simo_lightning import DigitsPairDataModule
        >>> check_batch_composition(DigitsPairDataModule(samples_per_class=10))
    """
    with quiet_and_seeded():
        datamodule.prepare_data()
        datamodule.setup("fit")
        p = datamodule.classes_per_batch if classes_per_batch is None else classes_per_batch
        k = datamodule.samples_per_class if samples_per_class is None else samples_per_class
        u = getattr(datamodule, "unlabelled_per_batch", 0) if unlabelled_per_batch is None else unlabelled_per_batch
        loader = datamodule.train_dataloader()
        orders = [_order(loader, epoch) for epoch in range(epochs)]
        for epoch, order in enumerate(orders):
            _check_epoch(order, epoch, by_step=u > 0)
            _check_same(order, _order(datamodule.train_dataloader(), epoch), epoch)
            _check_labels(loader, epoch, p, k, u)
        if epochs > 1 and orders[0] == orders[1]:
            raise AssertionError("epoch 1 has the batches of epoch 0: the sampler must follow set_epoch")
        if world_size > 1 and hasattr(datamodule, "rank") and hasattr(datamodule, "world_size"):
            _check_shares([_order(_of_rank(datamodule, rank, world_size), 0) for rank in range(world_size)], u > 0)


def _order(loader: DataLoader, epoch: int) -> list[list[int]]:
    """Indices of each batch of an epoch."""
    _set_epoch(loader, epoch)
    if loader.batch_sampler is None:
        raise AssertionError("train_dataloader() must make batches by a sampler, got a loader with batch_size=None")
    return [list(batch) for batch in loader.batch_sampler]


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):  # as Lightning does
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _check_epoch(order: list[list[int]], epoch: int, by_step: bool) -> None:
    if not order:
        raise AssertionError(f"epoch {epoch} has no batch")
    if by_step:
        for index, batch in enumerate(order):
            _check_once(batch, "a batch", f"batch {index} of epoch {epoch}")
    else:
        _check_once(list(chain.from_iterable(order)), "an epoch", f"epoch {epoch}")


def _check_once(images: list[int], scope: str, where: str) -> None:
    values, counts = torch.tensor(images).unique(return_counts=True)
    if (counts > 1).any():
        index = int(counts.argmax())
        raise AssertionError(
            f"no image may occur twice in {scope}, but in {where} {int((counts > 1).sum())} of {len(values)} do: "
            f"image {int(values[index])} occurs {int(counts[index])} times"
        )


def _check_same(order: list[list[int]], again: list[list[int]], epoch: int) -> None:
    if order != again:
        pairs = enumerate(zip(order, again, strict=False))
        first = next((index for index, (one, other) in pairs if one != other), "?")
        raise AssertionError(
            f"epoch {epoch} must be the same each time it is drawn, but batch {first} differs: use no global generator"
        )


def _check_labels(loader: DataLoader, epoch: int, p: int, k: int, u: int) -> None:
    _set_epoch(loader, epoch)
    for index, (images, labels, *_) in enumerate(loader):
        where = f"batch {index} of epoch {epoch}"
        if len(images) != len(labels):
            raise AssertionError(f"{where} has {len(images)} images and {len(labels)} labels")
        counts = _counts(labels)
        alone = int((counts == 1).sum()) if u else 0  # an unlabelled image has a label of its own
        counts = counts[counts > 1] if u else counts
        if len(counts) != p or (counts != k).any():
            raise AssertionError(
                f"{where} must hold {p} classes x {k} images, got {len(counts)} classes with "
                f"{int(counts.min()) if len(counts) else 0} to {int(counts.max()) if len(counts) else 0} images"
            )
        if alone != u:
            raise AssertionError(f"{where} must hold {u} unlabelled images, got {alone}")


def _counts(labels: Tensor) -> Tensor:
    counts: Tensor = labels.unique(return_counts=True)[1]
    return counts


def _of_rank(datamodule: Any, rank: int, world_size: int) -> DataLoader:
    """The training loader of one process of several."""
    ranked = copy.copy(datamodule)
    ranked.__class__ = type(
        type(datamodule).__name__, (type(datamodule),), {"rank": rank, "world_size": world_size, "__module__": __name__}
    )
    loader: DataLoader = ranked.train_dataloader()
    return loader


def _check_shares(shares: list[list[list[int]]], by_step: bool) -> None:
    lengths = [len(share) for share in shares]
    if len(set(lengths)) > 1:
        raise AssertionError(f"all processes must have the same number of batches, got {lengths}")
    steps = zip(*shares, strict=True) if by_step else [[list(chain.from_iterable(share)) for share in shares]]
    for step in steps:
        common = set(step[0]).intersection(*step[1:])
        if common:
            scope = "a step" if by_step else "an epoch"
            raise AssertionError(f"processes must share no image in {scope}, but {len(common)} occur on all of them")
