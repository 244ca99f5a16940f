"""The command as the tests run it: digits and an encoder small enough for a test, 12 batches of 10 x 10 an epoch."""

import csv
import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from simo_lightning.cli import main

ROOT = Path(__file__).parent.parent
SIMO = str(Path(sys.executable).parent / "simo")
DIGITS = str(ROOT / "configs" / "digits.yaml")
SMALL = ["--config", DIGITS, "--model.encoder.width", "0.125", "--trainer.accelerator", "cpu"]
SMALL += ["--knn.bank_size", "null", "--knn.every_n_epochs", "1"]  # as in validate and test, which compare with all
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
FEW_PLOTS = ["--plots.every_n_epochs", "4"]


def make_run(shared: Path) -> Path:
    """A run of two epochs with plots, made by the first process that asks for it."""
    folder, complete = shared / "digits" / "version_0", shared / "digits_complete"
    with (shared / "digits_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            words = ["fit", *SMALL, *QUIET, "--trainer.max_epochs", "2", "--plots.every_n_epochs", "1"]
            subprocess.run([SIMO, *words, "--run_dir", str(folder)], check=True, capture_output=True)
            complete.touch()
    return folder


def copy_of(run: Path) -> Path:
    """A copy of a run in the current folder, to be changed."""
    folder = Path("digits", "version_0")
    shutil.copytree(run, folder)
    return folder


def fit(*words: str, epochs: int = 1) -> None:
    main(["fit", *SMALL, *QUIET, *FEW_PLOTS, "--trainer.max_epochs", str(epochs), *words])


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
