import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from simo_lightning.cli import SimoCLI, main

ROOT = Path(__file__).parent.parent
SIMO = str(Path(sys.executable).parent / "simo")
# cifar10_lars.yaml needs an extra: tests/test_lars.py
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "cifar10_lars")
# Digits with an encoder small enough for a test: 12 batches of 10 x 10 an epoch.
SMALL = [
    "--config",
    str(ROOT / "configs" / "digits.yaml"),
    "--model.encoder.width",
    "0.125",
    "--plots.every_n_epochs",
    "4",
]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def fit(*words: str, epochs: int = 1) -> None:
    main(["fit", *SMALL, *QUIET, "--trainer.max_epochs", str(epochs), *words])


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


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["simo"])  # LightningCLI warns of two sources of words
    yield
    os.environ.pop("SIMO_RUN_DIR", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = ["fit", *SMALL, *QUIET, "--trainer.max_epochs", "2", "--run_dir", str(folder)]
    subprocess.run([SIMO, *words], check=True, capture_output=True)
    return folder


def test_a_run_leaves_config_metrics_events_checkpoints_and_plots(run: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    logged = {name for row in rows(run) for name, value in row.items() if value}
    assert {"train/loss", "train/images_per_second", "val/knn", "val/class_cosine", "val/effective_rank"} <= logged


def test_a_metric_that_is_measured_rarely_gives_its_checkpoint_when_it_comes(tmp_path: Path) -> None:
    folder = tmp_path / "rare"
    fit("--run_dir", str(folder), "--knn.every_n_epochs", "2", epochs=2)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 1  # the first epoch measured nothing


def test_new_runs_get_new_folders_and_a_resumed_one_keeps_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    root = Path("runs/digits")
    fit("--ckpt_path", "last")  # the first start of a job that may be restarted: nothing to go on from
    assert "starting from the beginning" in capfd.readouterr().out
    fit()
    assert sorted(path.name for path in root.iterdir()) == ["version_0", "version_1"]
    before = rows(root / "version_1")
    fit("--ckpt_path", "last", epochs=2)
    assert sorted(path.name for path in root.iterdir()) == ["version_0", "version_1"]
    after = rows(root / "version_1")
    assert [row["step"] for row in after[: len(before)]] == [row["step"] for row in before]
    assert {row["epoch"] for row in after} == {"0", "1"}
    assert torch.load(root / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def start(folder: Path, epochs: int = 2) -> "subprocess.Popen[bytes]":
    words = ["fit", *SMALL, *QUIET, "--trainer.max_epochs", str(epochs), "--run_dir", str(folder)]
    return subprocess.Popen([SIMO, *words, "--trainer.log_every_n_steps", "1"], stderr=subprocess.PIPE)


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else None
        time.sleep(0.05)
    raise TimeoutError(path)


def test_a_run_killed_in_the_middle_goes_on_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = start(folder)
    wait_for(folder / "checkpoints" / "last.ckpt", process)  # one of two epochs is done
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    fit("--run_dir", str(folder), "--ckpt_path", "last", epochs=2)
    assert_equal_weights(folder / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")


def test_ctrl_c_saves_last_and_the_run_goes_on_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = start(folder)
    wait_for(folder / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1].decode()
    assert process.returncode != 0
    assert "Traceback" not in error
    assert "go on with --ckpt_path" in error
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 12 < step < 24  # in the middle of the second epoch
    fit("--run_dir", str(folder), "--ckpt_path", "last", epochs=2)
    assert_equal_weights(folder / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")


def test_validate_test_and_predict_from_a_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    best = str(run / "checkpoints" / "best.ckpt")
    main(["validate", *SMALL, *QUIET, "--ckpt_path", best])
    knn = max(float(row["val/knn"]) for row in rows(run) if row["val/knn"])
    assert f"{knn:.4f}"[:5] in capfd.readouterr().out
    main(["test", *SMALL, *QUIET, "--run_dir", str(run), "--ckpt_path", "best"])
    assert "test/knn" in capfd.readouterr().out
    main(["predict", *SMALL, *QUIET, "--ckpt_path", best])
    with np.load(run / "predictions" / "embeddings.npz") as file:
        assert file["embeddings"].shape == (len(file["labels"]), 16)
        assert file["class_names"].tolist() == [str(digit) for digit in range(10)]
        assert set(file["labels"].tolist()) == set(range(10))


def test_a_probe_of_the_encoder(run: Path) -> None:
    config = {
        "trainer": {
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "best": {"monitor": "val/accuracy"},
        "model": {"class_path": "simo_lightning.ProbeModule", "init_args": {"num_classes": 10, "head": "mlp"}},
        "data": {"class_path": "simo_lightning.DigitsPairDataModule", "init_args": {"samples_per_class": 10}},
    }
    Path("probe.yaml").write_text(yaml.safe_dump(config))
    checkpoint = run / "checkpoints" / "best.ckpt"
    main(["fit", "--config", "probe.yaml", "--model.checkpoint", str(checkpoint), "--run_dir", "probe"])
    trained = weights(Path("probe/checkpoints/best.ckpt"))
    for name, weight in weights(checkpoint).items():
        assert torch.equal(weight, trained[name]), f"{name} of the frozen encoder moved"
    accuracy = [float(row["val/accuracy"]) for row in rows(Path("probe")) if row["val/accuracy"]]
    assert accuracy[-1] > 0.2


class ParseOnly(SimoCLI):
    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_its_parts(config: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import simo_lightning.cli

    monkeypatch.setattr(simo_lightning.cli, "SimoCLI", ParseOnly)
    words = ["fit", "--config", str(config), "--trainer.accelerator", "cpu"]
    if config.stem.endswith("probe"):
        words += ["--model.checkpoint", str(run / "checkpoints" / "best.ckpt")]
    main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--config", "none.yaml"], "none.yaml"),
        (["fit", *SMALL, "--model.encodr.width", "1"], "encodr"),
        (["fit", *SMALL, "--trainer.max_ep", "1"], "max_ep"),
        (["fit", *SMALL, "--model.loss", "SimOLoss", "--model.loss.level", "batch"], "batch"),
        (["train"], "train"),
    ],
    ids=["no config", "misspelt key", "cut key", "wrong value", "wrong command"],
)  # fmt: skip
def test_a_wrong_argument_is_told_in_a_line(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in said(capfd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.classes_per_batch", "11"], "classes_per_batch must"),
        (["--data.samples_per_class", "1"], "samples_per_class must"),
        (["--data.samples_per_class", "1000"], "smallest class"),
        (["--run_dir", "file/run"], "the run's folder file/run cannot be written"),
        (["--run_dir", "used"], "--run_dir used holds a run already: give --ckpt_path last"),
        (["--ckpt_path", "none.ckpt"], "no checkpoint at none.ckpt"),
        (["--ckpt_path", "cut.ckpt"], "checkpoint cut.ckpt cannot be read: cut short"),
        (["--knn.k", "100000"], "k must"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_run_that_cannot_be_is_told_in_a_line(
    words: list[str], message: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    Path("used/checkpoints").mkdir(parents=True)
    Path("cut.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:9999])
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == 1
    line = said(capfd)
    assert line.startswith("simo: error:")
    assert message in line
    assert all(list(folder.iterdir()) for folder in Path("runs").rglob("version_*"))  # none is left empty
