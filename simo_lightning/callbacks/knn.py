"""Evaluate the encoder by nearest neighbours among the training images during training."""

from collections.abc import Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from simo_lightning.callbacks.embed import embed_loader
from simo_lightning.callbacks.evaluation import EvaluationCallback
from simo_lightning.distributed import sum_over_ranks
from simo_lightning.functional.geometry import nearest_class_mean_predict
from simo_lightning.functional.knn import knn_predict
from simo_lightning.functional.moments import class_sums


class OnlineKNN(EvaluationCallback):
    """Log the accuracy of a k-nearest-neighbour classifier as ``val/knn`` and ``test/knn``.

    The queries are the embeddings that validation and test steps return as ``outputs["embeddings"]`` with
    ``outputs["labels"]``. The bank is training images without augmentation, from the data module's
    ``bank_dataloader(limit=bank_size)`` and ``prepare(batch, augment=False)``, embedded by ``pl_module.embed(images)``
    in the trainer's precision. Every process embeds its share of the bank and classifies its own queries. A module
    whose steps return no embeddings is not evaluated.

    From the same embeddings it logs ``val/nearest_class_mean`` and ``test/nearest_class_mean``, the accuracy of the
    class whose mean over the bank is nearest (:func:`~simo_lightning.functional.geometry.nearest_class_mean_predict`).

    Args:
        k: Neighbours that vote, by cosine similarity.
        bank_size: Number of training images to compare with; None: all.
        every_n_epochs: Epochs of training from one evaluation to the next; in between, checkpoints see the last
            values. ``trainer.validate`` and ``trainer.test`` always evaluate.

    Raises:
        ValueError: If a number is below 1; and at the start of a fit, if k exceeds the images of the bank.
        TypeError: With the first embeddings, if the data module has no ``bank_dataloader`` and ``prepare``, or the
            module no ``embed``.
    """

    progress_bar = frozenset({"knn"})

    def __init__(self, k: int = 20, bank_size: int | None = None, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_epochs)
        for name, value in (("k", k), ("bank_size", bank_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if bank_size is not None and k > bank_size:
            raise ValueError(f"k must be at most bank_size={bank_size}, got k={k}")
        self.k = k
        self.bank_size = bank_size
        self._queries: list[tuple[Tensor, Tensor]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        make_loader = getattr(getattr(trainer, "datamodule", None), "bank_dataloader", None)
        if not trainer.enable_validation or make_loader is None or not callable(getattr(pl_module, "embed", None)):
            return
        loader = make_loader(limit=self.bank_size)
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, Sized):  # else the size is not known yet
            share = torch.tensor(len(loader.sampler), device=trainer.strategy.root_device)
            self._check_k(int(sum_over_ranks(share)))

    def _check_k(self, bank_size: int) -> None:
        if self.k > bank_size:
            raise ValueError(f"k must be at most the {bank_size} images of the bank, got k={self.k}")

    @override
    def check(self, trainer: Trainer) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        for part, owner, method in (
            ("data module", datamodule, "bank_dataloader"),
            ("data module", datamodule, "prepare"),
            ("module", trainer.lightning_module, "embed"),
        ):
            if not callable(getattr(owner, method, None)):
                raise TypeError(f"OnlineKNN requires a {part} with the method {method}, got {type(owner).__name__}")

    @override
    def reset(self, trainer: Trainer) -> None:
        self._queries = []

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        self._queries.append((embeddings, labels))

    @override
    @torch.no_grad()
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        if not self._queries:
            return {}
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        bank, bank_labels = embed_loader(trainer, pl_module, datamodule.bank_dataloader(limit=self.bank_size))
        self._check_k(len(bank))
        queries, labels = (torch.cat(parts) for parts in zip(*self._queries, strict=True))
        self.reset(trainer)
        predictions = {
            "knn": knn_predict(queries, bank, bank_labels, self.k),
            "nearest_class_mean": nearest_class_mean_predict(queries, _class_means(bank, bank_labels)),
        }
        correct = [(predicted == labels).sum() for predicted in predictions.values()]
        *correct, count = sum_over_ranks(torch.stack([*correct, torch.tensor(len(labels), device=labels.device)]))
        return {name: number.float() / count for name, number in zip(predictions, correct, strict=True)}


def _class_means(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Class means (C, D), where C - 1 is the largest label; nan for a class without embeddings."""
    counts = torch.bincount(labels)
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return class_sums(embeddings, labels, len(counts)) / counts.unsqueeze(1)
