"""Which checkpoints a run keeps: the best by a validation metric, the last, and what Ctrl-C leaves."""

import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best value of a metric as ``<run folder>/checkpoints/best.ckpt``.

    Args:
        monitor: Logged name of the metric.
        mode: Whether the largest or the smallest value is best.
    """

    def __init__(self, monitor: str = "val/knn", mode: Literal["max", "min"] = "max") -> None:
        super().__init__(
            monitor=monitor, mode=mode, filename="best", auto_insert_metric_name=False, enable_version_counter=False
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder.

        Args:
            trainer: Its ``default_root_dir`` is the run's folder.
            pl_module: Unused.
            stage: Unused.
        """
        self.dirpath = self.dirpath or _folder(trainer)
        super().setup(trainer, pl_module, stage)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last state as ``<run folder>/checkpoints/last.ckpt``, replaced in one step at the end of each epoch.

    Args:
        every_n_train_steps: Also save each time so many batches are done; None for the ends of epochs alone.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            monitor=None,
            filename=self.CHECKPOINT_NAME_LAST,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=1 if every_n_train_steps is None else None,
            enable_version_counter=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder.

        Args:
            trainer: Its ``default_root_dir`` is the run's folder.
            pl_module: Unused.
            stage: Unused.
        """
        self.dirpath = self.dirpath or _folder(trainer)
        super().setup(trainer, pl_module, stage)


class StopSafely(Callback):
    """Ctrl-C finishes the batch, saves ``last.ckpt`` and ends the run; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._former: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for Ctrl-C.

        Args:
            trainer: Unused.
            pl_module: Unused.
        """
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers nowhere else
            self._former = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save and stop, if asked to.

        Args:
            trainer: Saves.
            pl_module: Unused.
            _: Unused.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed.
        """
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            path = Path(_folder(trainer), f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt")
            trainer.save_checkpoint(path)
            rank_zero_info(f"\nstopped at step {trainer.global_step}; go on with --ckpt_path {path}")
            raise KeyboardInterrupt

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave Ctrl-C as it was.

        Args:
            trainer: Unused.
            pl_module: Unused.
            stage: Unused.
        """
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        rank_zero_info("\nstopping after this batch; Ctrl-C again to stop at once, without saving")


def _folder(trainer: pl.Trainer) -> str:
    return str(Path(trainer.default_root_dir, "checkpoints"))
