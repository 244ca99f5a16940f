"""Pictures and snapshots of the embeddings during training."""

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import override

from simo_lightning.callbacks.evaluation import class_names
from simo_lightning.callbacks.moments import ClassMomentsCallback
from simo_lightning.distributed import gather_rows
from simo_lightning.extras import missing_extra
from simo_lightning.functional.moments import SECOND_BUDGET_MB, ClassMoments
from simo_lightning.loggers import log_figure
from simo_lightning.plotting import (
    Projection,
    Snapshot,
    class_similarity_figure,
    norms_figure,
    project_2d,
    save_snapshot,
    scatter_figure,
    spectrum_figure,
)

Result = TypeVar("Result")


class EmbeddingPlots(ClassMomentsCallback):
    """Draw the validation embeddings: cosines between class means, points in the plane, singular values, norms.

    Writes the latest ``similarity.png``, ``scatter.png``, ``spectrum.png`` and ``norms.png``, and in training a copy
    per epoch such as ``scatter_epoch=003.png``, and logs them to TensorBoard, Weights & Biases or MLflow. The scatter
    plot shows the first embeddings of each class, the other pictures show all embeddings. Training also writes a small
    :class:`~simo_lightning.plotting.Snapshot` per epoch, such as ``snapshots/epoch=003.npz``, from which the history
    can be drawn. Classes have the names of the data module's ``class_names``, or else their indices.

    A picture that cannot be drawn or written does not end training: one warning names it and the reason.

    Args:
        every_n_epochs: Epochs of training from one picture to the next. ``trainer.validate`` always draws.
        max_points: Points in the scatter plot, over all classes and processes.
        dirname: Folder of the pictures, under ``trainer.default_root_dir``.
        projection: From D dimensions to the plane; see :func:`~simo_lightning.plotting.project_2d`.
        snapshot_points: Points in a snapshot, over all classes, at most ``max_points``; the same images in every epoch.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``; where they would be
            larger, the picture of the norms shows each class's standard deviation over all directions.

    Raises:
        ValueError: If a number is below 1, or the projection is unknown or not installed.
            Also at the start of a run, if its steps return no embeddings.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        max_points: int = 2000,
        dirname: str = "plots",
        projection: Projection = "pca",
        snapshot_points: int = 300,
        second_budget_mb: float = SECOND_BUDGET_MB,
    ) -> None:
        super().__init__(every_n_epochs=every_n_epochs, second_budget_mb=second_budget_mb)
        for name, value in (("max_points", max_points), ("snapshot_points", snapshot_points)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if projection not in get_args(Projection):
            raise ValueError(f"projection must be one of {', '.join(get_args(Projection))}, got {projection!r}")
        if projection == "umap" and find_spec("umap") is None:
            raise ValueError(missing_extra("No module named 'umap'"))
        self.max_points = max_points
        self.dirname = dirname
        self.projection = projection
        self.snapshot_points = snapshot_points
        self._points: list[tuple[Tensor, Tensor]] = []
        self._seen: Tensor | None = None  # (C,) number of embeddings of each class so far
        self._failed: set[str] = set()  # pictures that a warning has named

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate") or not trainer.is_global_zero:
            return
        folder = self._folder(trainer)
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):  # warn now, not after the first epoch
            reason = f"no permission in {existing}" if existing.is_dir() else f"{existing} is a file"
            rank_zero_warn(f"EmbeddingPlots cannot write to its folder {folder}: {reason}; change default_root_dir")
            self._failed |= {"snapshots", "similarity", "scatter", "spectrum", "norms"}

    @override
    def reset(self, trainer: Trainer) -> None:
        super().reset(trainer)
        self._points, self._seen = [], None

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        super().update(trainer, embeddings, labels, batch, index)
        if self._epoch is None:  # left out
            return
        # without a data module, classes may appear with any batch
        so_far = (self._known_num_classes(trainer) or 1) if self._seen is None else len(self._seen)
        num_classes = max(so_far, int(labels.max()) + 1) if len(labels) else so_far
        seen = labels.new_zeros(num_classes) if self._seen is None else self._seen
        seen = nn.functional.pad(seen, (0, num_classes - len(seen)))
        kept = _first_of_class(labels, math.ceil(self.max_points / num_classes), seen)
        self._seen = seen + torch.bincount(labels, minlength=num_classes)
        self._points.append((embeddings[kept], labels[kept]))

    @override
    def evaluate(self, trainer: Trainer, stage: str, moments: ClassMoments) -> dict[str, Tensor]:
        if stage == "val":
            points, labels = self._gathered(moments.sums.shape[1], trainer.strategy.root_device)
            if trainer.is_global_zero:
                self._draw(trainer, moments, points, labels)
        self._points = []
        return {}

    def _gathered(self, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Points (N, D) and labels (N,) of all processes, on the CPU; a process may have none."""
        points = self._points or [(torch.zeros(0, dim, device=device), torch.zeros(0, dtype=torch.long, device=device))]
        rows, labels = (torch.cat(parts) for parts in zip(*points, strict=True))
        return gather_rows(rows.float()).cpu(), gather_rows(labels.long()).cpu()

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.dirname

    def _draw(self, trainer: Trainer, moments: ClassMoments, points: Tensor, labels: Tensor) -> None:
        names = class_names(trainer, len(moments.counts))
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            subset = _subset(points, labels, min(self.snapshot_points, self.max_points), len(names))
            snapshot = Snapshot.of_moments(trainer.current_epoch, trainer.global_step, moments, *subset)
            self._try("snapshots", save_snapshot, snapshot, self._folder(trainer) / "snapshots")
        points, labels = _subset(points, labels, self.max_points, len(names))
        title = f"{len(points)} of {int(moments.counts.sum())} validation embeddings"
        title = f"Epoch {trainer.current_epoch}: {title}" if fitting else title
        drawings: dict[str, Callable[[], Figure]] = {
            "similarity": partial(class_similarity_figure, moments, names),
            "scatter": lambda: scatter_figure(project_2d(points, self.projection), labels, names, title),
            "spectrum": partial(spectrum_figure, moments),
            "norms": partial(norms_figure, moments, names),
        }
        for name, draw in drawings.items():
            figure = self._try(name, draw)
            if figure is not None:
                self._try(name, self._save, trainer, name, figure)
                for logger in trainer.loggers:
                    step = trainer.global_step
                    self._try(f"{name} for {type(logger).__name__}", log_figure, logger, f"val/{name}", figure, step)

    def _save(self, trainer: Trainer, name: str, figure: Figure) -> None:
        latest = self._folder(trainer) / f"{name}.png"
        latest.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(latest)
        if trainer.state.fn == TrainerFn.FITTING:
            shutil.copyfile(latest, latest.with_name(f"{name}_epoch={trainer.current_epoch:03d}.png"))

    def _try(self, picture: str, step: Callable[..., Result], *arguments: Any) -> Result | None:
        """The result of a step; a failure is reported in one warning per picture, and training continues."""
        try:
            return step(*arguments)
        except Exception as error:  # whatever matplotlib, the disk or a logger's server may raise
            if picture not in self._failed:
                self._failed.add(picture)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                rank_zero_warn(f"EmbeddingPlots cannot draw {picture}: {reason}; training continues without it")
            return None


def _first_of_class(labels: Tensor, quota: int, seen: Tensor) -> Tensor:
    """Mask (N,) of the first ``quota`` embeddings of each class, of which earlier batches had ``seen`` (C,)."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=len(seen))
    first = counts.cumsum(dim=0) - counts  # (C,) where each class begins in the sorted labels
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    return rank + seen[labels] < quota


def _subset(points: Tensor, labels: Tensor, size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """The first points of each class with their labels, at most ``size``."""
    kept = _first_of_class(labels, math.ceil(size / num_classes), torch.zeros(num_classes, dtype=torch.long))
    return points[kept][:size], labels[kept][:size]
