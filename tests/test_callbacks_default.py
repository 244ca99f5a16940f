"""A plain Trainer and a plain LightningCLI with a SimOModule log kNN and geometry."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from simo_lightning import DigitsPairDataModule, SimOModule
from simo_lightning.callbacks import GeometryMonitor, OnlineKNN
from simo_lightning.cli import main
from simo_lightning.functional.geometry import GEOMETRY
from tests.callback_parts import Pictures, trainer


def module() -> SimOModule:
    torch.manual_seed(0)
    return SimOModule(nn.Sequential(nn.Flatten(), nn.Linear(8, 4)))


def evaluations(run: pl.Trainer) -> list[type]:
    return [type(each) for each in run.callbacks if isinstance(each, OnlineKNN | GeometryMonitor)]


def test_a_plain_trainer_logs_knn_and_geometry(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    logged = run.validate(module(), Pictures(), verbose=False)[0]
    assert logged.keys() >= {"val/knn", *(f"val/{name}" for name in GEOMETRY)}
    assert run.test(module(), Pictures(), verbose=False)[0].keys() >= {"test/knn", "test/class_cosine"}
    assert evaluations(run) == [OnlineKNN, GeometryMonitor]


def test_the_trainers_own_callbacks_stay(tmp_path: Path) -> None:
    class Own(GeometryMonitor):
        pass

    knn, monitor = OnlineKNN(k=3), Own(num_classes=5)
    run = trainer(tmp_path, knn, monitor)
    run.validate(module(), Pictures(), verbose=False)
    assert evaluations(run) == [OnlineKNN, Own]
    assert knn in run.callbacks
    assert monitor in run.callbacks
    silent = module()
    silent.default_callbacks = False
    assert trainer(tmp_path).validate(silent, Pictures(), verbose=False) == [{}]


def test_what_cannot_work_is_left_out(tmp_path: Path) -> None:
    rows = [(torch.randn(8), label % 3) for label in range(12)]
    run = trainer(tmp_path)
    logged = run.validate(module(), DataLoader(rows, batch_size=4), verbose=False)[0]  # no bank, no data module
    assert logged.keys() == {f"val/{name}" for name in GEOMETRY}

    class Classifier(SimOModule):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            self.log("val/loss", self.embed(batch[0]).square().mean())

    other = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(8, 4)))
    assert trainer(tmp_path).validate(other, Pictures(), verbose=False)[0].keys() == {"val/loss"}


def test_a_plain_command_line_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    encoder = ["--model.encoder=simo_lightning.ImageEncoder", "--model.encoder.in_channels=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    options = [*encoder, "--model.encoder.backbone=resnet10", "--trainer.limit_val_batches=1", *quiet]
    LightningCLI(SimOModule, DigitsPairDataModule, seed_everything_default=0, args=["validate", *options])
    printed = capsys.readouterr().out
    for name in ("val/knn", "val/class_cosine", "val/effective_rank"):
        assert name in printed


@pytest.mark.parametrize("name", ["knn", "geometry"])
def test_null_switches_them_off_in_the_command(digits_run: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    main(
        ["validate", "--config", str(digits_run / "config.yaml"), f"--{name}", "null", "--trainer.limit_val_batches=1"]
    )
    printed = capfd.readouterr().out
    assert ("val/knn" in printed) == (name != "knn")
    assert ("val/class_cosine" in printed) == (name != "geometry")
