"""Graceful shutdown: signals save the state and end a run between two batches, and requeue a SLURM job."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from simo_lightning.callbacks.checkpoints import checkpoint_folder, write_atomically
from simo_lightning.distributed import largest_over_ranks

# What a signal requests; among several, on one process or on many, the largest counts.
_NOTHING, _SAVE, _REQUEUE, _TERMINATE, _INTERRUPT = range(5)


def in_slurm_job() -> bool:
    """Whether this process belongs to a SLURM job that can be requeued: any except an interactive one."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning has it
    return "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ and not interactive


class GracefulShutdown(Callback):
    """Act on signals after the batch, so that the run can be resumed from ``checkpoints/last.ckpt``.

    - Ctrl-C (SIGINT) saves and ends the run with status 1; a second Ctrl-C ends it at once, without saving.
    - SIGTERM, by which schedulers end a job, saves and ends it with status 143.
    - SIGUSR1 in a SLURM job saves, requeues the job and ends it. The script requests the signal with
      ``#SBATCH --signal=SIGUSR1@120``, here 120 seconds before the time limit, which must be enough for a batch, a
      validation and a checkpoint. ``simo fit ... --ckpt_path last``, the same command at every start, then continues
      with the next batch. A run that is complete before that is not requeued.
    - SIGUSR1 elsewhere saves, and training continues.

    All processes act after the same batch, whichever receives the signal, at the cost of one reduction of a number per
    batch. Accumulated gradients are applied first. After the last batch of an epoch, and after a batch whose metrics
    are logged, the state is saved and the run ends one batch later, so that validation, the end of the epoch and the
    row of the log are complete.

    Lightning's own handlers end the run without saving, or save in the middle of a batch; this callback replaces them
    during training.

    Args:
        save: Whether to write ``last.ckpt``. If not, signals end the run without saving, and a job is not requeued.
    """

    def __init__(self, save: bool = True) -> None:
        self.save = save
        self._request = _NOTHING
        self._opportunities = 0  # to act, since the request
        self._former: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Handle SIGUSR1 in a SLURM job before the data are loaded, so that an early signal is not lost."""
        write_atomically(trainer)
        if in_slurm_job() and stage == "fit" and threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGUSR1, self._receive)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # the SLURM scripts start with it blocked

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Handle the other signals; the trainer restores all handlers at the end of a run."""
        self._opportunities = 0
        if in_slurm_job():
            start = f"resumes after step {trainer.global_step}" if trainer.global_step else "starts"
            rank_zero_info(f"job {_job()} {start} (restart {os.environ.get('SLURM_RESTART_COUNT', '0')})")
        else:
            self._request = _NOTHING
        if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers nowhere else
            return
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)
        if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, self._receive)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, requeue and stop as requested."""
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # accumulated gradients are not part of a checkpoint
        request = largest_over_ranks(self._request, trainer.strategy.root_device)
        if request == _NOTHING:
            return
        if self._request == _SAVE:
            self._request = _NOTHING  # before saving, so that a signal during it is not lost
        self._opportunities += request != _SAVE
        every = getattr(trainer, "log_every_n_steps", 1)
        is_logged = every > 1 and trainer.global_step % every == 0  # the row of this step is written after this hook
        stops = request != _SAVE and (self._opportunities > 2 or not (trainer.is_last_batch or is_logged))
        if stops and request == _REQUEUE:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to a requeued job, which must end by itself
        path = Path(checkpoint_folder(trainer), f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt")
        if self.save:
            trainer.save_checkpoint(path)
        if not stops:
            outcome = f"saved {path}" if self.save else "saved nothing: last.ckpt is switched off"
            rank_zero_info(f"{outcome}, at step {trainer.global_step}")
            return
        if request == _REQUEUE:
            self._requeue(trainer, path)
        outcome = f"resume with --ckpt_path {path}" if self.save else "nothing was saved: last.ckpt is switched off"
        rank_zero_info(f"\nstopped at step {trainer.global_step}; {outcome}")
        if request == _INTERRUPT:
            raise KeyboardInterrupt
        # Lightning kills the first process at once if another that it started ends with a status other than 0.
        raise SIGTERMException(128 + signal.SIGTERM if trainer.is_global_zero else 0)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the handler of SIGUSR1, except its default, which would kill a run that is ending."""
        if self._former is not None:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN if self._former == signal.SIG_DFL else self._former)
            self._former = None

    def _requeue(self, trainer: pl.Trainer, path: Path) -> None:
        """End the process with 0 if the job is requeued, with 1 if it cannot be."""
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier()
        stopped = f"job {_job()} stopped at step {trainer.global_step}"
        if not self.save:
            rank_zero_info(f"{stopped} and is not requeued: last.ckpt is switched off, so it cannot be resumed")
            raise SystemExit(1)
        # before the request: SLURM ends the job, and with it the process that forwards this line
        rank_zero_info(f"{stopped}, saved {path} and is requeued")
        sys.stdout.flush()
        sys.stderr.flush()
        failure = _requeue_job() if trainer.is_global_zero else None
        failure = trainer.strategy.broadcast(failure)
        if failure:
            rank_zero_info(f"job {_job()} could not be requeued ({failure}): submit it again")
        raise SystemExit(1 if failure else 0)

    def _receive(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self._request == _INTERRUPT:
                raise KeyboardInterrupt
            rank_zero_info("\nstopping after this batch; Ctrl-C again to stop at once, without saving")
        on_user_signal = _REQUEUE if in_slurm_job() else _SAVE
        request = {signal.SIGINT: _INTERRUPT, signal.SIGTERM: _TERMINATE}.get(signal.Signals(number), on_user_signal)
        self._request = max(self._request, request)


def _job() -> str:
    return os.environ["SLURM_JOB_ID"]


def _requeue_job() -> str | None:
    """Requeue this job. Returns the error message, None on success."""
    try:
        done = subprocess.run(["scontrol", "requeue", _job()], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"
