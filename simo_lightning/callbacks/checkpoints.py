"""Which checkpoints a run keeps, written so that a crash costs none: the best, the last, and what a signal leaves."""

import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from simo_lightning.distributed import largest_over_ranks


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that the target is always whole: the old or the new.

    Lightning's own writes to the folder for temporary files and moves; where that is another file system, the move is a
    copy over the target, and a crash in it leaves neither. The callbacks of this file put this one in its place.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file.

        Args:
            checkpoint: What ``torch.save`` takes.
            path: Target; an address with a protocol is left to Lightning.
            storage_options: None.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")  # what a crash leaves is overwritten by the next save
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


class _InRunFolder(ModelCheckpoint):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder.

        Args:
            trainer: Its ``default_root_dir`` is the run's folder.
            pl_module: Unused.
            stage: Unused.
        """
        self.dirpath = self.dirpath or _folder(trainer)
        _write_whole(trainer)
        super().setup(trainer, pl_module, stage)


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

    A run that resumes from it sees the images, augmentations and draws that it would have seen, to the last bit. Where
    the length of a run is given in steps, Lightning 2.6 takes up an epoch that was just complete as if it were not,
    and counts it twice; this callback mends that. A run that was killed in a validation goes on from its last save.

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
        self._every_n_epochs = 1  # ModelCheckpoint takes one of the two alone, but serves both
        self._between_epochs = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark an epoch as complete that was, all but its last hook.

        Args:
            trainer: Unused.
            pl_module: Unused.
            checkpoint: Its count of epochs is mended.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        self._between_epochs = progress["current"]["processed"] == progress["current"]["ready"]
        if self._between_epochs:
            for count in progress.values():
                count["completed"] = count["processed"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, even if the last batch was saved: validation and the callbacks have come since.

        Args:
            trainer: Saves.
            pl_module: Unused.
        """
        self._last_global_step_saved = -1
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch, rather than going on in one, where the last is complete.

        Args:
            trainer: Its loops are told.
            pl_module: Unused.
        """
        super().on_train_start(trainer, pl_module)
        if self._between_epochs:
            self._between_epochs = False
            trainer.fit_loop._restarting = False  # its setter says True to every run with max_steps
            trainer.fit_loop.epoch_loop.restarting = False


# What is asked for, in the order of precedence among processes that are asked for different things.
_NOTHING, _SAVE, _TERMINATE, _INTERRUPT = range(4)


class StopSafely(Callback):
    """Signals wait for the end of the batch, so that ``last.ckpt`` holds all that was done and the run can go on.

    - Ctrl-C (SIGINT) saves and ends the run with status 1; a second Ctrl-C ends it at once, without saving.
    - SIGTERM, by which schedulers end a job, saves and ends it with status 143.
    - SIGUSR1 saves and training goes on, outside a SLURM job that listens to it for itself.

    All processes act after the same batch, whichever hears the signal; it costs them one reduction of a number per
    batch. Gradients that are being accumulated are worked through first. After the last batch of an epoch the state is
    saved, and the run ends after the first batch of the next: validation and the end of the epoch come between.
    """

    def __init__(self) -> None:
        self._asked = _NOTHING

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See to it that what is saved is whole.

        Args:
            trainer: Writes.
            pl_module: Unused.
            stage: Unused.
        """
        _write_whole(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, in place of Lightning, whose handler of SIGTERM ends the run without saving.

        Its trainer puts all handlers back at the end of a run, however that comes.

        Args:
            trainer: Unused.
            pl_module: Unused.
        """
        self._asked = _NOTHING
        if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers nowhere else
            return
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)
        if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, self._ask)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if asked to.

        Args:
            trainer: Saves.
            pl_module: Unused.
            outputs: Unused.
            batch: Unused.
            batch_idx: Number of the batch.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed.
            SIGTERMException: If the process was told to terminate.
        """
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        asked = largest_over_ranks(self._asked, trainer.strategy.root_device)
        if asked == _NOTHING:
            return
        if self._asked == _SAVE:
            self._asked = _NOTHING  # before it is done, so that what is asked from now on is not forgotten
        path = Path(_folder(trainer), f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt")
        trainer.save_checkpoint(path)
        if asked == _SAVE or trainer.is_last_batch:
            rank_zero_info(f"saved {path} at step {trainer.global_step}")
            return
        rank_zero_info(f"\nstopped at step {trainer.global_step}; go on with --ckpt_path {path}")
        if asked == _INTERRUPT:
            raise KeyboardInterrupt
        # Lightning kills the first process at once when another that it started ends with a status of its own.
        raise SIGTERMException(128 + signal.SIGTERM if trainer.is_global_zero else 0)

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self._asked == _INTERRUPT:
                raise KeyboardInterrupt
            rank_zero_info("\nstopping after this batch; Ctrl-C again to stop at once, without saving")
        asked = {signal.SIGINT: _INTERRUPT, signal.SIGTERM: _TERMINATE}.get(signal.Signals(number), _SAVE)
        self._asked = max(self._asked, asked)


def _folder(trainer: pl.Trainer) -> str:
    return str(Path(trainer.default_root_dir, "checkpoints"))


def _write_whole(trainer: pl.Trainer) -> None:
    """Put AtomicCheckpointIO in the place of Lightning's own; a plugin that the user chose stays."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
