import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.recipes.process import RunFailed, run_in_a_process
from benchmarks.recipes.store import write_result
from benchmarks.semi import __main__ as command
from benchmarks.semi.plan import ARMS, CONFIG, TITLES, make_run, read_config
from benchmarks.semi.run import run
from benchmarks.semi.table import markdown
from tests.recipe_parts import DIGITS, write_yaml


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["semi"])  # LightningCLI warns of two sources of words


def small_config(folder: Path) -> Path:
    config = json.loads(json.dumps(DIGITS))
    loss = {"class_path": "simo_lightning.semi_supervised.SemiSupervisedLoss", "init_args": {"num_classes": 10}}
    config["model"]["init_args"]["loss"] = loss
    config["data"]["class_path"] = "simo_lightning.data.SemiSupervisedDigitsPairDataModule"
    config["data"]["init_args"] = {"samples_per_class": 3, "views": 2, "unlabelled_per_batch": 40}
    return write_yaml(folder / "semi.yaml", config)


def made_run(config: Path, arm: str, target: Path, seed: int = 0) -> dict[str, Any]:
    planned = make_run(read_config(config), arm, 0.1, 8e-3, seed, 12)
    write_result(target, run({**planned._asdict(), "digest": planned.digest, "target": str(target)}))
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def test_the_arms_see_as_many_labelled_rows_for_as_many_steps() -> None:
    base = read_config(CONFIG)
    given = base["data"]["init_args"]
    runs = {arm: make_run(base, arm, 0.1, 8e-3, 1, 500) for arm in ARMS}
    for arm, made in runs.items():
        data = made.config["data"]["init_args"]
        assert data["samples_per_class"] * data["views"] == given["samples_per_class"] * given["views"]
        assert (data["label_fraction"], data["seed"], made.config["seed_everything"]) == (0.1, 1, 1)
        assert made.config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 8e-3
        assert (data["unlabelled_per_batch"] > 0) == (arm == "views")
        assert (made.steps == 500) == (arm != "alone_longer")
    assert runs["alone_longer"].steps * runs["alone_longer"].images == 500 * runs["views"].images
    assert runs["alone_augmented"].config["data"]["init_args"]["augment"] == given["augment"]
    assert len({made.digest for made in runs.values()} | {made.name for made in runs.values()}) == 2 * len(ARMS)


