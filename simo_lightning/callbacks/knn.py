"""Evaluate the encoder by nearest neighbours among the training images during training."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from simo_lightning.callbacks.budget import Plan, choose, embedding_dim, fit_sizes, images_of, length
from simo_lightning.callbacks.embed import EmbedBatch, bank_batches, embed_bank
from simo_lightning.callbacks.evaluation import EvaluationCallback, class_values, described_images, described_numbers
from simo_lightning.distributed import gather_rows, largest_over_ranks
from simo_lightning.functional.confusion import most_confused
from simo_lightning.functional.geometry import nearest_class_mean_predict
from simo_lightning.functional.knn import check_finite
from simo_lightning.functional.retrieval import average_scores
from simo_lightning.metrics.sharded import class_counts_over_ranks, class_means_over_ranks, knn_predict_over_ranks

_LEAST_PER_CLASS = 20  # images of the bank of each class, of which 7 vote
_LEAST = 200  # images of the bank


class OnlineKNN(EvaluationCallback):
    """Log the accuracy of a k-nearest-neighbour classifier as ``val/knn`` and ``test/knn``.

    The queries are the embeddings that validation and test steps return as ``outputs["embeddings"]`` with
    ``outputs["labels"]``. The bank is training images without augmentation: of the data module's
    ``bank_dataloader(limit=bank_size)``, or of any data loader. They are embedded in the trainer's precision, as
    :func:`~simo_lightning.callbacks.embed.embed_share` does. Every process embeds its share of the bank and keeps it;
    the queries and their nearest neighbours are sent (``simo_lightning.metrics.sharded``).

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
        bank_size: Number of training images to compare with; None: all. auto: in a fit as many as keep validation at
            about 10 % of an epoch, at least 200 and 20 of each class; in ``trainer.validate`` and ``trainer.test`` all.
        every_n_epochs: Epochs of training from one evaluation to the next; in between, checkpoints see the last
            values. auto: 1, or more where the least bank would take more than about 10 % of the time; the first and
            the last epoch are evaluated in any case. A line at the start of a fit says what was chosen.
            ``trainer.validate`` and ``trainer.test`` always evaluate.
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
        bank_size: int | Literal["auto"] | None = "auto",
        every_n_epochs: int | Literal["auto"] = "auto",
        bank: DataLoader | None = None,
        embed: EmbedBatch | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        size = None if bank_size == "auto" else bank_size
        for name, value in (("k", k), ("bank_size", size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if size is not None and k is not None and k > size:
            raise ValueError(f"k must be at most bank_size={bank_size}, got k={k}")
        if size is not None and bank is not None:
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
        size = self._bank_images(trainer, None if self.bank_size == "auto" else self.bank_size)
        if size is not None:  # else it is not known yet
            self._check_k(size)

    def _bank_images(self, trainer: Trainer, limit: int | None) -> int | None:
        """Images of the bank over all processes, None if its loader does not know. Every process calls it."""
        if self.bank is not None:
            return length(self.bank)
        return images_of(trainer, bank_batches(trainer, None, limit))

    @override
    def plan(self, trainer: Trainer, pl_module: LightningModule) -> Plan | None:
        chooses_size = self.bank_size == "auto" and self.bank is None
        if not chooses_size and self.every_n_epochs != "auto":
            return None
        total = self._bank_images(trainer, None)
        sizes = fit_sizes(trainer, pl_module, total)
        if total is None or sizes is None:
            return None
        budget = sizes.budget() * (1 if self.every_n_epochs == "auto" else self.every_n_epochs)
        cost = 1 + sizes.validated * embedding_dim(pl_module) / sizes.multiplications
        given = min(total, self.bank_size) if isinstance(self.bank_size, int) else total
        least = max(_LEAST, _LEAST_PER_CLASS * (self._known_num_classes(trainer) or 0), self.k or 1)
        free = self.every_n_epochs == "auto"
        plan = choose(budget, cost, 0, given, least, sizes=chooses_size, interval=free)
        used = given if plan.images is None else plan.images
        every = plan.every * (trainer.check_val_every_n_epoch or 1) if free else self.every_n_epochs
        often = "every epoch" if every == 1 else f"every {every} epochs"
        chosen = ["bank_size"] * chooses_size + ["every_n_epochs"] * free
        rank_zero_info(
            f"OnlineKNN compares with {used:,} of {total:,} images of the bank {often}, so that validation takes about "
            f"a tenth of an epoch or less ({' and '.join(chosen)}: auto)"
        )
        return plan

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
        if not largest_over_ranks(len(self._queries), trainer.strategy.root_device):
            return {}
        size = self.bank_size
        if size == "auto":
            size = self.planned.images if trainer.state.fn == TrainerFn.FITTING and self.planned is not None else None
        bank, bank_labels = embed_bank(trainer, pl_module, self.bank, size, self.embed)
        check_finite(bank, "bank")
        bank_counts = class_counts_over_ranks(bank_labels)
        self._check_k(int(bank_counts.sum()))
        means = class_means_over_ranks(bank, bank_labels, bank_counts)
        set_class_means: Any = getattr(pl_module, "set_class_means", None)
        if stage == "val" and self.bank is None and callable(set_class_means):
            set_class_means(means)
        # a process without a batch takes part with none
        queries = torch.cat([bank[:0], *(rows.to(bank.dtype) for rows, _ in self._queries)])
        labels = torch.cat([bank_labels[:0], *(each.long() for _, each in self._queries)])
        self.reset(trainer)
        check_finite(queries, "queries")
        classes = bank_counts.nonzero().squeeze(1)
        known = torch.isin(labels, classes)
        queries, asked = queries[known], labels[known]
        predictions = {
            "knn": knn_predict_over_ranks(queries, bank, bank_labels, bank_counts, self.k),
            "nearest_class_mean": nearest_class_mean_predict(queries, means, "cosine"),
        }
        correct = torch.stack([(predicted == asked).float() for predicted in predictions.values()], dim=1)
        correct, asked, labels = gather_rows(correct), gather_rows(asked), gather_rows(labels)
        voted = gather_rows(predictions["knn"])
        self._tell(stage, labels, asked, bank_counts)
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

    def _tell(self, stage: str, labels: Tensor, asked: Tensor, bank_counts: Tensor) -> None:
        """One line on the images and classes of the values."""
        classes = bank_counts.nonzero().squeeze(1)
        missing = labels[~torch.isin(labels, classes)]
        bank = f"the bank of {described_numbers(int(bank_counts.sum()), len(classes))}"
        if not len(asked):
            line = f"{stage}/knn and {stage}/nearest_class_mean are not logged: {bank} has no class of this split"
        else:
            line = f"{stage}/knn and {stage}/nearest_class_mean are over {described_images(asked)}, with {bank}"
            if len(missing):
                line += f"; {described_images(missing)} that the bank lacks do not count"
            if len(classes) == 1:
                line += "; with a bank of one class every value is 1"
        self._tell_once(f"OnlineKNN: {line}")


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
