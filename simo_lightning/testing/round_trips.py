"""Whether what is written can be read again: checkpoints, and the config of a run."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from simo_lightning.testing.trainers import differing, quiet_and_seeded, small_trainer


def check_checkpoint_round_trip(module: pl.LightningModule, images: Tensor | None = None) -> None:
    """Check that ``load_from_checkpoint(path)`` alone brings the module back: its weights, and what it computes.

    Args:
        module: Trained or not; left as it is, but for the mode (evaluation).
        images: What ``module(images)`` takes; None: four random ones, 32 x 32, of the encoder's ``in_channels`` or 3.

    Raises:
        AssertionError: If it cannot be loaded by its path alone, a weight differs or the output does.

    Example:
        >>> from simo_lightning import ImageEncoder, SimOModule
        >>> check_checkpoint_round_trip(SimOModule(ImageEncoder("resnet10", width=0.125)))
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
            again = type(module).load_from_checkpoint(path, map_location=module.device)
        except Exception as error:
            raise AssertionError(f"{name}.load_from_checkpoint(path) must do alone, but raised {error!r}") from error
        _raise_if(differing(module.state_dict(), again.state_dict()), f"the weights of {name}")
        outputs = ({"output": part.eval()(images)} for part in (module, again))
        _raise_if(differing(*outputs), f"what {name} computes")


def check_cli_round_trip(config: str | Path, *words: str, max_steps: int = 2) -> None:
    """Check that the config that ``simo fit`` writes beside a run gives the run again.

    Args:
        config: A config for ``simo fit``.
        words: More of the command line, such as ``"--data.data_dir", "DIR"``.
        max_steps: Batches that each of the two runs trains on.

    Raises:
        AssertionError: If the command fails, or the second run ends with other weights.

    Example:
        >>> check_cli_round_trip("configs/digits.yaml")  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as name:
        first, second = Path(name, "first"), Path(name, "second")
        brief: list[Any] = ["--trainer.max_steps", max_steps, "--trainer.limit_val_batches", 0]
        brief += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        _fit(["--config", config, *words, *brief, "--run_dir", first])
        _fit(["--config", first / "config.yaml", "--ckpt_path", "null", "--run_dir", second])
        states = [_last(folder)["state_dict"] for folder in (first, second)]
        _raise_if(differing(*states), "the weights of the run from the config that the first one wrote")


def _fit(words: list[Any]) -> None:
    command = [sys.executable, "-c", "from simo_lightning.cli import main; main()", "fit", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        said = " ".join(str(word) for word in words)
        raise AssertionError(f"simo fit {said} ended with {done.returncode}: {last}")


def _path(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _last(folder: Path) -> dict[str, Any]:
    if not _path(folder).is_file():
        raise AssertionError("the run left no checkpoints/last.ckpt: does it train for max_steps, and keep the last?")
    checkpoint: dict[str, Any] = torch.load(_path(folder), map_location="cpu", weights_only=True)
    return checkpoint


def _raise_if(found: str | None, what: str) -> None:
    if found is not None:
        raise AssertionError(f"{what} must be the same after the round trip, but differ: {found}")
