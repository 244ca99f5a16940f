"""Checks that a module can be restored from its checkpoint, and a run repeated from its config."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from simo_lightning.testing.trainers import differing, quiet_and_seeded, small_trainer


def check_checkpoint_round_trip(
    module: pl.LightningModule, images: Tensor | None = None, **load_arguments: Any
) -> None:
    """Check that ``load_from_checkpoint`` restores a module: the same weights and the same output.

    Args:
        module: Trained or not; unchanged afterwards, except that it is in evaluation mode.
        images: Input of ``module(images)``; None for four random images of 32 x 32 pixels with the encoder's
            ``in_channels``, or 3.
        load_arguments: Passed to ``load_from_checkpoint`` beside the path, such as ``trusted=[MyEncoder]`` or
            ``loss=MyLoss()``.

    Raises:
        AssertionError: If it cannot be loaded, or a weight or the output differs.

    Example:
        >>> from simo_lightning import ImageEncoder, SimOModule
        >>> check_checkpoint_round_trip(SimOModule(ImageEncoder("resnet10", width=0.125, stem="small")))
    """
    if images is None:
        channels = getattr(getattr(module, "encoder", None), "in_channels", None) or 3
        images = torch.rand(4, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    name = type(module).__name__
    with tempfile.TemporaryDirectory() as folder, quiet_and_seeded(), torch.no_grad():
        path = Path(folder, "module.ckpt")
        trainer = small_trainer(folder)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        try:
            again = type(module).load_from_checkpoint(path, map_location=module.device, **load_arguments)
        except Exception as error:
            given = "".join(f", {each}=..." for each in load_arguments)
            message = f"{name}.load_from_checkpoint(path{given}) must restore the module, but raised {error!r}"
            raise AssertionError(message) from error
        _raise_if(differing(module.state_dict(), again.state_dict()), f"the weights of {name}")
        outputs = ({"output": part.eval()(images)} for part in (module, again))
        _raise_if(differing(*outputs), f"the output of {name}")


def check_cli_round_trip(config: str | Path, *options: str, max_steps: int = 2) -> None:
    """Check that a run from the config.yaml that ``simo fit`` wrote ends with the weights of the first run.

    Args:
        config: A config for ``simo fit``.
        options: Further options of the command line, such as ``"--data.data_dir", "DIR"``.
        max_steps: Optimizer steps of each of the two runs.

    Raises:
        AssertionError: If the command fails, or the second run ends with other weights.

    Example:
        >>> check_cli_round_trip("configs/digits.yaml")  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as name:
        first, second = Path(name, "first"), Path(name, "second")
        brief: list[Any] = ["--trainer.max_steps", max_steps, "--trainer.limit_val_batches", 0]
        brief += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        _fit(["--config", config, *options, *brief, "--run_dir", first])
        _fit(["--config", first / "config.yaml", "--ckpt_path", "null", "--run_dir", second])
        states = [_last(folder)["state_dict"] for folder in (first, second)]
        _raise_if(differing(*states), "the weights of the run from the config that the first one wrote")


def _fit(arguments: list[Any]) -> None:
    command = [sys.executable, "-c", "from simo_lightning.cli import main; main()", "fit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssertionError(f"simo fit {' '.join(map(str, arguments))} ended with {done.returncode}: {last}")


def _last(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise AssertionError(
            "the run wrote no checkpoints/last.ckpt: it must train for max_steps and keep the last checkpoint"
        )
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def _raise_if(found: str | None, what: str) -> None:
    if found is not None:
        raise AssertionError(f"{what} must be the same after the round trip, but differ: {found}")
