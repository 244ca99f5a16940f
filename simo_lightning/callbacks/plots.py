"""Pictures of the embedding along training, and what is needed to draw its history afterwards."""

import errno
import math
import os
import shutil
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.callbacks.watcher import EmbeddingWatcher
from simo_lightning.distributed import gather_rows
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.loggers import log_figure
from simo_lightning.metrics import ClassMomentsMetric
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


class EmbeddingPlots(EmbeddingWatcher):
    """Draw the validation embeddings: cosines between class means, points in the plane, singular values, norms.

    Writes ``similarity.png``, ``scatter.png``, ``spectrum.png`` and ``norms.png``, always the latest, and in training a
    copy per epoch such as ``scatter_epoch=003.png``; and hands them to TensorBoard, Weights & Biases or MLflow where
    one logs. All but the points are of all embeddings; of the points, each class shows its first few. In training it
    also keeps a small :class:`~simo_lightning.plotting.Snapshot` per epoch, ``snapshots/epoch=003.npz``, from which the
    history can be drawn. A module whose steps return no embeddings is left alone.

    Args:
        every_n_epochs: Epochs of training from one picture to the next. Validation by itself always draws.
        max_points: Points in the scatter plot, over all classes and processes.
        dirname: Folder of the pictures, under ``trainer.default_root_dir``.
        projection: From D dimensions to the plane; see :func:`~simo_lightning.plotting.project_2d`.
        snapshot_points: Points in a snapshot, over all classes, at most `max_points`; the same images in every epoch.

    Raises:
        ValueError: If a number is below 1.
        TypeError: With the first embeddings, if the data module has no ``class_names``.
        OSError: When a run starts, if the folder cannot be written; the text names it.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        max_points: int = 2000,
        dirname: str = "plots",
        projection: Projection = "pca",
        snapshot_points: int = 300,
    ) -> None:
        super().__init__(every_n_epochs)
        for name, value in (("max_points", max_points), ("snapshot_points", snapshot_points)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_points = max_points
        self.dirname = dirname
        self.projection = projection
        self.snapshot_points = snapshot_points
        self._metric: ClassMomentsMetric | None = None
        self._points: list[Tensor] = []
        self._labels: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell now, not after the first epoch, if the folder cannot be written."""
        if stage in ("fit", "validate") and trainer.is_global_zero:
            _check_folder(self._folder(trainer))

    def begin(self) -> None:
        """Forget the last epoch."""
        self._metric, self._points, self._labels = None, [], []

    def check(self, trainer: Trainer) -> None:
        """Raise if the classes have no names.

        Args:
            trainer: With its data module.

        Raises:
            TypeError: If the data module has no ``class_names``.
        """
        datamodule = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "class_names"):
            raise TypeError(
                f"EmbeddingPlots needs a data module with the attribute class_names, got {type(datamodule).__name__}"
            )

    def collect(self, trainer: Trainer, embeddings: Tensor, labels: Tensor) -> None:
        """Add the batch to the class means, and its first rows of each class to the points.

        Args:
            trainer: Knows the classes.
            embeddings: ``(N, D)``.
            labels: ``(N,)``.
        """
        if self._metric is None:
            self._metric = _new_metric(trainer, embeddings.shape[1], embeddings.device)
        seen = self._metric.counts.long()
        kept = _first_of_class(labels, self._quota(len(seen)), seen)
        self._metric.update(embeddings, labels)
        self._points.append(embeddings[kept])
        self._labels.append(labels[kept])

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw validation, not test; every process sends its part, the first one draws.

        Args:
            trainer: Knows the folder.
            pl_module: Unused.
            stage: "val" or "test".
        """
        if self._metric is None or stage != "val":
            return
        with self._metric.sync_context():
            moments = self._metric.moments
        points = gather_rows(torch.cat(self._points))
        labels = gather_rows(torch.cat(self._labels))
        self.begin()
        if trainer.is_global_zero:
            self._draw(trainer, moments, points, labels)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.dirname

    def _quota(self, num_classes: int) -> int:
        """Points of each class."""
        return math.ceil(self.max_points / num_classes)

    def _draw(self, trainer: Trainer, moments: ClassMoments, points: Tensor, labels: Tensor) -> None:
        names: list[str] = trainer.datamodule.class_names  # type: ignore[attr-defined]
        if trainer.state.fn == TrainerFn.FITTING:
            self._keep(trainer, moments, points, labels)
        points, labels = _few(points, labels, self.max_points, len(names))
        title = f"{len(points)} of {int(moments.counts.sum())} validation embeddings"
        if trainer.state.fn == TrainerFn.FITTING:
            title = f"Epoch {trainer.current_epoch}: {title}"
        self._save(trainer, "similarity", class_similarity_figure(moments, names))
        self._save(trainer, "scatter", scatter_figure(project_2d(points, self.projection), labels, names, title))
        self._save(trainer, "spectrum", spectrum_figure(moments))
        self._save(trainer, "norms", norms_figure(moments, names))

    def _keep(self, trainer: Trainer, moments: ClassMoments, points: Tensor, labels: Tensor) -> None:
        few = _few(points, labels, min(self.snapshot_points, self.max_points), len(moments.counts))
        snapshot = Snapshot.of_moments(trainer.current_epoch, trainer.global_step, moments, *few)
        try:
            save_snapshot(snapshot, self._folder(trainer) / "snapshots")
        except OSError as error:
            raise _named(error, self._folder(trainer)) from error

    def _save(self, trainer: Trainer, name: str, figure: Figure) -> None:
        latest = self._folder(trainer) / f"{name}.png"
        try:
            latest.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(latest)
            if trainer.state.fn == TrainerFn.FITTING:
                shutil.copyfile(latest, latest.with_name(f"{name}_epoch={trainer.current_epoch:03d}.png"))
        except OSError as error:
            raise _named(error, latest.parent) from error
        for logger in trainer.loggers:
            log_figure(logger, f"val/{name}", figure, trainer.global_step)


def _new_metric(trainer: Trainer, dim: int, device: torch.device) -> ClassMomentsMetric:
    num_classes = len(trainer.datamodule.class_names)  # type: ignore[attr-defined]
    return ClassMomentsMetric(num_classes, dim, torch.float32 if device.type == "mps" else torch.float64).to(device)


def _first_of_class(labels: Tensor, quota: int, seen: Tensor) -> Tensor:
    """Which rows (N,) are among the first `quota` of their class, after `seen` (C,) of each before them; a mask."""
    one_hot = torch.nn.functional.one_hot(labels, len(seen))  # (N, C)
    place = (one_hot.cumsum(dim=0) - 1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return place + seen.to(labels.device)[labels] < quota


def _few(points: Tensor, labels: Tensor, most: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """At most so many points with their labels, the first ones of each class."""
    unseen = torch.zeros(num_classes, dtype=torch.long)
    kept = _first_of_class(labels, math.ceil(most / num_classes), unseen)
    return points[kept][:most], labels[kept][:most]


def _check_folder(folder: Path) -> None:
    """Raise if the folder, or where it would be made, does not take files."""
    found = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not found.is_dir():
        raise _named(NotADirectoryError(errno.ENOTDIR, f"{found} is a file"), folder)
    if not os.access(found, os.W_OK | os.X_OK):
        raise _named(PermissionError(errno.EACCES, f"no permission in {found}"), folder)


def _named(error: OSError, folder: Path) -> OSError:
    """An error of the same kind whose text names the folder and the way out."""
    return type(error)(
        error.errno,
        f"EmbeddingPlots cannot write to its folder ({error.strerror}); change default_root_dir",
        str(folder),
    )
