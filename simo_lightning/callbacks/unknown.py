"""Evaluate whether embeddings tell images of known classes from others."""

import inspect
import math
from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from simo_lightning.callbacks.embed import EmbedBatch, embed_bank, embed_loader, own_batches
from simo_lightning.callbacks.evaluation import EvaluationCallback, described_images
from simo_lightning.distributed import gather_rows, rank, world_size
from simo_lightning.functional.decomposition import orthogonal_basis, span_energy
from simo_lightning.functional.unknown import class_mean_similarity, fpr_at_recall, unknown_auroc
from simo_lightning.metrics.sharded import class_counts_over_ranks, class_means_over_ranks, kth_similarity_over_ranks


class UnknownMonitor(EvaluationCallback):
    """Log how well embeddings answer whether an image belongs to any known class.

    Three scores, each higher for images of known classes: the cosine to the nearest class mean (``cosine``), the share
    of the energy in the span of the class means (``span``), and the cosine to the k-th nearest image of the bank
    (``knn``). Logged are the area under the ROC curve, ``val/unknown_auroc_cosine`` and so on, and the false positive
    rate where 95 % of the known images are accepted, ``val/unknown_fpr95_cosine`` and so on; in tests as ``test/``.

    The known classes are those of the bank, training images without augmentation. The unknown images are those of the
    data module's ``unknown_dataloader``, or of any loader; without them the callback does nothing. The known images are
    those of its ``known_dataloader``, if it has one, else the images of the split whose class the bank has. Where the
    class means span all dimensions, ``span`` is 1 for every image and is not logged.

    Args:
        k: Neighbour whose similarity is the score ``knn``; None: 5, or the size of the bank if that is smaller.
        bank_size: Number of training images in the bank; None: all.
        max_images: Largest number of unknown images, and of images of a ``known_dataloader``, over all processes. It is
            passed to these methods as ``limit`` if they have such an argument; those of this package then take the
            classes in proportion. None: all.
        every_n_epochs: Epochs of training from one evaluation to the next. ``trainer.validate`` and ``trainer.test``
            always evaluate.
        unknown: Loader of images of unknown classes; None: the data module's ``unknown_dataloader``, if it has one.
        bank: Loader of images of the known classes; None: the data module's ``bank_dataloader``.
        embed: Maps the module and a batch of these loaders to embeddings ``(N, D)`` and labels ``(N,)``; None: for
            batches ``(images, labels)``, by the module's ``embed`` or else its ``forward``.

    Raises:
        ValueError: If a number is below 1, or `bank_size` is given with `bank`; in an evaluation if k exceeds the bank.
    """

    def __init__(
        self,
        k: int | None = None,
        bank_size: int | None = None,
        max_images: int | None = 20_000,
        every_n_epochs: int = 1,
        unknown: DataLoader | None = None,
        bank: DataLoader | None = None,
        embed: EmbedBatch | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        for name, value in (("k", k), ("bank_size", bank_size), ("max_images", max_images)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if bank_size is not None and bank is not None:
            raise ValueError(f"bank_size must be None with a bank, which is used as it is, got {bank_size}")
        self.k = k
        self.bank_size = bank_size
        self.max_images = max_images
        self.unknown = unknown
        self.bank = bank
        self.embed = embed
        self._batches: list[tuple[Tensor, Tensor]] = []

    @override
    def missing(self, trainer: Trainer) -> list[str]:
        has_bank = self.bank is not None or _method(trainer, "bank_dataloader") is not None
        needs_bank = self.unknown is not None or _method(trainer, "unknown_dataloader") is not None
        if has_bank or not needs_bank:
            return []
        return ["a bank of known classes: UnknownMonitor(bank=loader), or a data module with bank_dataloader"]

    @override
    def reset(self, trainer: Trainer) -> None:
        self._batches = []

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        self._batches.append((embeddings, labels))

    @override
    @torch.no_grad()
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        unknown_loader = _loader(trainer, self.unknown, "unknown_dataloader", self.max_images)
        if unknown_loader is None or not self._batches:
            return {}
        unknown, _ = embed_loader(trainer, pl_module, _batches_of_split(trainer, unknown_loader), self.embed)
        bank, bank_labels = embed_bank(trainer, pl_module, self.bank, self.bank_size, self.embed)
        counts = class_counts_over_ranks(bank_labels)
        if self.k is not None and self.k > int(counts.sum()):
            raise ValueError(f"k must be in 1..{int(counts.sum())}, the size of the bank, got k={self.k}")
        known, known_labels = self._known(trainer, pl_module, counts.nonzero().squeeze(1))
        line = f"UnknownMonitor: {stage}/unknown_auroc and {stage}/unknown_fpr95"
        if not len(known):
            self._tell_once(f"{line} are not logged: no image of this split has a class of the bank")
            return {}
        self._tell_once(
            f"{line} are over {described_images(known_labels)} of the bank and {len(unknown):,} of no class of it"
        )
        values = {}
        for name, score in self._scores(stage, bank, bank_labels, counts).items():
            inside, outside = (gather_rows(score(rows[rank() :: world_size()])) for rows in (known, unknown))
            values[f"unknown_auroc_{name}"] = unknown_auroc(inside, outside)
            values[f"unknown_fpr95_{name}"] = fpr_at_recall(inside, outside)
        return values

    def _known(self, trainer: Trainer, pl_module: LightningModule, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of held-out images of known classes, of all processes."""
        embeddings, labels = (gather_rows(torch.cat(parts)) for parts in zip(*self._batches, strict=True))
        self.reset(trainer)
        loader = _loader(trainer, None, "known_dataloader", self.max_images) if self.unknown is None else None
        if loader is not None:
            embeddings, labels = embed_loader(trainer, pl_module, _batches_of_split(trainer, loader), self.embed)
        is_known = torch.isin(labels, classes)
        return embeddings[is_known], labels[is_known]

    def _scores(
        self, stage: str, bank: Tensor, bank_labels: Tensor, counts: Tensor
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        means = class_means_over_ranks(bank, bank_labels, counts)
        k = min(5, int(counts.sum())) if self.k is None else self.k
        scores: dict[str, Callable[[Tensor], Tensor]] = {
            "cosine": lambda rows: class_mean_similarity(rows, means),
            "knn": lambda rows: kth_similarity_over_ranks(rows, bank, k),
        }
        directions = orthogonal_basis(means).rank
        if directions < bank.shape[1]:
            scores["span"] = lambda rows: span_energy(rows, means)
        else:
            self._tell_once(
                f"UnknownMonitor: {stage}/unknown_auroc_span is not logged: the class means span all {directions} "
                "dimensions of the embeddings"
            )
        return scores


def _method(trainer: Trainer, name: str) -> Callable[..., Any] | None:
    method = getattr(getattr(trainer, "datamodule", None), name, None)
    return method if callable(method) else None


def _loader(trainer: Trainer, given: DataLoader | None, name: str, limit: int | None) -> Iterable[Any] | None:
    """This process's share of a loader that was given, else of the data module's; None if there is none."""
    if given is not None:
        return own_batches(trainer, given)
    method = _method(trainer, name)
    if method is None:
        return None
    takes_limit = "limit" in inspect.signature(method).parameters
    loader: Iterable[Any] | None = method(limit=limit) if takes_limit else method()
    return loader


def _batches_of_split(trainer: Trainer, loader: Iterable[Any]) -> Iterable[Any]:
    """The batches within ``limit_val_batches`` or ``limit_test_batches``, as the trainer reads the split itself."""
    limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
    if isinstance(limit, float):
        return islice(loader, math.ceil(limit * len(loader))) if isinstance(loader, Sized) and limit < 1 else loader
    return islice(loader, limit)
