"""Every logger of Lightning's that shows pictures gets them, and metrics.csv is always there."""

import csv
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from simo_lightning.cli import SimoCLI, main
from simo_lightning.loggers import RunCSVLogger, log_figure

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
# An epoch of 12 steps of a small encoder, one validation and its two pictures.
SMALL = ["--config", str(DIGITS), "--model.encoder.width", "0.125", "--trainer.max_epochs", "1"]
SMALL += ["--plots.every_n_epochs", "1", "--trainer.enable_progress_bar", "false"]
SMALL += ["--trainer.enable_model_summary", "false"]
PICTURES = {"val/scatter", "val/similarity"}


def logged_in_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of metrics.csv."""
    found: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def assert_same_metrics(found: dict[str, list[tuple[int, float]]], folder: Path) -> None:
    expected = logged_in_csv(folder)
    assert {"train/loss", "val/knn", "val/class_cosine"} <= expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert [value for _, value in found[name]] == [value for _, value in values], name  # the same number, printed


def picture(color: str = "red") -> Figure:
    return Figure(figsize=(2, 1), dpi=50, facecolor=color)  # 100 x 50 pixels


def test_mlflow_gets_metrics_and_pictures_from_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.13 and later ask for it
    from mlflow.tracking import MlflowClient

    main(["fit", *SMALL, "--run_dir", "run", "--trainer.logger", "MLFlowLogger"])
    client = MlflowClient("file:./mlruns")
    experiment = client.get_experiment_by_name("lightning_logs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    found = {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in history.items()}
    assert_same_metrics(found, Path("run"))
    files = [Path(file.path) for file in client.list_artifacts(run.info.run_id, "images")]
    # "val~scatter+step+12+..." of MLflow 3, "val#scatter%step%12%..." of MLflow 2
    names = [re.split("[+%]", re.sub("[~#]", "/", file.name)) for file in files if file.suffix == ".png"]
    assert {name for name, *_ in names} >= PICTURES
    assert {(word, step) for _, word, step, *_ in names} == {("step", "12")}
    shown = next(Path("mlruns").rglob("images/val[~#]scatter*.png"))  # MLflow 2 cannot download names with a "#"
    logged = Image.open(shown)
    assert len(np.unique(np.asarray(logged.convert("RGB")).reshape(-1, 3), axis=0)) > 100  # drawn, not blank
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_epochs"] == 1  # not in mlruns/
    assert not Path("mlruns/config.yaml").exists()


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of an offline W&B run: a LevelDB log after seven bytes of its own; W&B has no public reader."""
    data, place, block, record = file.read_bytes(), 7, 2**15, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if block - place % block < 7:  # no room for a header: the rest of the block is padding
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])  # after a checksum of four bytes
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_history(file: Path) -> Iterator[dict[str, Any]]:
    """What was logged, a row a call, values as JSON gives them."""
    from wandb.proto import wandb_internal_pb2

    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_offline_gets_metrics_and_pictures_from_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)
    import wandb

    words = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true", "--trainer.logger.project", "simo"]
    main(["fit", *SMALL, "--run_dir", "run", *words])
    wandb.finish()
    wandb.teardown()  # ends its process too: only then is the file whole
    (file,) = Path("wandb").glob("offline-run-*/run-*.wandb")
    found: dict[str, list[tuple[int, float]]] = {}
    files: dict[str, str] = {}
    for row in wandb_history(file):
        for name, value in row.items():
            if isinstance(value, float | int):
                found.setdefault(name, []).append((row.get("trainer/global_step", -1), value))
            elif name.endswith("/filenames"):
                assert row["trainer/global_step"] == 12
                (files[name.removesuffix("/filenames")],) = value
    assert_same_metrics(found, Path("run"))
    assert files.keys() >= PICTURES
    for name in files.values():
        with Image.open(file.parent / "files" / name) as logged:
            assert min(logged.size) > 300


def test_tensorboard_gets_the_picture_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    log_figure(logger, "val/scatter", picture(), step=7)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("val/scatter")
    assert (image.step, image.width, image.height) == (7, 100, 50)


def test_a_logger_without_pictures_is_left_alone(tmp_path: Path) -> None:
    log_figure(CSVLogger(str(tmp_path)), "val/scatter", picture(), step=0)
    assert not list(tmp_path.iterdir())


def test_a_csv_logger_in_the_same_folder_keeps_the_rows_it_has(tmp_path: Path) -> None:
    for step, name in ((1, "train/loss"), (2, "val/knn")):
        logger = RunCSVLogger(str(tmp_path))
        logger.log_metrics({name: torch.tensor(0.5)}, step)
        logger.finalize("success")
    assert logged_in_csv(tmp_path) == {"train/loss": [(1, 0.5)], "val/knn": [(2, 0.5)]}


@pytest.mark.parametrize("cut", [1, 4, 30])
def test_a_row_that_was_cut_is_removed_and_later_rows_are_whole(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "metrics.csv"
    logger = RunCSVLogger(str(tmp_path))
    for step in range(3):
        logger.log_metrics({"train/loss": step / 2, "val/knn": step / 4}, step)
    logger.save()
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])  # what a process leaves that was killed while it wrote
    kept = max(whole[:-cut].count(b"\n") - 1, 0)
    again = RunCSVLogger(str(tmp_path))
    again.log_metrics({"train/loss": 9.0}, 9)
    again.finalize("success")
    expected = [(step, step / 2) for step in range(kept)] + [(9, 9.0)]
    assert logged_in_csv(tmp_path)["train/loss"] == expected
    assert len(file.read_text().splitlines()) == 1 + len(expected)


def test_a_header_that_was_cut_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,ste")
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 0.5}, 3)
    logger.finalize("success")
    assert logged_in_csv(tmp_path) == {"train/loss": [(3, 0.5)]}


class _Made(SimoCLI):
    """Keeps its trainer, runs nothing."""

    trainer_made: Any = None

    def _run_subcommand(self, subcommand: str) -> None:
        _Made.trainer_made = self.trainer


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit"], ["TensorBoardLogger run", "RunCSVLogger run"]),
        (["fit", "--trainer.logger", "true"], ["TensorBoardLogger run", "RunCSVLogger run"]),
        (["fit", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "own"],
         ["CSVLogger own/lightning_logs/version_0", "RunCSVLogger run"]),
        (["fit", "--config", "two.yaml"],
         ["TensorBoardLogger tb/lightning_logs/version_0", "CSVLogger own/lightning_logs/version_0",
          "RunCSVLogger run"]),
        (["fit", "--trainer.logger", "false"], []),
        (["validate"], []),
        (["validate", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "own"],
         ["CSVLogger own/lightning_logs/version_0"]),
    ],
    ids=["default", "true", "one", "two", "none", "validate", "validate with one"],
)  # fmt: skip
def test_metrics_csv_stands_beside_every_logger(
    words: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import simo_lightning.cli

    two = [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "tb"}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": "own"}},
    ]
    Path("two.yaml").write_text(yaml.safe_dump({"trainer": {"logger": two}}))
    monkeypatch.setattr(simo_lightning.cli, "SimoCLI", _Made)
    subcommand, *rest = words
    main([subcommand, "--config", str(DIGITS), "--run_dir", "run", "--trainer.accelerator", "cpu", *rest])
    found = [f"{type(logger).__name__} {Path(logger.log_dir)}" for logger in _Made.trainer_made.loggers]
    assert found == expected
