import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn

from simo_lightning import DigitsPairDataModule, OneCycle, SimOLoss, SimOModule
from simo_lightning.class_paths import InitArgumentsMixin
from tests.bounds import assert_float32_error


class Flat(InitArgumentsMixin, nn.Module):
    """The smallest encoder of digits."""

    embedding_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(images)
        return embeddings


def fit(module: pl.LightningModule, folder: Path, **arguments: Any) -> pl.Trainer:
    options = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(default_root_dir=folder, accelerator="cpu", **{**options, **arguments})
    trainer.fit(module, datamodule=DigitsPairDataModule(samples_per_class=10))
    return trainer


def test_training_lowers_the_loss_and_logs_its_terms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SimOModule(Flat(), SimOLoss("centroid", "log"), partial(torch.optim.AdamW, lr=1e-2))
    first = fit(module, tmp_path).callback_metrics
    terms = [first[f"train/loss_{name}"] for name in ("similar", "dissimilar", "mean")]
    assert_float32_error(first["train/loss"], torch.stack(terms).sum(), torch.stack(terms).double().sum())
    start = float(first["train/loss"])
    assert fit(module, tmp_path, max_epochs=5).callback_metrics["train/loss"] < start - 0.1


def test_a_loss_of_another_library_can_be_used(tmp_path: Path) -> None:
    module = SimOModule(Flat(), SupConLoss())
    metrics = fit(module, tmp_path).callback_metrics
    assert metrics["train/loss"].isfinite()
    assert "train/loss_loss" not in metrics


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "64-true"])
def test_the_loss_is_float32_or_better_at_every_precision(tmp_path: Path, precision: Any) -> None:
    seen = []

    class Watching(SimOLoss):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            raise AssertionError("the module calls terms")

        def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
            seen.append((embeddings.dtype, torch.is_autocast_enabled("cpu")))
            return super().terms(embeddings, labels)

    fit(SimOModule(Flat(), Watching()), tmp_path, precision=precision, max_steps=2, limit_val_batches=0)
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert set(seen) == {(wanted, False)}


def test_nan_embeddings_raise_with_the_step(tmp_path: Path) -> None:
    class Bursts(Flat):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(images) * (math.nan if self.calls > 3 else 1.0)

    with pytest.raises(ValueError, match="at step 3: embeddings must be finite, got nan or inf in 100 of 100 rows"):
        fit(SimOModule(Bursts()), tmp_path, limit_val_batches=0, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="train/loss must be finite, got nan at step 3"):
        fit(SimOModule(Bursts(), SupConLoss()), tmp_path, limit_val_batches=0, num_sanity_val_steps=0)


def test_one_cycle_rises_to_the_peak_and_falls_to_the_end() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    schedule = OneCycle(optimizer, warmup=0.25, start=0.1, end=0.01)
    schedule.set_total_steps(101)
    rates = []
    for _ in range(103):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)
    assert rates[25] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.02)
    assert rates[102] == pytest.approx(0.02)
    middle = 0.02 + (2.0 - 0.02) * (1 + math.cos(math.pi * 0.5 / 0.75 * 1.0)) / 2
    assert rates[75] == pytest.approx(middle)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)


def test_one_cycle_needs_a_known_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OneCycle needs a run of known length"):
        fit(SimOModule(Flat(), lr_scheduler=OneCycle), tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"warmup must be in 0..1, got 2"):
        OneCycle(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), warmup=2)


def test_channels_last_changes_only_the_layout() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    plain = SimOModule(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    fast = SimOModule(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), channels_last=True)
    fast.load_state_dict(plain.state_dict())
    assert fast.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    exact = deepcopy(plain).double().embed(images.double())
    assert_float32_error(fast.embed(images), plain.embed(images), exact)
