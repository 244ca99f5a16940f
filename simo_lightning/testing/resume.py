"""Checks that a run which was stopped and resumed ends with the weights of an uninterrupted one."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from simo_lightning.testing.trainers import differing, quiet_and_seeded, small_trainer


class _Stopped(Exception):
    """Ends a run at the requested step."""


class _StopAfter(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise _Stopped


def check_resume(
    module_factory: Callable[[], pl.LightningModule],
    datamodule_factory: Callable[[], Any],
    stop_after: int | None = None,
    max_epochs: int = 2,
    **trainer_arguments: Any,
) -> None:
    """Check that a run which is stopped after a batch and resumed in new objects ends with identical weights.

    Args:
        module_factory: Returns a new module; called three times, with the same seed.
        datamodule_factory: Returns a new data module; called three times. The whole data set is used, so keep it small.
        stop_after: Optimizer steps before the stop; None for the middle of the last epoch.
        max_epochs: Length of the run.
        trainer_arguments: Further arguments of the trainer, such as ``precision``.

    Raises:
        AssertionError: If a weight, the optimizer's or the scheduler's state differs in any bit.
        ValueError: If the run has no such step before its last.

    Example:
        >>> from simo_lightning import DigitsPairDataModule, ImageEncoder, SimOModule
        >>> def make_module():
        ...     return SimOModule(ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1))
        >>> def make_data():
        ...     return DigitsPairDataModule(samples_per_class=60)
        >>> check_resume(make_module, make_data)
    """

    def run(path: Path, step: int | None = None, checkpoint: Path | None = None) -> pl.Trainer:
        with quiet_and_seeded():
            callbacks = [] if step is None else [_StopAfter(step, path)]
            trainer = small_trainer(path.parent, max_epochs=max_epochs, callbacks=callbacks, **trainer_arguments)
            try:
                trainer.fit(module_factory(), datamodule=datamodule_factory(), ckpt_path=checkpoint, weights_only=False)
            except _Stopped:
                return trainer
            trainer.save_checkpoint(path)
            return trainer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = run(folder / "whole.ckpt").global_step
        stop = steps - max(1, steps // max_epochs // 2) if stop_after is None else stop_after
        if not 0 < stop < steps:
            raise ValueError(f"stop_after must lie in 1..{steps - 1}, before the last step of the run, got {stop}")
        run(folder / "stopped.ckpt", step=stop)
        resumed = run(folder / "resumed.ckpt", checkpoint=folder / "stopped.ckpt").global_step
        if resumed != steps:
            raise AssertionError(f"stopped after step {stop} and resumed, a run of {steps} steps ends after {resumed}")
        _compare(folder, stop)


def _compare(folder: Path, stop: int) -> None:
    whole, resumed = (torch.load(folder / f"{name}.ckpt", weights_only=False) for name in ("whole", "resumed"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        found = differing({part: whole[part]}, {part: resumed[part]})
        if found is not None:
            raise AssertionError(
                f"stopped after step {stop} and resumed, the run ends differently from an uninterrupted one: {found}. "
                "Plain attributes of a module or data module and the state of a global generator are not in the "
                "checkpoint: use a buffer, or state_dict and load_state_dict"
            )
