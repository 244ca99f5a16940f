import argparse
import copy
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch
import yaml

from benchmarks import experiments as table_of
from benchmarks import imagenet_model, run, tables, timing, timing_decode, timing_fit, timing_moments, timing_pack
from benchmarks.apart import classes_apart
from benchmarks.experiments import ROOT, SHIPPED, append, experiments, merge, read, read_table
from benchmarks.machine import in_process, memory_mib
from benchmarks.scaling_model import CASES, gather_cost, sums_cost
from benchmarks.train import make_parts
from simo_lightning.data.labels import coarse_index

# Digits with an encoder small enough for a test: 12 batches of 10 x 10 an epoch.
DIGITS: dict[str, Any] = {
    "trainer": {"log_every_n_steps": 1},
    "model": {
        "class_path": "simo_lightning.SimOModule",
        "init_args": {
            "encoder": {
                "class_path": "simo_lightning.ImageEncoder",
                "init_args": {
                    "backbone": "resnet10",
                    "width": 0.125,
                    "stem": "small",
                    "in_channels": 1,
                    "embedding_dim": 16,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW"},
            "lr_scheduler": {"class_path": "simo_lightning.OneCycle"},
        },
    },
    "data": {"class_path": "simo_lightning.DigitsPairDataModule", "init_args": {"samples_per_class": 10}},
}
EVEN_ODD = {"even": ["0", "2", "4", "6", "8"], "odd": ["1", "3", "5", "7", "9"]}
HEAD = {"class_path": "benchmarks.adapters.LinearCrossEntropy", "init_args": {"num_classes": 10, "embedding_dim": 16}}
COLUMNS = {
    "kNN 1": ["test_knn1", 4],
    "kNN 20": ["test_knn20", 4],
    "groups": [["test_groups", "test_alone"], 1],
    "s to 0.80": ["seconds_to_0.80", 0],
    "peak MiB": ["peak_mib_train", 0],
}
STUDIES = {name: read_table()[name]["rows"] for name in read_table()}


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])  # LightningCLI warns of two sources of words


def write_table(folder: Path, **defaults: Any) -> Path:
    """A study of two rows on digits: SimO on coarse classes with snapshots, and cross-entropy."""
    (folder / "digits.yaml").write_text(yaml.safe_dump(DIGITS))
    coarse = {"classes_per_batch": 2, "samples_per_class": 50, "coarse": EVEN_ODD}
    rows = {
        "simo": {"title": "SimO", "data": coarse, "snapshots": 3},
        "head": {"title": "cross-entropy", "loss": HEAD, "mlp": True},
    }
    given = {"epochs": 1, "seeds": [0], "rates": [0.008], **defaults}
    study = {"about": "Digits", "columns": COLUMNS, "sweep": True, "defaults": given, "rows": rows}
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump({"base": "digits.yaml", "studies": {"small": study}}, sort_keys=False))
    return path


def drive(folder: Path, *more: str) -> int:
    return run.main(["small", "--table", str(folder / "table.yaml"), "--out", str(folder / "out"), *more])


def cells(text: str, first: str) -> list[str]:
    """Cells of a table's row after its first."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both rows trained by the command, each in a process of its own."""
    folder = tmp_path_factory.mktemp("study")
    write_table(folder)
    assert drive(folder) == 0
    return folder


# ---- the table of experiments


@pytest.mark.parametrize("study", STUDIES)
def test_every_row_makes_its_parts_and_a_loss_with_a_gradient(study: str) -> None:
    for row in experiments(study):
        job = row.job(1e-3, 3)
        parts = make_parts(job["config"], job["words"])
        data, loss = parts.datamodule, parts.model.loss
        given = job["config"]["data"]["init_args"]
        if given.get("coarse"):
            assert len(set(coarse_index(CIFAR, given["coarse"]).tolist())) == data.classes_per_batch
        assert job["config"]["seed_everything"] == given["seed"] == 3
        if given.get("views", 1) > 1:
            continue  # its loss takes views
        embeddings = torch.randn(40, parts.model.encoder.embedding_dim, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            loss(embeddings, torch.arange(40) % (data.classes_per_batch or 10)), embeddings
        )
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_the_rows_of_few_labels_see_as_many_labelled_images_a_step_and_as_many_in_all() -> None:
    rows = {row.name: row.job(1e-3, 0) for row in experiments("semi")}
    for name, job in rows.items():
        given = job["config"]["data"]["init_args"]
        assert given["samples_per_class"] * given["views"] == 12
        assert (given["unlabelled_per_batch"] > 0) == name.startswith("unlabelled")
    for fraction in ("001", "010"):  # with the unlabelled images a step embeds twice as many
        assert rows[f"alone_longer_{fraction}"]["row"]["steps"] == 2 * rows[f"unlabelled_{fraction}"]["row"]["steps"]


