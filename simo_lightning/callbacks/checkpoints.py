"""The best and the last checkpoint of a run, written so that a crash or a full disk never damages them."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from simo_lightning import lightning_private
from simo_lightning.callbacks.evaluation import EvaluationCallback
from simo_lightning.callbacks.knn import OnlineKNN
from simo_lightning.callbacks.plots import EmbeddingPlots
from simo_lightning.callbacks.retrieval import RetrievalMonitor
from simo_lightning.retry import retry_while_lost
from simo_lightning.strategies import ShardedStrategy
from simo_lightning.tensor_files import is_sharded, named_in_error, read_sharded, replace_folder, unfinished_of


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a file beside its target and renames it, so that the target is always complete.

    Lightning's own writes to the temporary folder and moves the file. If that folder is on another file system, the
    move copies over the target, and a crash leaves neither checkpoint. The package's callbacks install this class.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()  # that have been there: one that is missing now is not made again, but lost

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file.

        Args:
            checkpoint: What ``torch.save`` takes.
            path: Target; a URL with a protocol is left to Lightning.
            storage_options: None.

        Raises:
            OSError: If the file cannot be written, at once on a full disk, after a minute if the folder is lost. The
                former file is kept.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        if path.parent not in self._folders:
            with named_in_error(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        retry_while_lost(partial(self._write, checkpoint, path), path)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or the folder of a sharded checkpoint, for a strategy that does not shard weights."""
        if is_sharded(path):
            return read_sharded(path)
        return super().load_checkpoint(path, map_location, weights_only)

    @staticmethod
    def _write(checkpoint: dict[str, Any], path: Path) -> None:
        unfinished = unfinished_of(path)  # overwritten by the next save if a crash leaves it
        with named_in_error(path):
            try:
                with unfinished.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.is_dir():
                    replace_folder(unfinished, path)
                else:
                    unfinished.replace(path)
            except Exception:
                with suppress(OSError):
                    unfinished.unlink()
                raise


class _InRunFolder(ModelCheckpoint):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Determine the folder."""
        self.dirpath = self.dirpath or checkpoint_folder(trainer)
        write_atomically(trainer)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best value also if the run was moved, or the working directory is another one."""
        if self.dirpath is not None and Path(self.dirpath, f"{self.filename}.ckpt").exists():
            state_dict = dict(state_dict)
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state_dict[name] = self._here(state_dict.get(name, ""))
            best = state_dict.get("best_k_models", {})
            state_dict["best_k_models"] = {self._here(path): score for path, score in best.items()}
            state_dict["dirpath"] = self.dirpath
        super().load_state_dict(state_dict)

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath), Path(path).name)) if path else path


