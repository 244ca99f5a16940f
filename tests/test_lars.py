"""LARS with warm-up and cosine, from lightning-bolts by class path."""

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFIG = Path(__file__).parent.parent / "configs" / "cifar10_lars.yaml"
HAS_BOLTS = importlib.util.find_spec("pl_bolts") is not None
# The config as it is, but for digits, a small encoder and a CPU.
WARMUP, EPOCHS, PEAK = 3, 12, 8.0
SMALL = f"""
    --trainer.accelerator cpu --trainer.precision 32-true --trainer.max_epochs {EPOCHS}
    --trainer.enable_progress_bar false --trainer.enable_model_summary false --plots.every_n_epochs {EPOCHS}
    --model.encoder.backbone resnet10 --model.encoder.width 0.125 --model.encoder.in_channels 1
    --trainer.log_every_n_steps 10 --model.optimizer.lr {PEAK}
    --model.lr_scheduler.warmup_epochs {WARMUP} --model.lr_scheduler.max_epochs {EPOCHS}
    --data simo_lightning.DigitsPairDataModule --data.samples_per_class 10 --run_dir run
""".split()


def fit() -> "subprocess.CompletedProcess[str]":
    """In a process of its own: lightning-bolts warns of itself, and here warnings are errors."""
    command = [sys.executable, "-c", "from simo_lightning.cli import main; main()", "fit", "--config", str(CONFIG)]
    return subprocess.run([*command, *SMALL], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not HAS_BOLTS, reason="needs the extra bolts: pip install 'simo_lightning[bolts]'")
def test_lars_with_warmup_and_cosine_trains() -> None:
    done = fit()
    assert done.returncode == 0, done.stderr[-3000:]
    knn = next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("val/knn"))
    assert knn > 0.6  # 0.73 measured; chance is 0.1
    with Path("run/metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < losses[0] - 0.1
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == EPOCHS  # it moved once an epoch
    stopped = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    epoch = stopped["lr_schedulers"][0]["last_epoch"]
    if epoch > WARMUP:
        wanted = PEAK * (1 + math.cos(math.pi * (epoch - WARMUP) / (EPOCHS - WARMUP))) / 2
        assert stopped["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.skipif(HAS_BOLTS, reason="the extra bolts is installed")
def test_without_the_extra_one_line_says_what_to_install() -> None:
    done = fit()
    assert done.returncode == 2
    assert "pl_bolts is missing: pip install 'simo_lightning[bolts]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