def test_a_digest_tells_configs_apart_but_not_folders_rates_or_seeds(tmp_path: Path) -> None:
    path = write_table(tmp_path)

    def digest(rate: float = 1e-3, seed: int = 0, **given: Any) -> str:
        return str(experiments("small", ["head"], path, **given)[0].job(rate, seed)["row"]["config"])

    assert digest() == digest(2e-3, 1) == digest(words=("--data.data_dir=x",)) == digest(rates=(1.0,), seeds=(5,))
    others = [digest(epochs=2), digest(words=("--model.encoder.width=1",)), digest(mlp=False), digest(snapshots=2)]
    assert len({digest(), *others}) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "study must be one of small, got none"),
        (["small", "--names", "none"], "names of small must be among simo, head, got none"),
        (["small", "--epochs", "0"], "small/simo must have epochs or steps of at least 1, got 0 and None"),
        (["small", "--rates", "0"], "must have seeds and positive rates"),
        (["small", "--epoch", "3"], "unknown: --epoch"),
        (["small", "--table", "none.yaml"], "no table of experiments at none.yaml"),
        ([], "STUDY and --out FOLDER are needed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path)
    monkeypatch.chdir(tmp_path)
    table = [] if "--table" in words else ["--table", "table.yaml"]
    with pytest.raises(SystemExit, match="2"):
        run.main([*words, *table, "--out", "out"] if words else table)
    assert message in capsys.readouterr().err
    write_table(tmp_path, snapshot=3)
    with pytest.raises(ValueError, match="small/simo has unknown keys snapshot"):
        experiments("small", path=tmp_path / "table.yaml")


def test_the_list_names_every_study_and_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES)
    assert run.main(["ablation", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES["ablation"])


# ---- the driver


def test_a_run_is_one_row_with_all_numbers_of_the_true_classes(made: Path) -> None:
    frame = read(made / "out" / "small.csv").set_index("name")
    assert list(frame.index) == ["simo", "head"]
    assert frame["error"].isna().all()
    assert frame["test_knn20"].between(0.15, 1).all()  # 12 steps; chance is 0.1
    assert frame.loc["head", "test_mlp"] > 0.15
    assert pd.isna(frame.loc["simo", "test_mlp"])
    assert (frame[["train_images", "val_images", "test_images"]] == [1295, 143, 359]).all(axis=None)
    assert (frame["images_per_step"] == 100).all()
    assert (frame["peak_mib_start"] > 100).all()
    assert (frame["peak_mib_start"] <= frame["peak_mib_train"]).all()
    assert {"cpu", "torch", "commit", "threads"} <= set(frame)
    taken = read(made / "out" / "small_snapshots.csv")
    assert set(taken["name"]) == {"simo"}
    val = taken[taken["split"] == "val"]
    assert sorted(set(val["step"])) == [0, 6, 12]
    assert set(val["class"]) == {"all", *"0123456789"}
    assert (val[val["class"] != "all"].filter(like="mean_").notna()).all(axis=None)
    each = val[val["class"] != "all"].groupby("step")["knn20"].mean()
    together = val[val["class"] == "all"].set_index("step")["knn20"]
    assert (each - together).abs().max() < 0.05  # classes of nearly equal size


def test_the_table_holds_the_numbers_of_the_csv(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drive(made) == 0
    said = capsys.readouterr().out
    assert said.count("made before") == 2
    frame = read(made / "out" / "small.csv").set_index("name")
    for name, title in (("simo", "SimO"), ("head", "cross-entropy")):
        row = frame.loc[name]
        numbers = [f"{row['test_knn1']:.4f}", f"{row['test_knn20']:.4f}"]
        numbers.append(f"{row['test_groups']:.1f} ({row['test_alone']:.1f})")
        assert cells(said, title) == ["0.008", "1", *numbers, "not reached", f"{row['peak_mib_train']:.0f}"]
        assert cells(said, name) == [f"{row['val_knn20']:.4f}"]


def test_the_best_rate_of_the_sweep_is_run_on_the_other_seeds(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path)
    first = read(made / "out" / "small.csv").query("name == 'head'").to_dict("records")[0]
    runs = {(2e-3, 0): 0.5, (4e-3, 0): 0.75, (8e-3, 0): 0.75, (1.6e-2, 0): None, (4e-3, 1): 0.25, (4e-3, 2): 0.5}
    rows = [
        {**first, "rate": rate, "seed": seed, "val_knn20": knn, "test_knn20": knn} for (rate, seed), knn in runs.items()
    ]
    rows[3]["error"] = "diverged"
    append(tmp_path / "out" / "small.csv", rows)  # all that the command asks for is there, so that it trains nothing
    rates = ["0.002", "0.004", "0.008", "0.016"]
    assert drive(tmp_path, "--names", "head", "--rates", *rates, "--seeds", "0", "1", "2") == 0
    said = capsys.readouterr().out
    asked = re.findall(r"head, lr ([\d.]+), seed (\d): made before", said)
    assert asked == [("0.002", "0"), ("0.004", "0"), ("0.008", "0"), ("0.016", "0"), ("0.004", "1"), ("0.004", "2")]
    mean, std = statistics.fmean([0.75, 0.25, 0.5]), statistics.stdev([0.75, 0.25, 0.5])
    row = cells(said, "cross-entropy")
    assert (row[0], row[1], row[3]) == ("0.004", "3", f"{mean:.4f} ± {std:.4f}")
    assert cells(said, "head") == ["0.5000", "0.7500", "0.7500", "diverged"]


def process_of(line: str) -> int:
    """The process of a run, from the line that the command prints at its start."""
    found = re.search(r"running as process (\d+), log (\S+)", line)
    assert found
    return int(found[1])


@pytest.mark.slow
def test_a_changed_row_is_made_again_alone_also_after_a_kill(made: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path)
    kept = (made / "out" / "small.csv").read_text()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "small.csv").write_text(kept)
    content = yaml.safe_load(table.read_text())
    rows = content["studies"]["small"]["rows"]
    rows["head"]["loss"]["init_args"]["label_smoothing"] = 0.2
    rows["third"] = copy.deepcopy(rows["head"])
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    words = [sys.executable, "-m", "benchmarks.run", "small", "--table", str(table), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as command:
        assert command.stdout is not None
        head = next(line for line in command.stdout if "running" in line)
        os.kill(process_of(head), signal.SIGKILL)
        told = []
        for line in command.stdout:
            told.append(line)
            if "running" in line:  # a row that fails does not stop the next
                command.send_signal(signal.SIGINT)
        said = "".join(told)
    assert command.returncode == 130
    assert "small-head-1-lr0.008-seed0: failed (killed by SIGKILL)" in said
    assert "the same command continues" in said
    third = process_of(next(line for line in told if "running" in line))
    deadline = time.monotonic() + 10
    while Path(f"/proc/{third}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{third}").exists()  # the run does not outlive the command
    assert (tmp_path / "out" / "small.csv").read_text() == kept  # nothing is lost, nothing half a run is added

    del rows["third"]
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    assert drive(tmp_path) == 0
    frame = read(tmp_path / "out" / "small.csv")
    assert list(frame["name"]) == ["simo", "head", "head"]
    assert frame["config"].nunique() == 3
    (_, simo), (_, head) = tables.lines_of(frame, ("simo", "head"))
    assert (len(simo), len(head)) == (1, 1)  # the table judges the latest config


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result_and_one_that_cannot_be_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path)
    assert drive(tmp_path, "--names", "head", "--rates", "1e30") == 1
    said = capsys.readouterr()
    assert "diverged at every learning rate of its sweep" in said.err
    assert cells(said.out, "cross-entropy")[0] == "diverged at every rate"
    assert drive(tmp_path, "--names", "head", "--data.val_fraction", "0") == 1
    assert "the data must have a validation split" in capsys.readouterr().err


# ---- tables and pictures of the CSV files


def test_every_table_of_the_page_is_printed_from_the_shipped_files(capsys: pytest.CaptureFixture[str]) -> None:
    pages = (ROOT / "benchmarks" / "RECIPES.md").read_text() + (ROOT / "benchmarks" / "SPEED.md").read_text()
    commands = re.findall(r"^    python -m benchmarks\.tables ((?:\w+ ?)+)$", pages, flags=re.M)
    assert {name for words in commands for name in words.split()} >= {
        path.stem
        for path in SHIPPED.glob("[!_]*.csv")
        if "snapshots" not in path.stem and not path.stem.startswith("tasks")  # of another command: test_tasks.py
    }
    printed = []
    for words in commands:
        tables.main(words.split())
        printed.append(capsys.readouterr().out)
    lines = {line for text in printed for line in text.splitlines() if line.startswith("|")}
    shown = [line for line in pages.splitlines() if line.startswith("|")]
    assert len(shown) > 100
    assert [line for line in shown if line not in lines] == []


def test_the_page_of_scaling_holds_the_table_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    tables.main(["scaling_model"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scaling.md").read_text()


def test_the_config_of_imagenet_says_what_the_model_counts() -> None:
    comment = "".join(f"# {line}\n" for line in imagenet_model.lines())
    assert comment in (ROOT / "configs" / "imagenet.yaml").read_text()


def test_activations_are_counted_by_hand() -> None:
    """A convolution keeps its input, a batch norm its own and two statistics in float32, a ReLU its output."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    images, pixels = 5, 6 * 6
    kept = 2 * images * pixels * (3 + 4 + 4) + 4 * 2 * 4
    assert imagenet_model.activation_bytes(net, images, 6) == kept


def test_a_spread_over_seeds_leaves_diverged_runs_out_and_undefined_numbers_are_told() -> None:
    frame = read(SHIPPED / "recipes.csv").query("name == 'cross_entropy'").copy()
    content = read_table()["recipes"]
    frame.loc[frame["seed"] == 2, "error"] = "diverged"
    row = tables._cells("cross_entropy", frame, content, several=False)
    good = frame[(frame["rate"] == 0.008) & frame["error"].isna()]["test_knn20"]
    assert row[2] == "2 of 3, others diverged"
    assert row[4] == f"{good.mean():.4f} ± {statistics.stdev(good):.4f}"
    frame.loc[frame["seed"] == 0, "test_knn1"] = None
    assert tables._cells("cross_entropy", frame, content, several=False)[3] == "undefined"
    with pytest.raises(ValueError, match="of the same images"):
        tables.lines_of(frame.assign(checksum=[str(place) for place in range(len(frame))]), ())


def test_pictures_show_the_numbers_of_the_csv(made: Path, tmp_path: Path) -> None:
    knn, cosine, *_ = tables.comparison_figure(["recipes", "recipes_15"]).axes
    frame, names = read(SHIPPED / "recipes.csv"), [tick.get_text() for tick in knn.get_yticklabels()]
    for axes, column in ((knn, "test_knn20"), (cosine, "test_class_cosine")):
        drawn = axes.collections[-1].get_offsets()[names.index("supcon"), 0]
        own = frame[(frame["name"] == "supcon") & (frame["rate"] == 0.008)]
        assert drawn == pytest.approx(own[column].mean())
    words = ["small", "--table", str(made / "table.yaml"), "--out", str(made / "out"), "--rows", "simo"]
    tables.main([*words, "--figures", str(tmp_path), "--plot", str(tmp_path / "small.png")])
    files = {"simo_per_class_knn", "simo_similarity", "small", *(f"simo_scatter_{step:06d}" for step in (0, 6, 12))}
    assert {path.stem for path in tmp_path.glob("*.png")} == files
    assert all(matplotlib.image.imread(path).std() > 0.01 for path in tmp_path.glob("*.png"))
    taken = read(SHIPPED / "paper_longer_snapshots.csv")
    course = taken[(taken["name"] == "paper_olean_100") & (taken["rate"] == 0.002) & (taken["split"] == "val")]
    shown = tables.per_class_figure(course).axes[1]
    names = [tick.get_text() for tick in shown.get_yticklabels()]
    truck = course[course["class"] == "truck"].sort_values("epoch")["knn20"]
    assert shown.images[0].get_array()[names.index("truck")].tolist() == pytest.approx(truck.tolist())


# ---- classes apart


def test_classes_apart_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1] * 9 + [2] * 4 + [3] * 6 + [4] * 8)
    rows = means[labels] + torch.randn(34, 3, generator=generator, dtype=torch.float64)
    accuracy, pairwise, _ = classes_apart(means, rows, labels)
    near = [[float(((row - mean) ** 2).sum()) for mean in means] for row in rows]
    for a in range(5):
        mine = [distances for distances, label in zip(near, labels, strict=True) if label == a]
        assert float(accuracy[a]) == pytest.approx(sum(d[a] == min(d) for d in mine) / len(mine))
        for b in set(range(5)) - {a}:
            its = [distances for distances, label in zip(near, labels, strict=True) if label == b]
            expected = (sum(d[a] < d[b] for d in mine) / len(mine) + sum(d[b] < d[a] for d in its) / len(its)) / 2
            assert float(pairwise[a, b]) == pytest.approx(expected)


def test_merging_connects_and_all_in_one_point_is_one_group() -> None:
    places = torch.tensor([0.0, 1.0, 2.0, 50.0, 60.0, 61.0])[:, None]  # a chain of three, one alone, a pair
    labels = torch.arange(6).repeat_interleave(200)
    rows = places[labels] + torch.randn(1200, 1, generator=torch.Generator().manual_seed(0))
    _, pairwise, groups = classes_apart(places, rows, labels)
    assert groups.tolist() == [0, 0, 0, 1, 2, 2]
    assert pairwise[0, 2] > 0.75  # separated from each other, but both merged with the one between
    assert classes_apart(places, places[labels], labels)[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert classes_apart(torch.zeros(6, 1), torch.zeros(1200, 1), labels)[2].tolist() == [0] * 6
    with pytest.raises(ValueError, match=r"every class of 0..5, got counts \[200, 0"):
        classes_apart(places, rows[:200], labels[:200])


# ---- timings


@pytest.mark.slow
def test_the_loss_is_timed_in_fresh_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = timing.losses(["default", "pml"], [(120, 16, 10)])
    assert [row["loss"] for row in rows] == ["default", "pml"]
    assert all(row["milliseconds"] > 0 and row["peak_mib"] >= 0 for row in rows)
    append(tmp_path / "loss.csv", [{**row, "cpu": "x"} for row in rows])
    tables.main(["loss", "--out", str(tmp_path)])
    ratio = rows[1]["milliseconds"] / rows[0]["milliseconds"]
    assert cells(capsys.readouterr().out, "default")[-1] == (f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}")
    assert timing.losses(["pair", "pml"], [(10**6, 16, 10), (20, 16, 10)]) == []  # too large; fewer than 4 a class


@pytest.mark.slow
def test_peak_memory_is_that_of_the_case_alone() -> None:
    before = bytearray(2**28)  # 256 MiB, in the process that starts the case
    small, large = (in_process(allocate, mib=mib) for mib in (1, 64))
    del before
    assert small < 32
    assert 64 <= large < 96


def allocate(mib: int) -> float:
    before = memory_mib("VmRSS")
    block = torch.ones(mib, 2**18)
    assert block.sum() > 0
    return memory_mib() - before


@pytest.mark.slow
def test_peak_memory_of_many_chunks_is_that_of_a_few() -> None:
    """16 chunks whose matrices have 8 MiB each. 420 MiB where the graph of every chunk is kept, 72 where none is."""
    row = in_process(timing.loss_case, loss="default", rows=16384, dim=16, classes=2000)
    assert row["peak_mib"] < 200


def test_a_profile_names_the_operations_of_the_loss() -> None:
    rows = timing.profile_case(rows=60, dim=4, classes=3, repeats=1)
    assert 0 < sum(row["self_percent"] for row in rows) <= 100.01
    assert any("mm" in row["operation"] for row in rows)


@pytest.mark.slow
def test_a_fit_is_watched_in_its_own_process() -> None:
    words = ["--config", timing_fit.DIGITS, "--model.encoder.width", "0.125", "--trainer.max_epochs", "1"]
    found = timing_fit.simo_fit(*words, "--trainer.accelerator", "cpu", steps=3)
    assert found["ms"] > 0
    assert found["peak_mib"] > 100
    assert len(found["mib"]) == len(found["tensors"])


@pytest.mark.slow
def test_the_loss_of_real_processes_sends_what_the_model_counts() -> None:
    rows = timing_fit.loss_over_ranks(2, steps=1)
    assert [(row["reduce"], row["rows"], row["dim"]) for row in rows] == [
        (reduce, 2 * case[0], case[1]) for case in CASES for reduce in ("gather", "sums")
    ]
    for gather, sums, (own_rows, dim, _, own) in zip(rows[::2], rows[1::2], CASES, strict=True):
        classes = sums["classes"]
        labels = 16 * own + 8  # a label and a count of each class, and how many there are
        # embeddings, all labels, and the gradient of the embeddings of both processes; a length for each
        assert 1e3 * gather["kb"] == own_rows * (4 * dim + 8) + 2 * own_rows * 4 * dim + 16
        # class sums and the sum of the loss, forward and backward; the gradient of the mean term adds nothing
        assert 1e3 * sums["kb"] == labels + 2 * 4 * classes * dim + 2 * 4


def test_class_moments_are_timed_by_size_and_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        timing_moments.sizes_case(5, 4) + timing_moments.former_case(5, 4) + timing_moments.streamed_case(5, 4, 1_000)
    )
    rows += timing_moments.sizes_case(200, 500)  # 400 MB of second moments: above the budget
    rows += timing_moments.callback_case("GeometryMonitor", 5, 4)
    append(tmp_path / "moments.csv", [{**row, "cpu": "x"} for row in rows])
    tables.main(["moments", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| measured | 5 x 4 | 200 x 500 |" in printed
    small, large = cells(printed, "subspace_overlap, s")
    assert float(small) > 0
    assert large == ""
    small, large = (float(value) for value in cells(printed, "all metrics, s"))
    assert 0 < small < large


def test_decoding_is_timed_in_pairs_of_epochs(tmp_path: Path) -> None:
    timing_decode.make_photographs(tmp_path, 16, 48, 32)
    row = timing_decode.decode_case(str(tmp_path), 32, "trivial", workers=1, batch=8, rounds=1)
    assert (row["images"], row["policy"], row["rounds"]) == (16, "trivial", 1)
    assert row["ratio"] == pytest.approx(row["simo_lightning, images/s"] / row["torchvision, images/s"])


@pytest.mark.slow
def test_packing_and_packed_images_are_timed_in_fresh_processes() -> None:
    rows = timing_pack.pack(argparse.Namespace(quick=True))
    assert [(row["pixels"], row["images"]) for row in rows] == [(256, 200), (8, 3_000)]
    for row in rows:
        assert row["pack MB/s"] == pytest.approx(row["mb"] * row["pack"] / row["images"])
        assert row["folder decode CPU us"] > row["folder bytes CPU us"] > 0
        assert row["packed decode CPU us"] > row["packed bytes CPU us"] > 0


def test_a_command_that_fails_is_not_timed() -> None:
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        timing_fit.seconds(["-c", "import sys; sys.exit(3)"], repeats=1)


def test_the_model_counts_each_byte_and_operation() -> None:
    # of 4 ranks each sends 3 of the 4 parts of the embeddings, of the labels, and of the gradient twice
    sent = sum(3 * (5 * 4 + 8) + 2 * 3 * 5 * 4 for _ in range(3))
    products = 1 + 2  # of (N, 5) with (5, 2): forward and backward; a multiplication and an addition each
    assert gather_cost(4, rows=3, dim=5, classes=2, own_classes=1) == (sent, products * 2 * 12 * 5 * 2)
    # a label and a count of each rank's class; the sums forward and backward, each reduced and sent on
    sent = 3 * 16 + 0.75 * 4 * 4 * 2 * 5
    assert sums_cost(4, rows=3, dim=5, classes=2, own_classes=1) == (sent, products * 2 * 3 * 5 * 2)


def test_a_config_over_another_replaces_parts_with_a_class_path_whole() -> None:
    base = {"loss": {"class_path": "X", "init_args": {"a": 1}}, "data": {"init_args": {"b": 1}}}
    before = copy.deepcopy(base)
    assert merge(base, {"loss": {"class_path": "Y"}, "data": {"init_args": {"c": 2}}}) == {
        "loss": {"class_path": "Y"},
        "data": {"init_args": {"b": 1, "c": 2}},
    }
    assert base == before
    assert table_of.PROTOCOL == 3
