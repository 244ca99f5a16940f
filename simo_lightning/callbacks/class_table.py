"""Writes how well each class is found into a table."""

import csv
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, class_names
from simo_lightning.callbacks.knn import OnlineKNN
from simo_lightning.callbacks.retrieval import RetrievalMonitor
from simo_lightning.distributed import gather_rows
from simo_lightning.plotting.canvas import drawable

_COLUMNS = ("class", "images", "knn", "nearest_class_mean", "map_at_r", "r_precision", "recall_at_1")
_CONFUSED = ("most_confused_with", "confused")


class ClassTable(EvaluationCallback):
    """Write ``val_classes.csv`` or ``test_classes.csv`` in ``trainer.validate`` and ``trainer.test``: a row per class.

    The columns are ``class``, ``images`` of the split, the accuracies ``knn`` and ``nearest_class_mean``, the retrieval
    values ``map_at_r``, ``r_precision`` and ``recall_at_1``, and ``most_confused_with``, the class that kNN predicts
    most often for images of this class that it misclassifies, with ``confused``, their number. The values are those of
    the trainer's :class:`~simo_lightning.callbacks.OnlineKNN` and :class:`~simo_lightning.callbacks.RetrievalMonitor`,
    per class, over all processes; nothing is computed twice. Without one of these callbacks its columns are left out,
    and without both there is no table. A field is empty where a value is undefined: kNN of a class without training
    images, retrieval of a class with one image. Classes without images in the split have no row.

    The file is in ``trainer.default_root_dir``. If it cannot be written, one warning says so.

    Attributes:
        path: Of the file; None before it is written.
        rows: Of the last table, in the order of the classes.
    """

    required = False

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.rows: list[dict[str, Any]] = []
        self._labels: list[Tensor] = []
        self._counts: dict[int, int] = {}

    @override
    def reset(self, trainer: Trainer) -> None:
        self.path, self.rows, self._labels, self._counts = None, [], [], {}

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._labels.append(labels)

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        if trainer.state.fn != TrainerFn.FITTING:
            device = trainer.strategy.root_device
            labels = torch.cat(self._labels) if self._labels else torch.zeros(0, dtype=torch.long, device=device)
            classes, counts = gather_rows(labels.long()).unique(return_counts=True)
            self._labels, self._counts = [], dict(zip(classes.tolist(), counts.tolist(), strict=True))
        return {}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)  # here the other callbacks have evaluated, whatever their order
        if trainer.state.fn == TrainerFn.FITTING or not trainer.is_global_zero:
            return
        self.rows = self._table(trainer)
        if not self.rows:
            return
        path = Path(trainer.default_root_dir, f"{'test' if trainer.testing else 'val'}_classes.csv")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # names of folders may hold bytes that are not UTF-8
            with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows({name: _field(value) for name, value in row.items()} for row in self.rows)
            self.path = path
        except OSError as error:
            rank_zero_warn(f"ClassTable cannot write {path}: {error.strerror or error}")

    on_test_end = on_validation_end

    def _table(self, trainer: Trainer) -> list[dict[str, Any]]:
        """A row per class of the split; none without a callback that has values."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = [each.class_values for each in callbacks if isinstance(each, OnlineKNN | RetrievalMonitor)]
        names = {name for values in found for row in values.values() for name in row}
        if not names:
            return []
        columns = [name for name in (*_COLUMNS, *_CONFUSED) if name in {"class", "images", *names}]
        named = class_names(trainer, 0)
        rows = []
        for label, count in self._counts.items():
            row: dict[str, Any] = {"class": _name(label, named), "images": count}
            for values in found:
                row |= values.get(label, {})
            confused = row.get("most_confused_with", -1)
            row["most_confused_with"] = _name(confused, named) if confused >= 0 else ""
            rows.append({name: row.get(name, math.nan) for name in columns})
        return rows

    def summary(self, count: int = 5) -> list[str]:
        """The path of the table and its worst classes, for the terminal.

        Args:
            count: Largest number of classes, by kNN accuracy or else by MAP@R; of equal ones the larger first.

        Returns:
            Lines; none if no table was written.
        """
        if self.path is None:
            return []
        lines = [f"classes     {self.path}"]
        by = next((each for each in ("knn", "map_at_r") if any(_is_number(row.get(each)) for row in self.rows)), None)
        if by is None:
            return lines
        judged = [row for row in self.rows if _is_number(row[by])]
        for row in sorted(judged, key=lambda row: (row[by], -row["images"]))[:count]:
            name, images = drawable(row["class"], 28), row["images"]
            line = f"  {name:<28} {by} {row[by]:.2f} of {images:,} image{'s' * (images != 1)}"
            if row.get("most_confused_with"):
                line += f"; most often taken for {drawable(row['most_confused_with'], 28)} ({row['confused']:,})"
            lines.append(line)
        lines[0] += f"; the {len(lines) - 1} with the lowest {by}:" if len(lines) > 2 else ""
        return lines


def _name(label: int, named: list[str]) -> str:
    return named[label] if 0 <= label < len(named) else str(label)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isnan(value)


def _field(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return value