class BestCheckpoint(_InRunFolder):
    """Keeps the checkpoint with the best value of a metric as ``<run folder>/checkpoints/best.ckpt``.

    If a callback evaluates every n epochs only, the epochs before its first evaluation keep none. A warning at the end
    of a run names a metric that was never logged.

    Args:
        monitor: Logged name of the metric. None: ``val/knn``, or ``val/map_at_r`` if training has no image of any class
            of validation. If only one of OnlineKNN and RetrievalMonitor is in the trainer, the metric is its own.
        mode: Whether the largest or the smallest value is the best.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        super().__init__(
            monitor=monitor or "val/knn",
            mode=mode,
            filename="best",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._chooses_metric = monitor is None
        self._first_epoch = 0  # of this start of the run
        self._validated = False  # since this start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the metric, before the state of a checkpoint is restored under its name."""
        if self._chooses_metric and stage == "fit":
            self.monitor = _default_metric(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        super().on_train_start(trainer, pl_module)
        self._first_epoch, self._validated = trainer.current_epoch, False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        super().on_train_end(trainer, pl_module)
        if self._validated and not self.best_model_path and self.monitor not in trainer.callback_metrics:
            rank_zero_warn(f"no {self.filename}.ckpt was written: {self.monitor} was never logged")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if not self._is_to_come(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self._validated = not trainer.sanity_checking
        if not self._is_to_come(trainer):
            super().on_validation_end(trainer, pl_module)

    def _is_to_come(self, trainer: pl.Trainer) -> bool:
        """Whether the metric may be missing because it has not been evaluated since this start."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evaluations = [each for each in callbacks if isinstance(each, EvaluationCallback)]
        # with "auto" the first validation is evaluated
        every = {each.every_n_epochs for each in evaluations if not isinstance(each, EmbeddingPlots)} - {1, "auto"}
        periods = [math.lcm(int(number), trainer.check_val_every_n_epoch or 1) for number in every]  # with a validation
        pending = not self._validated or any(
            (trainer.current_epoch + 1) // period == self._first_epoch // period for period in periods
        )
        return pending and self.monitor not in trainer.callback_metrics


def _default_metric(trainer: pl.Trainer) -> str:
    """``val/knn``, or ``val/map_at_r`` where no class of validation has training images or nothing logs val/knn."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    logs_knn, logs_retrieval = (
        any(isinstance(each, kind) for each in callbacks) for kind in (OnlineKNN, RetrievalMonitor)
    )
    if logs_knn and logs_retrieval:
        return "val/map_at_r" if _validates_on_unseen_classes(trainer) else "val/knn"
    return "val/map_at_r" if logs_retrieval else "val/knn"


def _validates_on_unseen_classes(trainer: pl.Trainer) -> bool:
    """Whether training has no image of any class of validation; False if the data module does not tell."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    unseen = set(getattr(datamodule, "unseen_class_names", None) or [])
    if not unseen:
        return False
    loaders = datamodule.val_dataloader()
    first = next(iter(loaders), None) if isinstance(loaders, list | tuple) else loaders
    labels = getattr(getattr(first, "dataset", None), "labels", None)
    return labels is not None and {datamodule.class_names[label] for label in set(labels.tolist())} <= unseen


class LastCheckpoint(_InRunFolder):
    """Keeps the last state as ``<run folder>/checkpoints/last.ckpt``, replaced atomically at the end of each epoch.

    A run that resumes from it uses the same images, augmentations and random numbers as without the interruption, to
    the last bit, also if it was saved at the end of an epoch, which Lightning alone would count twice. A run that was
    killed during validation resumes from its last save.

    Args:
        every_n_train_steps: Also save every n steps; None: only at the end of each epoch.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            monitor=None,
            filename=self.CHECKPOINT_NAME_LAST,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        lightning_private.save_at_steps_and_epochs(self)
        self._between_epochs = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the last epoch as complete if it was."""
        self._between_epochs = lightning_private.complete_last_epoch(checkpoint)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save even if the last batch was saved, because validation and callbacks have run since."""
        lightning_private.forget_last_save(self)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new epoch if the last one is complete."""
        super().on_train_start(trainer, pl_module)
        if self._between_epochs:
            self._between_epochs = False
            lightning_private.begin_new_epoch(trainer)


def checkpoint_folder(trainer: pl.Trainer) -> str:
    """The folder of a run's checkpoints.

    Args:
        trainer: Its ``default_root_dir`` is the run's folder.

    Returns:
        The folder.
    """
    return str(Path(trainer.default_root_dir, "checkpoints"))


def write_atomically(trainer: pl.Trainer) -> None:
    """Replace Lightning's own checkpoint plugin by AtomicCheckpointIO; a plugin that the user chose is kept.

    Lightning's ModelParallelStrategy becomes a :class:`~simo_lightning.strategies.ShardedStrategy`.

    Args:
        trainer: Its strategy writes checkpoints.
    """
    if type(trainer.strategy) is ModelParallelStrategy:
        trainer.strategy.__class__ = ShardedStrategy  # it has no plugin for the folder of a sharded checkpoint
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


@contextmanager
def mismatch_in_one_line(path: str | Path | None) -> Iterator[None]:
    """Turn torch's error for weights that do not fit the module into one line.

    Args:
        path: Checkpoint that is loaded in the context.

    Raises:
        ValueError: Instead of the RuntimeError of torch's ``load_state_dict``.
    """
    try:
        yield
    except RuntimeError as error:
        summary, *found = str(error).splitlines()
        if "loading state_dict" not in summary:
            raise
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        reason = found[0].strip().rstrip(".") if found else summary
        raise ValueError(f"checkpoint {path} does not fit the model of the config: {reason}{more}") from error
