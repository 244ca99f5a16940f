"""What the processes of test_resume.py run: a fit that writes down what it saw, and may end itself by a signal."""

import hashlib
import os
import signal
import subprocess
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import nn

from simo_lightning import DigitsPairDataModule, OneCycle, SimOModule
from simo_lightning.callbacks import GracefulShutdown, LastCheckpoint

BATCHES = 8  # of an epoch on each rank


class Witness(Callback):
    """Writes down each batch as it comes: epoch, number, digest of the augmented pixels, labels."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        digest = hashlib.sha256(batch[0].numpy().tobytes()).hexdigest()[:16]
        labels = "".join(map(str, batch[1].tolist()))
        with self.path.open("a") as file:
            file.write(f"{trainer.current_epoch} {batch_idx} {digest} {labels}\n")


class Signal(Callback):
    """Signals in the midst of batches, {step: (rank, signal)}: to the rank and its readers, SIGKILL to the rank alone.

    As from a scheduler: by another process, since a reader knows its parent's SIGTERM.
    """

    def __init__(self, signals: dict[int, tuple[int, int]]) -> None:
        self.signals = signals

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
        rank, number = self.signals.get(trainer.global_step, (-1, 0))
        if trainer.global_rank == rank:
            whom = os.getpid() if number == signal.SIGKILL else -os.getpgrp()
            subprocess.run(["sh", "-c", f"kill -{int(number)} {whom}"], start_new_session=True, check=True)


def encoder() -> nn.Module:
    """Dropout, so that the state of the random numbers is seen in the weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 4))


def fit(
    folder: Path,
    name: str,
    world: int = 1,
    workers: int = 0,
    checkpoint: Path | None = None,
    signals: dict[int, tuple[int, int]] | None = None,
    every: int | None = None,
    **arguments: Any,
) -> None:
    """Two epochs of ``BATCHES`` batches; what was seen and the last weights go to ``folder/name.<rank>.*``."""
    warnings.simplefilter("ignore")
    pl.seed_everything(0)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    data = DigitsPairDataModule(samples_per_class=6, num_workers=workers)
    module = SimOModule(encoder(), optimizer=partial(torch.optim.AdamW, lr=1e-2), lr_scheduler=OneCycle)
    witness = Witness(folder / f"{name}.{rank}.txt")
    callbacks = [witness, Signal(signals or {}), GracefulShutdown(), LastCheckpoint(every)]
    trainer = pl.Trainer(
        **{"max_epochs": 2, "limit_train_batches": BATCHES, "default_root_dir": folder / name, "logger": False}
        | {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": world}
        | {"strategy": "ddp" if world > 1 else "auto"}
        | {"callbacks": callbacks}
        | arguments
    )  # fmt: skip
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    finally:
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    torch.save(module.state_dict(), folder / f"{name}.{rank}.pt")