def test_a_digest_tells_configs_apart_but_not_folders() -> None:
    base = read_config(CONFIG)
    first = make_run(base, "views", 0.1, 8e-3, 0, 500)
    assert make_run(base, "views", 0.1, 8e-3, 0, 500, ["--data.data_dir=x"]).digest == first.digest
    for other in (
        make_run(base, "views", 0.1, 8e-3, 0, 501),
        make_run(base, "views", 0.1, 8e-3, 0, 500, ["--model.encoder.width=1"]),
        make_run(base, "views", 0.2, 8e-3, 0, 500),
    ):
        assert other.digest != first.digest


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": "both"}, "arm must be one of alone, .*got 'both'"),
        ({"fraction": 1.0}, r"fraction must lie in \(0, 1\), got 1.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given = {"base": read_config(CONFIG), "arm": "views", "fraction": 0.1, "rate": 1e-3, "seed": 0, "steps": 1}
    with pytest.raises(ValueError, match=message):
        make_run(**{**given, **change})


def test_a_config_says_its_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config at none\.yaml"):
        read_config(Path("none.yaml"))
    content = yaml.safe_load(CONFIG.read_text())
    del content["data"]["init_args"]["views"]
    with pytest.raises(ValueError, match=r"must say data\.init_args\.views as a number, got None"):
        read_config(write_yaml(tmp_path / "x.yaml", content))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, a tenth of the labels, twelve steps; with the unlabelled images and without."""
    folder = tmp_path_factory.mktemp("semi")
    config = small_config(folder)
    words, sys.argv = sys.argv, ["semi"]
    try:
        name = make_run(read_config(config), "alone", 0.1, 8e-3, 0, 12).name
        made_run(config, "alone", folder / "out" / "results" / f"{name}.json")
        own = ["--fractions", "0.1", "--seeds", "0", "--steps", "12", "--arms", "views"]
        assert command.main(["--config", str(config), "--out", str(folder / "out"), *own]) == 0  # a process of its own
    finally:
        sys.argv = words
    return folder


def test_a_run_is_judged_by_its_labelled_images_alone(made: Path) -> None:
    for arm in ("alone", "views"):
        (path,) = (made / "out" / "results").glob(f"{arm}-*.json")
        result = json.loads(path.read_text())
        assert result["data"] == {"labelled": 129, "val": 143, "test": 359}
        assert result["steps"] == 12
        assert result["images"] == {"alone": 60, "views": 140}[arm]
        assert 0.25 < result["metrics"]["val"]["knn20"] <= 1  # chance is 0.1
        assert {"knn20", "linear", "orthogonality"} <= result["metrics"]["test"].keys()
        assert 0 < result["seconds"]["train"] < result["seconds"]["all"]


def test_the_command_goes_on_and_prints_its_table(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    words = ["--config", "semi.yaml", "--out", "out", "--fractions", "0.1", "--seeds", "0", "--steps", "12"]
    assert command.main([*words, "--arms", "alone", "views"]) == 0  # all that it asks for is there
    assert capsys.readouterr().out.count("made before") == 2
    table = (made / "out" / "table.md").read_text()
    for arm, images in (("alone", 60), ("views", 140)):
        (path,) = (made / "out" / "results").glob(f"{arm}-*.json")
        test = json.loads(path.read_text())["metrics"]["test"]
        row = f"| 0.1 | {TITLES[arm]} | 0.008 | 1 | 12 x {images} | {test['knn20']:.4f} | {test['linear']:.4f} |"
        assert row in table
    assert command.main(["--out", "out", "--table"]) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit):
        command.main([*words, "--step", "3"])
    assert "unknown: --step" in capsys.readouterr().err


def test_a_run_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    target = tmp_path / "results" / "x.json"
    log = tmp_path / "logs" / "x.log"
    with pytest.raises(RunFailed, match=r"x: failed \(status 1\): .*No module named no_such_module.*x\.log"):
        run_in_a_process("no_such_module", {}, target, log)
    with pytest.raises(RunFailed, match=r"x: failed \(status 0\)"):
        run_in_a_process("json.tool", {"target": 1}, target, log)  # ends well, but leaves no file


def test_a_changed_config_is_made_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (made / "out" / "results").glob("views-*.json")
    planned = make_run(read_config(made / "semi.yaml"), "views", 0.1, 8e-3, 0, 12)
    target = tmp_path / "results" / path.name
    write_result(target, json.loads(path.read_text()) | {"digest": "other"})

    def refuse(*_: Any) -> None:
        raise RunFailed("asked for")

    monkeypatch.setattr(command, "run_in_a_process", refuse)
    with pytest.raises(RunFailed, match="asked for"):
        command.ensure(planned, tmp_path)
    assert [file.name for file in (tmp_path / "stale").iterdir()] == [f"{path.stem}-other.json"]
    assert not target.exists()


def test_the_table_spreads_over_seeds_and_takes_the_best_rate(made: Path) -> None:
    (path,) = (made / "out" / "results").glob("views-*.json")
    runs = []
    for rate, seed, knn in ((8e-3, 0, 0.5), (4e-3, 0, 0.75), (4e-3, 1, 0.25), (4e-3, 2, None)):
        result = json.loads(path.read_text()) | {"rate": rate, "seed": seed}
        if knn is None:
            result["metrics"] = None
        else:
            result["metrics"]["val"]["knn20"] = result["metrics"]["test"]["knn20"] = knn
        runs.append(result)
    assert "| 0.004 | 2 | 12 x 140 | 0.5000 ± 0.3536 |" in markdown(runs)
    with pytest.raises(ValueError, match="no finished run"):
        markdown([])
