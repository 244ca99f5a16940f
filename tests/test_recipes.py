import copy
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks.recipes.picture import comparison_figure
from benchmarks.recipes.plan import recipe_names
from benchmarks.recipes.store import path_of, read_results, write_result
from benchmarks.recipes.table import COLUMNS, markdown
from tests.recipe_parts import DIGITS, write_yaml

ROOT = Path(__file__).parent.parent
HEAD = "benchmarks.adapters.LinearCrossEntropy"


def overlay(loss: str, **arguments: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"loss": {"class_path": loss, "init_args": arguments}}}}


def write_recipes(folder: Path, smoothing: float = 0.1) -> None:
    write_yaml(folder / "digits.yaml", DIGITS)
    write_yaml(folder / "simo.yaml", {"title": "SimO", "rates": [8e-3], **overlay("simo_lightning.SimOLoss")})
    head = overlay(HEAD, num_classes=10, embedding_dim=16, label_smoothing=smoothing)
    write_yaml(folder / "head.yaml", {"title": "cross-entropy", "rates": ["8e-3"], **head})


def words(*more: str) -> list[str]:
    files = ["--base", "digits.yaml", "--recipes", "simo.yaml", "head.yaml", "--out", "out"]
    return [sys.executable, "-m", "benchmarks.recipes", *files, "--seeds", "0", "--epochs", "1", *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def call(folder: Path, *more: str, status: int = 0) -> str:
    done = subprocess.run(words(*more), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes"])  # LightningCLI warns of two sources of words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes trained by the command, at one learning rate and seed: each run costs its imports."""
    folder = tmp_path_factory.mktemp("recipes")
    write_recipes(folder)
    call(folder)
    return folder


@pytest.fixture
def results(made: Path) -> list[dict[str, Any]]:
    return read_results(made / "out")


def cells(table: str, title: str) -> list[str]:
    """Cells of a table's row after its first."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_run_leaves_one_whole_file(made: Path, results: list[dict[str, Any]]) -> None:
    names = ["head-1e-lr0.008-seed0.json", "simo-1e-lr0.008-seed0.json"]
    assert sorted(path.name for path in (made / "out" / "results").iterdir()) == names
    for result in results:
        assert result["metrics"]["test"].keys() == {key for _, key, _ in COLUMNS}
        assert all(isinstance(value, float) for value in result["metrics"]["test"].values())
        assert 0.3 < result["metrics"]["test"]["knn20"] <= 1  # 12 steps; chance is 0.1
        assert {"train": 1295, "val": 143, "test": 359}.items() <= result["data"].items()
        assert result["config"]["model"]["init_args"]["optimizer"]["init_args"]["lr"] == result["rate"]
        assert result["config"]["seed_everything"] == result["config"]["data"]["init_args"]["seed"] == 0
        assert result["config"]["trainer"]["max_epochs"] == result["epochs"] == 1
        assert 100 < result["peak_mib_start"] <= result["peak_mib_train"] <= result["peak_mib"]
        assert 0 < result["seconds"]["train"] < result["seconds"]["all"]
        assert {"python", "torch", "lightning", "pytorch-metric-learning"} <= result["versions"].keys()
        assert result["hardware"]["cpu"]
        assert result["threads"] == 1


def test_the_table_says_what_the_files_say(made: Path, results: list[dict[str, Any]]) -> None:
    table = (made / "out" / "table.md").read_text()
    assert call(made, "--table") == table
    for title, name, run in zip(("cross-entropy", "SimO"), ("head", "simo"), results, strict=True):
        rate, seeds, *numbers = cells(table, title)
        assert (rate, seeds) == ("0.008", "1")
        expected = [f"{run['metrics']['test'][key]:.{digits}f}" for _, key, digits in COLUMNS]
        expected += [f"{run['metrics']['val']['knn20']:.4f}", f"{run['seconds']['train']:.1f}"]
        assert numbers == [*expected, f"{run['peak_mib_train']:.0f}"]
        assert cells(table, name) == [f"{run['metrics']['val']['knn20']:.4f}"]
    assert "validation split" in table


def test_the_table_spreads_over_seeds_and_leaves_diverged_runs_out(results: list[dict[str, Any]]) -> None:
    runs = [copy.deepcopy(results[0]) for _ in range(4)]
    values = [0.5, 0.625, 0.875]
    for seed, (run, value) in enumerate(zip(runs, [*values, None], strict=True)):
        run["seed"] = seed
        if value is None:
            run["metrics"], run["error"] = None, "diverged"
        else:
            run["metrics"]["test"]["knn20"] = value
    row = cells(markdown(runs), "cross-entropy")
    assert row[1] == "3 of 4, others diverged"
    assert row[3] == f"{sum(values) / 3:.4f} ± {statistics.stdev(values):.4f}"
    runs[0]["metrics"]["test"]["knn1"] = None
    assert cells(markdown(runs), "cross-entropy")[2] == "undefined"
    for run in runs:
        run["metrics"] = None
    assert "diverged at every rate" in cells(markdown(runs), "cross-entropy")


@pytest.mark.parametrize(("key", "value"), [("digest", "other"), ("data", {"train": 1})])
def test_the_table_does_not_mix_what_differs(results: list[dict[str, Any]], key: str, value: Any) -> None:
    other = {**results[0], "seed": 1, key: value}
    with pytest.raises(ValueError, match="must be of"):
        markdown([results[0], other])


def test_the_picture_shows_what_the_table_says(results: list[dict[str, Any]]) -> None:
    runs = [copy.deepcopy(result) for result in (*results, *results)]
    values = {"head": [0.5, 0.75], "simo": [0.875, 0.625]}
    for place, run in enumerate(runs):
        run["seed"] = place // 2
        run["metrics"]["test"]["knn20"] = values[run["recipe"]][run["seed"]]
    diverged = {**results[0], "recipe": "lost", "metrics": None}
    longer = {**results[0], "epochs": 2}
    figure = comparison_figure([*runs, diverged, longer])
    knn, cosine, later, _ = figure.axes
    assert [axes.get_xlabel() for axes in (knn, cosine)] == ["test kNN(20)", "mean |cosine|"]
    assert [tick.get_text() for tick in knn.get_yticklabels()] == ["head", "simo"]
    for place, name in enumerate(("head", "simo")):
        line, _, (bar,) = knn.containers[place].lines
        assert line.get_xydata().tolist() == [[statistics.fmean(values[name]), place]]
        spread = statistics.stdev(values[name])
        ends = [statistics.fmean(values[name]) - spread, statistics.fmean(values[name]) + spread]
        assert bar.get_segments()[0][:, 0].tolist() == pytest.approx(ends)
        expected = statistics.fmean(run["metrics"]["test"]["orthogonality"] for run in runs if run["recipe"] == name)
        assert cosine.containers[place].lines[0].get_xdata()[0] == pytest.approx(expected)
    assert later.get_title(loc="left") == "2 epochs"
    assert [tick.get_text() for tick in later.get_yticklabels()] == ["head"]
    with pytest.raises(ValueError, match="no finished run with numbers"):
        comparison_figure([diverged])


def test_the_command_draws(made: Path) -> None:
    call(made, "--table", "--plot", "pictures/table.png")
    assert matplotlib.image.imread(made / "pictures" / "table.png").shape[1] == 800


def test_settings_get_tables_of_their_own(results: list[dict[str, Any]]) -> None:
    longer = {**results[0], "epochs": 2}
    table = markdown([*results, longer])
    assert table.index("## 1 epoch\n") < table.index("## 2 epochs\n")


def test_a_second_call_makes_nothing_again(made: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (made / "out" / "results").iterdir()}
    assert call(made).count("made before") == 2
    assert {path: path.stat().st_mtime_ns for path in (made / "out" / "results").iterdir()} == files


def test_the_best_rate_of_the_sweep_is_run_on_the_other_seeds(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (first,) = [result for result in read_results(tmp_path / "out") if result["recipe"] == "simo"]
    runs = {(2e-3, 0): 0.5, (4e-3, 0): 0.75, (8e-3, 0): 0.625, (4e-3, 1): 0.25, (4e-3, 2): 0.5, (8e-3, 1): 0.99}
    for (rate, seed), knn in runs.items():  # all that the call asks for is there, so that it trains nothing
        run = {**copy.deepcopy(first), "rate": rate, "seed": seed}
        run["metrics"]["val"]["knn20"] = knn
        write_result(path_of(tmp_path / "out", "simo", 1, rate, seed), run)
    said = call(tmp_path, "--recipes", "simo.yaml", "--rates", "8e-3", "2e-3", "4e-3", "--seeds", "0", "1", "2")
    asked = re.findall(r"\[(\d)/5\] simo, lr ([\d.]+), seed (\d): .* made before", said)
    assert asked == [
        (str(n + 1), f"{rate:g}", str(seed))
        for n, (rate, seed) in enumerate([(2e-3, 0), (4e-3, 0), (8e-3, 0), (4e-3, 1), (4e-3, 2)])
    ]
    assert cells(said, "SimO")[:2] == ["0.004", "3"]
    assert cells(said, "SimO")[11] == "0.5000 ± 0.2500"
    assert cells(said, "simo") == ["0.5000", "0.7500", "0.6250"]


def test_a_changed_recipe_alone_is_made_again_also_after_a_kill(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "results").glob("simo-*")}
    write_recipes(tmp_path, smoothing=0.2)
    with subprocess.Popen(
        words(), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as command:
        assert command.stdout is not None
        line = next(line for line in command.stdout if "running" in line)
        log = tmp_path / "out" / "logs" / "head-1e-lr0.008-seed0.log"
        for _ in range(1200):
            if "train_dataloader" in log.read_text():  # it trains
                break
            time.sleep(0.05)
        found = re.search(r"process (\d+)", line)
        assert found
        os.kill(int(found.group(1)), signal.SIGKILL)
        said = command.stdout.read()
    assert command.returncode == 1
    assert "killed by SIGKILL" in said
    assert sorted((tmp_path / "out" / "results").iterdir()) == sorted(kept)
    assert len(list((tmp_path / "out" / "stale").glob("head-*.json"))) == 1

    said = call(tmp_path)
    assert said.count("made before") == 1
    assert {path: path.read_bytes() for path in kept} == kept
    again = json.loads((tmp_path / "out" / "results" / "head-1e-lr0.008-seed0.json").read_text())
    assert again["config"]["model"]["init_args"]["loss"]["init_args"]["label_smoothing"] == 0.2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipes", "none"], "got none"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--rates", "0"], "rates must be positive"),
        (["--epoch", "3"], "unknown: --epoch"),
        (["--recipes", "head.yaml", "head.yaml"], "different names"),
        (["--base", "none.yaml"], "no config at none.yaml"),
        (["--table", "--out", "none"], "no finished run"),
        (["--plot", "table.txt"], "--plot: must end in one of .png, .svg, .pdf, got table.txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_told(more: list[str], message: str, tmp_path: Path) -> None:
    write_recipes(tmp_path)
    assert message in call(tmp_path, *more, status=2)


def test_the_list_names_every_recipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.recipes", "--list"]
    said = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in said.splitlines()] == recipe_names()
