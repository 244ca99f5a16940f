import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from simo_lightning.checkpoints import load_encoder
from simo_lightning.cli import SimoCLI, main
from tests.digits_run import QUIET, ROOT, SIMO, SMALL, assert_equal_weights, copy_of, fit, rows, weights

# cifar10_lars.yaml needs an extra: tests/test_lars.py
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "cifar10_lars")


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_writes_config_metrics_events_checkpoints_and_plots(digits_run: Path) -> None:
    assert yaml.safe_load((digits_run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert len(list(digits_run.glob("events.out.tfevents.*"))) == 1
    assert sorted(path.name for path in (digits_run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    logged = {name for row in rows(digits_run) for name, value in row.items() if value}
    assert {"train/loss", "train/images_per_second", "val/knn", "val/class_cosine", "val/effective_rank"} <= logged


def test_a_metric_of_every_second_epoch_gives_its_checkpoint_in_the_second(tmp_path: Path) -> None:
    folder = tmp_path / "rare"
    fit("--run_dir", str(folder), "--knn.every_n_epochs", "2", epochs=2)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 1  # the first epoch has no val/knn


def test_a_metric_that_is_never_logged_has_no_best_checkpoint_and_is_named(tmp_path: Path) -> None:
    words = ["--run_dir", str(tmp_path / "typo"), "--knn.every_n_epochs", "2", "--best.monitor", "val/typo"]
    with pytest.warns(UserWarning, match="no best.ckpt was written: val/typo was never logged"):
        fit(*words)
    with pytest.raises(SystemExit):  # the second epoch evaluates, and still has no such metric
        fit(*words, "--ckpt_path", "last", epochs=3)


def test_new_runs_get_new_folders_and_a_resumed_one_keeps_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    root = Path("runs/digits")
    fit("--ckpt_path", "last")  # the first start of a job that may be restarted: no checkpoint yet
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


def test_a_run_killed_in_the_middle_resumes_to_the_same_weights(digits_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = start(folder)
    wait_for(folder / "checkpoints" / "last.ckpt", process)  # one of two epochs is done
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    fit("--run_dir", str(folder), "--ckpt_path", "last", epochs=2)
    assert_equal_weights(folder / "checkpoints" / "last.ckpt", digits_run / "checkpoints" / "last.ckpt")


def test_ctrl_c_saves_last_and_the_run_resumes_to_the_same_weights(digits_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = start(folder)
    wait_for(folder / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1].decode()
    assert process.returncode != 0
    assert "Traceback" not in error
    assert "resume with --ckpt_path" in error
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 12 < step < 24  # in the middle of the second epoch
    fit("--run_dir", str(folder), "--ckpt_path", "last", epochs=2)
    assert_equal_weights(folder / "checkpoints" / "last.ckpt", digits_run / "checkpoints" / "last.ckpt")


def test_validate_test_and_predict_from_a_checkpoint(digits_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = copy_of(digits_run)
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
        assert file["known_classes"].tolist() == [str(digit) for digit in range(10)]
        means = load_encoder(best).classes.means.numpy()
        cosines = file["embeddings"] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        assert (file["nearest"] == cosines.argmax(axis=1)).mean() > 0.99  # ties by rounding
        assert (file["nearest"] == file["labels"]).mean() > 0.5
        np.testing.assert_allclose(file["shares"].sum(axis=1) + file["rest"], 1, atol=1e-5)


def test_a_probe_of_the_encoder(digits_run: Path) -> None:
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
    checkpoint = digits_run / "checkpoints" / "best.ckpt"
    main(["fit", "--config", "probe.yaml", "--model.checkpoint", str(checkpoint), "--run_dir", "probe"])
    trained = weights(Path("probe/checkpoints/best.ckpt"))
    for name, weight in weights(checkpoint).items():
        assert torch.equal(weight, trained[name]), f"{name} of the frozen encoder moved"
    accuracy = [float(row["val/accuracy"]) for row in rows(Path("probe")) if row["val/accuracy"]]
    assert accuracy[-1] > 0.2


class ParseOnly(SimoCLI):
    """Makes all parts, runs nothing."""

    last: Any = None

    def _run_subcommand(self, subcommand: str) -> None:
        ParseOnly.last = self


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ParseOnly]:
    """The command up to where it would run."""

    def parsed(*words: str) -> ParseOnly:
        with monkeypatch.context() as patch:
            patch.setattr("simo_lightning.cli.SimoCLI", ParseOnly)
            main([*words, "--trainer.accelerator", "cpu"])
        found: ParseOnly = ParseOnly.last
        return found

    return parsed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_its_parts(config: Path, digits_run: Path, parse: Callable[..., ParseOnly]) -> None:
    words = ["fit", "--config", str(config)]
    if config.stem.endswith("probe"):
        words += ["--model.checkpoint", str(digits_run / "checkpoints" / "best.ckpt")]
    if config.stem in ("imagenet", "photos", "photos_cpu", "tiny_imagenet", "unseen"):  # without a default folder
        words += ["--data.data_dir", "photos"]
    if config.stem == "photos":  # without network
        settings = yaml.safe_load(config.read_text())["model"]
        settings["init_args"]["encoder"]["init_args"]["weights"] = None
        Path("offline.yaml").write_text(yaml.safe_dump({"model": settings}))
        words += ["--config", "offline.yaml"]
    parse(*words)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("model.encoder.weights", "encoder"),
        ("model.encoder.stem", "encoder"),
        ("model.parameter_groups.norm_weight_decay", "parameter_groups"),
    ],
)
def test_null_on_the_command_line_is_none(option: str, part: str, parse: Callable[..., ParseOnly]) -> None:
    """jsonargparse makes the word None of a null that is two classes deep."""
    name = option.rsplit(".", 1)[1]
    groups = ["--model.parameter_groups.norm_weight_decay", "0.1"]
    config = parse("fit", *SMALL, *groups, f"--{option}", "null").config["fit"].model.init_args[part]
    assert config.get("init_args", config)[name] is None


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
def test_a_wrong_argument_is_reported_in_one_line(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in last_line(capfd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.classes_per_batch", "11"], "classes_per_batch must"),
        (["--data.samples_per_class", "1"], "samples_per_class must"),
        (["--data.samples_per_class", "1000", "--data.small_classes", "error"], "smallest class"),
        (["--run_dir", "file/run"], "the run's folder file/run cannot be written"),
        (["--run_dir", "used"], "--run_dir used holds a run already: pass --ckpt_path last"),
        (["--ckpt_path", "none.ckpt"], "no checkpoint at none.ckpt"),
        (["--ckpt_path", "cut.ckpt"], "checkpoint cut.ckpt cannot be read: it is cut short"),
        (["--knn.k", "100000"], "k must"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_run_that_cannot_be_is_reported_in_one_line(
    words: list[str], message: str, digits_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    Path("used/checkpoints").mkdir(parents=True)
    Path("cut.ckpt").write_bytes((digits_run / "checkpoints" / "last.ckpt").read_bytes()[:9999])
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == 1
    line = last_line(capfd)
    assert line.startswith("simo: error:")
    assert message in line
    assert not list(Path("runs").glob("*/*"))  # nothing was trained, and a start that failed leaves nothing


def test_a_home_is_expanded_in_every_path(
    digits_run: Path, monkeypatch: pytest.MonkeyPatch, parse: Callable[..., ParseOnly]
) -> None:
    run, home = copy_of(digits_run), Path("home").absolute()
    home.mkdir()
    (home / "one.yaml").write_bytes((ROOT / "configs" / "digits.yaml").read_bytes())
    monkeypatch.setenv("HOME", str(home))
    assert parse("fit", "--config", "~/one.yaml", "--run_dir", "~/my run").run_dir == home / "my run"
    assert parse("fit", "--config", "~/one.yaml", "--trainer.default_root_dir", "~/all").run_dir.is_relative_to(home)
    words = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "~/logs", "--plots.dirname", "~/plots"]
    cli = parse("fit", *SMALL, *words)
    assert Path(cli.trainer.loggers[0].log_dir).is_relative_to(home / "logs")
    assert cli.config.fit.plots.init_args.dirname == str(home / "plots")
    run.rename(home / "run")
    last = parse("plot", *SMALL, "--ckpt_path", "~/run/checkpoints/last.ckpt", "--out", "~/page").config.plot
    assert (last.ckpt_path, last.out) == (str(home / "run/checkpoints/last.ckpt"), str(home / "page"))
    probe = ["--model", "simo_lightning.ProbeModule", "--model.checkpoint", "~/run/checkpoints/best.ckpt"]
    probe += ["--model.num_classes", "10", "--data", "simo_lightning.DigitsPairDataModule"]
    parse("fit", *probe, "--data.samples_per_class", "10", "--best.monitor", "val/accuracy")
    assert not Path("~").exists()


def test_the_root_of_the_runs_can_be_named(parse: Callable[..., ParseOnly]) -> None:
    cli = parse("fit", *SMALL, "--trainer.default_root_dir", "elsewhere")
    assert cli.run_dir == Path("elsewhere/runs/digits/version_0")
    assert cli.trainer.default_root_dir == "elsewhere/runs/digits/version_0"
    assert not Path("runs").exists()


def test_every_command_takes_a_runs_own_config(digits_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = copy_of(digits_run)
    config = ["--config", str(run / "config.yaml"), *QUIET]
    knn = {name: value for row in rows(run) for name, value in row.items() if name == "val/knn" and value}
    main(["validate", *config])  # of the best weights, not of new ones
    assert f"{float(max(knn.values())):.4f}"[:5] in capfd.readouterr().out
    main(["test", *config])
    assert "test/knn" in capfd.readouterr().out
    main(["predict", *config])
    assert (run / "predictions" / "embeddings.npz").is_file()
    main(["plot", *config, "--projections", "[pca]"])
    assert f"report      {run}/plots/report/index.html" in capfd.readouterr().out
    main(["fit", *config, "--trainer.max_epochs", "1", "--plots", "null"])  # a new run with the same settings
    assert Path("runs/digits/version_0/checkpoints/last.ckpt").is_file()


def test_every_command_takes_what_print_config_of_another_printed(
    digits_run: Path, capsys: pytest.CaptureFixture[str], parse: Callable[..., ParseOnly]
) -> None:
    run = copy_of(digits_run)
    commands = ["fit", "validate", "test", "predict", "plot"]
    for printed in commands:
        with pytest.raises(SystemExit) as stop:
            main([printed, *SMALL, "--print_config"])
        assert stop.value.code == 0
        Path(f"{printed}.yaml").write_text(capsys.readouterr().out)
    for command, printed in zip(commands, [*commands[1:], commands[0]], strict=True):
        cli = parse(command, "--config", f"{printed}.yaml", "--run_dir", str(run), "--ckpt_path", "last")
        assert cli.config[command].model.init_args.encoder.init_args.width == 0.125
    assert parse("plot", "--config", "fit.yaml", "--run_dir", str(run)).config.plot.ckpt_path.endswith("best.ckpt")


def test_a_misspelt_key_of_a_config_is_refused(digits_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((digits_run / "config.yaml").read_text())
    Path("wrong.yaml").write_text(yaml.safe_dump({**config, "weights_onyl": True}))
    with pytest.raises(SystemExit) as stop:
        main(["plot", "--config", "wrong.yaml"])
    assert stop.value.code == 2
    assert "weights_onyl" in last_line(capfd)


def test_checkpoints_loggers_and_every_callback_can_be_switched_off(capfd: pytest.CaptureFixture[str]) -> None:
    off = ["best", "last", "knn", "retrieval", "unknown", "probe", "geometry", "alarm", "plots"]
    words = [word for name in off for word in (f"--{name}", "null")]
    fit(*words, "--trainer.logger", "false", "--run_dir", "off")
    assert "--last null: no last.ckpt is written, so a run that ends early cannot be resumed" in capfd.readouterr().out
    assert [path.name for path in Path("off").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("option", ["--trainer.enable_checkpointing=false", "--trainer.barebones=true"])
def test_a_run_without_checkpoints(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    fit(option, "--plots=null", "--run_dir", "bare", *(["--trainer.max_steps", "3"] if "bare" in option else []))
    assert "cannot be resumed" in capfd.readouterr().out
    assert not list(Path("bare").rglob("*.ckpt"))
    assert ("metrics.csv" in {path.name for path in Path("bare").iterdir()}) == ("checkpointing" in option)


def test_a_trial_run_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.fast_dev_run", "1", "--plots.every_n_epochs", "1")
    assert not Path("runs").exists()
    fit("--trainer.fast_dev_run", "1", "--run_dir", "named")
    assert not Path("named").exists()


BROKEN = """
import simo_lightning

class Broken(simo_lightning.SimOModule):
    def training_step(self, batch, batch_idx):
        raise {error}
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt_path", "last.ckpt", "--model.encoder.width", "0.25"], "last.ckpt does not fit"),
        (["--ckpt_path", "weights.ckpt"], "--ckpt_path weights.ckpt must hold the state of a run"),
        (["--trainer.limit_train_batches", "0"], "limit_train_batches must not be 0, or nothing is trained, got 0"),
        (["--knn.every_n_epochs=2", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/knn"],
         "Early stopping conditioned on metric `val/knn` which is not available"),
        (["--trainer.callbacks", "LearningRateFinder"], "learning rate"),
        (["--knn", "null", "--best.monitor", "val/knn"], "--best monitors val/knn, which --knn null switches off"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate: -1"),
    ],
    ids=["wrong shape", "weights only", "nothing to train", "early stopping", "rate finder", "no metric", "rate"],
)  # fmt: skip
def test_what_a_user_causes_is_reported_in_one_line(
    words: list[str], message: str, digits_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("last.ckpt").write_bytes((digits_run / "checkpoints" / "last.ckpt").read_bytes())
    torch.save({"state_dict": weights(Path("last.ckpt")), "epoch": 1, "global_step": 24}, "weights.ckpt")
    with pytest.raises(SystemExit) as stop:
        fit(*words, epochs=3)
    assert stop.value.code == 1
    line = last_line(capfd)
    assert line.startswith("simo: error:")
    assert message in line


@pytest.mark.parametrize("error", ["RuntimeError('mine')", "ValueError('mine')", "KeyError('mine')"])
def test_an_error_in_a_users_own_code_keeps_its_traceback(
    error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN.format(error=error))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(Exception, match="mine") as caught:
        fit("--model", "broken.Broken", "--model.encoder", "ImageEncoder", "--model.encoder.in_channels", "1")
    assert type(caught.value).__name__ == error.partition("(")[0]
    assert not Path("runs").exists()
