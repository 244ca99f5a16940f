"""Evaluate the encoder by nearest neighbours among the training images during training."""

from collections.abc import Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from simo_lightning.callbacks.embed import EmbedBatch, bank_batches, embed_bank
from simo_lightning.callbacks.evaluation import EvaluationCallback, class_values, described_images
from simo_lightning.distributed import gather_rows, sum_over_ranks
from simo_lightning.functional.confusion import most_confused
from simo_lightning.functional.geometry import nearest_class_mean_predict
from simo_lightning.functional.knn import knn_predict, unit_vectors
from simo_lightning.functional.moments import class_sums
from simo_lightning.functional.retrieval import average_scores


class OnlineKNN(EvaluationCallback):
    """Log the accuracy of a k-nearest-neighbour classifier as ``val/knn`` and ``test/knn``.

    The queries are the embeddings that validation and test steps return as ``outputs["embeddings"]`` with
    ``outputs["labels"]``. The bank is training images without augmentation: of the data module's
    ``bank_dataloader(limit=bank_size)``, or of any data loader. They are embedded in the trainer's precision, as
    :func:`~simo_lightning.callbacks.embed.embed_loader` does. Every process embeds its share of the bank and classifies
    its own queries.

    From the same embeddings it logs ``val/nearest_class_mean`` and ``test/nearest_class_mean``, the accuracy of the
    class whose mean has the largest cosine, the mean of the bank's embeddings at length 1
    (:func:`~simo_lightning.functional.geometry.nearest_class_mean_predict`).
    Both are means over images; ``val/knn_macro`` and ``val/nearest_class_mean_macro`` are means over classes of the
    accuracy on their images. A validation passes the class means to the module's ``set_class_means``, if it has that,
    so that checkpoints hold them. Images of a class that the bank lacks do not count; if no image is left, nothing is
    logged. One line states how many images and classes the values are over.

    Args:
        k: Neighbours that vote, by cosine similarity. None: 20, and fewer for a class with fewer than 58 images in the
            bank, as :func:`~simo_lightning.functional.knn_predict` does, so that small classes can win the vote.
        bank_size: Number of training images to compare with; None: all.
        every_n_epochs: Epochs of training from one evaluation to the next; in between, checkpoints see the last
            values. ``trainer.validate`` and ``trainer.test`` always evaluate.
        bank: Loader of the images to compare with, whose labels are those of the queries; None: the data module's
            ``bank_dataloader``. Its batches reach the module as those of validation do.
        embed: Maps the module and a batch of the bank to embeddings ``(N, D)`` and labels ``(N,)``; None: for batches
            ``(images, labels)``, by the module's ``embed`` or else its ``forward``.

    Attributes:
        class_values: Of the last evaluation, by label: the accuracies ``knn`` and ``nearest_class_mean``; the class
            that kNN predicts most often for the misclassified images, ``most_confused_with``, and how often,
            ``confused``.

    Raises:
        ValueError: If a number is below 1, or `bank_size` is given with `bank`; and at the start of a run, if there is
            no bank or k exceeds its images.
    """

    progress_bar = frozenset({"knn"})

    def __init__(
        self,
        k: int | None = None,
        bank_size: int | None = None,
        every_n_epochs: int = 1,
        bank: DataLoader | None = None,
        embed: EmbedBatch | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        for name, value in (("k", k), ("bank_size", bank_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if bank_size is not None and k is not None and k > bank_size:
            raise ValueError(f"k must be at most bank_size={bank_size}, got k={k}")
        if bank_size is not None and bank is not None:
            raise ValueError(f"bank_size must be None with a bank, which is used as it is, got {bank_size}")
        self.k = k
        self.bank_size = bank_size
        self.bank = bank
        self.embed = embed
        self.class_values: dict[int, dict[str, float]] = {}
        self._queries: list[tuple[Tensor, Tensor]] = []

    @override
    def missing(self, trainer: Trainer) -> list[str]:
        has_bank = self.bank is not None or callable(getattr(_datamodule(trainer), "bank_dataloader", None))
        return (
            []
            if has_bank
            else ["a bank to compare with: OnlineKNN(bank=loader), or a data module with bank_dataloader"]
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.k is None or not self.required or not trainer.enable_validation:
            return
        loader = bank_batches(trainer, self.bank, self.bank_size)
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, Sized):  # else the size is not known yet
            share = torch.tensor(len(loader.sampler), device=trainer.strategy.root_device)
            self._check_k(int(sum_over_ranks(share)) if self.bank is None else len(loader.sampler))

    def _check_k(self, bank_size: int) -> None:
        if self.k is not None and self.k > bank_size:
            raise ValueError(f"k must be at most the {bank_size} images of the bank, got k={self.k}")

    @override
    def reset(self, trainer: Trainer) -> None:
        self._queries = []

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        self._queries.append((embeddings, labels))

    @override
    @torch.no_grad()
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        self.class_values = {}
        if not self._queries:
            return {}
        bank, bank_labels = embed_bank(trainer, pl_module, self.bank, self.bank_size, self.embed)
        self._check_k(len(bank))
        means = class_means(bank, bank_labels)
        set_class_means: Any = getattr(pl_module, "set_class_means", None)
        if stage == "val" and self.bank is None and callable(set_class_means):
            set_class_means(means)
        queries, labels = (torch.cat(parts) for parts in zip(*self._queries, strict=True))
        self.reset(trainer)
        known = torch.isin(labels, bank_labels)
        queries, asked = queries[known], labels[known]
        predictions = {
            "knn": knn_predict(queries, bank, bank_labels, self.k),
            "nearest_class_mean": nearest_class_mean_predict(queries, means, "cosine"),
        }
        correct = torch.stack([(predicted == asked).float() for predicted in predictions.values()], dim=1)
        correct, asked, labels = gather_rows(correct), gather_rows(asked), gather_rows(labels)
        voted = gather_rows(predictions["knn"])
        self._tell(stage, labels, asked, bank_labels)
        if not len(asked):
            return {}
        self.class_values = class_values(correct, asked, list(predictions))
        confused, counts = (part.tolist() for part in most_confused(asked, voted, len(means)))
        for label, values in self.class_values.items():
            values |= {"most_confused_with": confused[label], "confused": counts[label]}
        averages = (("", average_scores(correct, asked)), ("_macro", average_scores(correct, asked, "macro")))
        return {
            f"{name}{suffix}": value
            for suffix, values in averages
            for name, value in zip(predictions, values, strict=True)
        }

    def _tell(self, stage: str, labels: Tensor, asked: Tensor, bank_labels: Tensor) -> None:
        """One line on the images and classes of the values."""
        missing = labels[~torch.isin(labels, bank_labels)]
        bank = f"the bank of {described_images(bank_labels)}"
        if not len(asked):
            line = f"{stage}/knn and {stage}/nearest_class_mean are not logged: {bank} has no class of this split"
        else:
            line = f"{stage}/knn and {stage}/nearest_class_mean are over {described_images(asked)}, with {bank}"
            if len(missing):
                line += f"; {described_images(missing)} that the bank lacks do not count"
            if len(bank_labels.unique()) == 1:
                line += "; with a bank of one class every value is 1"
        self._tell_once(f"OnlineKNN: {line}")


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def class_means(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Means (C, D) of unit embeddings by class, C - 1 the largest label; nan for a class without embeddings."""
    counts = torch.bincount(labels)
    embeddings = unit_vectors(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
    return class_sums(embeddings, labels, len(counts)) / counts.unsqueeze(1)
