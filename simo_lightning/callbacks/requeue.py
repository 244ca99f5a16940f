"""A SLURM job that meets its time limit: save after the batch, requeue the job, end."""

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def in_slurm_job() -> bool:
    """Whether this process belongs to a SLURM job that may be requeued: any but an interactive one."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning has it
    return "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ and not interactive


class RequeueAtTimeLimit(Callback):
    """In a SLURM job SIGUSR1 finishes the batch, saves ``checkpoints/last.ckpt``, requeues the job and ends it.

    The script asks for the signal by ``#SBATCH --signal=SIGUSR1@120``, so many seconds before the time limit; they must
    be enough for a batch, a validation and a checkpoint. ``simo fit ... --ckpt_path last``, the same command at every
    start, then goes on with the next batch. All processes stop after the same batch, whichever hears the signal, and
    none in the middle of accumulated gradients or after an epoch's last batch: validation and the end of the epoch come
    first. A run that ends before that is done and not requeued. Outside SLURM nothing happens.

    Lightning's own handler saves in the midst of a batch, from within the signal; it keeps quiet where another listens.

    Example:
        >>> callback = RequeueAtTimeLimit()
        >>> callback.asked
        False
    """

    def __init__(self) -> None:
        self.asked = False
        self.listening = in_slurm_job()
        self._waited = 0  # batches since the signal
        self._former: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen, from before the data is there: a signal that comes early is kept.

        Args:
            trainer: Unused.
            pl_module: Unused.
            stage: Only "fit" is requeued.
        """
        if self.listening and stage == "fit" and threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGUSR1, self._ask)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the job goes on.

        Args:
            trainer: Knows.
            pl_module: Unused.
        """
        if self.listening:
            start = f"goes on after step {trainer.global_step}" if trainer.global_step else "starts"
            rank_zero_info(f"job {_job()} {start} (restart {os.environ.get('SLURM_RESTART_COUNT', '0')})")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, requeue and end, if asked to.

        Args:
            trainer: Saves.
            pl_module: Unused.
            outputs: Unused.
            batch: Unused.
            batch_idx: Number of the batch.

        Raises:
            SystemExit: With 0 if the job is requeued, 1 if it cannot be.
        """
        if not self.listening or not trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            return
        self._waited += 1
        if not self._is_good_place(trainer, batch_idx):
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a requeued job is sent; its end is near anyway
        path = Path(trainer.default_root_dir, "checkpoints", f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt")
        trainer.save_checkpoint(path)
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier()
        failure = _requeue() if trainer.is_global_zero else None
        failure = trainer.strategy.broadcast(failure)
        outcome = f"cannot be requeued ({failure}): submit it again" if failure else "is requeued"
        rank_zero_info(f"job {_job()} stopped at step {trainer.global_step}, saved {path} and {outcome}")
        raise SystemExit(1 if failure else 0)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the signal as it was.

        Args:
            trainer: Unused.
            pl_module: Unused.
            stage: Unused.
        """
        if self._former is not None:
            # a signal that comes now finds a run that ends: it may not kill it
            signal.signal(signal.SIGUSR1, signal.SIG_IGN if self._former == signal.SIG_DFL else self._former)
            self._former = None

    def _is_good_place(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Whether a run stopped here goes on as if it had not been."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return False  # gradients that wait for the next batches are not saved
        if self._waited >= trainer.num_training_batches:
            return True  # an epoch too short to have a better place: its validation is left out
        every = getattr(trainer, "log_every_n_steps", 1)
        is_logged = every > 1 and trainer.global_step % every == 0
        return not trainer.is_last_batch and not is_logged  # the row of this step is written after this hook

    def _ask(self, *_: Any) -> None:
        self.asked = True


def _job() -> str:
    return os.environ["SLURM_JOB_ID"]


def _requeue() -> str | None:
    """Ask SLURM to run this job again. Returns: what went wrong, None if nothing did."""
    try:
        done = subprocess.run(["scontrol", "requeue", _job()], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"
