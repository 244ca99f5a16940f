"""Which checkpoints a run keeps, the best and the last, each written so that a crash or a full disk costs none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from simo_lightning import lightning_private


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that the target is always whole: the old or the new.

    Lightning's own writes to the folder for temporary files and moves; where that is another file system, the move is a
    copy over the target, and a crash in it leaves neither. The package's callbacks put this one in its place.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file.

        Args:
            checkpoint: What ``torch.save`` takes.
            path: Target; an address with a protocol is left to Lightning.
            storage_options: None.

        Raises:
            OSError: If the file cannot be written, as on a full disk. The former file stays, the unfinished one goes.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.unfinished")  # what a crash leaves is overwritten by the next save
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except Exception as error:
            with suppress(OSError):
                unfinished.unlink()
            failure = _system_error(error)
            if failure is None:
                raise
            kept = "; the one before it is intact" if path.exists() else ""
            reason = failure.strerror or str(failure)
            raise OSError(failure.errno, f"checkpoint {path} cannot be written: {reason}{kept}") from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error in a chain of exceptions; torch raises its own after it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _InRunFolder(ModelCheckpoint):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder."""
        self.dirpath = self.dirpath or checkpoint_folder(trainer)
        write_atomically(trainer)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best value so far also where the run was moved, or the command is given from elsewhere."""
        if self.dirpath is not None and Path(self.dirpath, f"{self.filename}.ckpt").is_file():
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

    Where a callback measures every n epochs only, the epochs before its first measurement keep none.

    Args:
        monitor: Logged name of the metric.
        mode: Whether the largest or the smallest value is best.
    """

    def __init__(self, monitor: str = "val/knn", mode: Literal["max", "min"] = "max") -> None:
        super().__init__(
            monitor=monitor, mode=mode, filename="best", auto_insert_metric_name=False, enable_version_counter=False
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if not self._is_to_come(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if not self._is_to_come(trainer):
            super().on_validation_end(trainer, pl_module)

    def _is_to_come(self, trainer: pl.Trainer) -> bool:
        """Whether the metric may be missing only because its callback has not measured yet."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        rare = any(getattr(callback, "every_n_epochs", 1) > 1 for callback in callbacks)
        return rare and self.monitor not in trainer.callback_metrics


class LastCheckpoint(_InRunFolder):
    """Keeps the last state as ``<run folder>/checkpoints/last.ckpt``, replaced in one step at the end of each epoch.

    A run that resumes from it sees the images, augmentations and draws that it would have seen, to the last bit, also
    where it was saved at the end of an epoch, which Lightning alone would count twice. A run that was killed in a
    validation goes on from its last save.

    Args:
        every_n_train_steps: Also save each time so many steps are done; None for the ends of epochs alone.
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
        """Mark the last epoch as complete if it was."""
        self._between_epochs = lightning_private.complete_last_epoch(checkpoint)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, even if the last batch was saved: validation and the callbacks have come since."""
        lightning_private.forget_last_save(self)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch, rather than going on in one, where the last is complete."""
        super().on_train_start(trainer, pl_module)
        if self._between_epochs:
            self._between_epochs = False
            lightning_private.begin_new_epoch(trainer)


def checkpoint_folder(trainer: pl.Trainer) -> str:
    """Where a run keeps its checkpoints.

    Args:
        trainer: Its ``default_root_dir`` is the run's folder.

    Returns:
        The folder.
    """
    return str(Path(trainer.default_root_dir, "checkpoints"))


def write_atomically(trainer: pl.Trainer) -> None:
    """Put AtomicCheckpointIO in the place of Lightning's own; a plugin that the user chose stays.

    Args:
        trainer: Writes checkpoints.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


@contextmanager
def mismatch_in_one_line(path: str | Path | None) -> Iterator[None]:
    """Tell in one line that the weights of a checkpoint are not those of the module.

    Args:
        path: Checkpoint that is loaded inside the context.

    Raises:
        ValueError: In place of the RuntimeError of torch's ``load_state_dict``.
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
