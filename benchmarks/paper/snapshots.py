"""What is measured on the validation split while a recipe trains."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.paper.apart import classes_apart
from benchmarks.recipes.evaluate import Embedded, embed
from simo_lightning import PairDataModule
from simo_lightning.functional.knn import knn_predict
from simo_lightning.functional.moments import class_moments


class Snapshots(pl.Callback):
    """Measures the encoder at evenly spaced steps, the first before training and the last after it.

    Nothing is chosen by it: the weights are those of a run without.

    Args:
        data: With a validation split.
        count: Number of measurements, >= 2.
        bank_size: Training images for means and neighbours.
        points: Validation embeddings that each one keeps for a picture.

    Attributes:
        taken: A dictionary for each: its step and epoch, and what :func:`measure` says.
        scatter: The points of each, ``(P, D)``, and ``labels`` ``(P,)``.

    Raises:
        ValueError: If there are fewer than two.
    """

    def __init__(self, data: PairDataModule, count: int, bank_size: int = 5000, points: int = 1000) -> None:
        if count < 2:
            raise ValueError(f"there must be at least 2 snapshots, got {count}")
        self.data, self.count, self.bank_size, self.points = data, count, bank_size, points
        self.taken: list[dict[str, Any]] = []
        self.scatter: list[Tensor] = []
        self.labels = torch.zeros(0, dtype=torch.long)
        self._steps: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan, and measure the encoder that has seen nothing."""
        total = int(trainer.estimated_stepping_batches)
        self._steps = {round(total * part / (self.count - 1)) for part in range(self.count)}
        self._take(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure where it is planned."""
        if trainer.global_step in self._steps and self.taken[-1]["step"] != trainer.global_step:
            self._take(trainer, pl_module)

    def _take(self, trainer: pl.Trainer, pl_module: Any) -> None:
        training = pl_module.training
        pl_module.eval()
        bank = embed(trainer, pl_module, self.data, self.data.bank_dataloader(limit=self.bank_size))
        val_loader = self.data.val_dataloader()
        if isinstance(val_loader, list):
            raise ValueError("the data must have a validation split, got val_fraction 0")
        val = embed(trainer, pl_module, self.data, val_loader)
        pl_module.train(training)
        place = {"step": trainer.global_step, "epoch": trainer.global_step / trainer.num_training_batches}
        self.taken.append({**place, **measure(bank, val, self.data.num_classes)})
        shown = _first_of_each(val.labels, self.points // self.data.num_classes)
        self.scatter.append(val.embeddings[shown])
        self.labels = val.labels[shown]


def measure(bank: Embedded, queries: Embedded, num_classes: int) -> dict[str, Any]:
    """How well each class is told, by neighbours and by means, and which classes stay apart.

    Args:
        bank: Training images, at least 20.
        queries: Others.
        num_classes: C.

    Returns:
        knn: accuracy of each class by 20 nearest neighbours; mean_accuracy: by the nearest mean of directions; groups
        and groups_euclidean: group of each class by cosine and by distance; means: class means of the bank, (C, D).
    """
    predicted = knn_predict(queries.embeddings, bank.embeddings, bank.labels, 20, num_classes)
    hits = torch.bincount(queries.labels[predicted == queries.labels], minlength=num_classes)
    moments = class_moments(bank.embeddings, bank.labels, num_classes)
    directions = class_moments(normalize(bank.embeddings.double()), bank.labels, num_classes).means
    angle = classes_apart(normalize(directions), normalize(queries.embeddings.double()), queries.labels)
    distance = classes_apart(moments.means, queries.embeddings, queries.labels)
    return {
        "knn": (hits / torch.bincount(queries.labels, minlength=num_classes)).tolist(),
        "mean_accuracy": angle.accuracy.tolist(),
        "groups": angle.groups.tolist(),
        "groups_euclidean": distance.groups.tolist(),
        "apart": {"groups": angle.count, "alone": angle.alone},
        "apart_euclidean": {"groups": distance.count, "alone": distance.alone},
        "means": moments.means.tolist(),
    }


def _first_of_each(labels: Tensor, count: int) -> Tensor:
    """Rows of the first ``count`` of each class."""
    place = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels.unsqueeze(1)).squeeze(1)
    return (place <= count).nonzero().squeeze(1)
