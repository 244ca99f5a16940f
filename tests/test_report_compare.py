"""``simo compare``: what it reads, what it writes, and what it says where something is missing."""

import json
import math
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from simo_lightning.cli import main
from simo_lightning.report import load_record, write_comparison, write_report
from simo_lightning.report.compare import best_of, flat_settings
from simo_lightning.report.curves import read_curves
from tests.test_report import Data, Foreign, Nesting, Page, pictures, trainer


def make_run(folder: Path, seed: int, lr: float, data: pl.LightningDataModule | None = None, **named) -> Path:
    """A run as it lies on disk: a report, metrics.csv and config.yaml."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    write_report(
        trainer(default_root_dir=folder), Foreign(), data or Data(), None, projections=["pca"], queries=0, **named
    )
    lines = ["epoch,step,train/loss,val/knn", f"0,9,{2 + lr},", "0,10,,0.25", "1,19,1.5,", f"1,20,,{lr}", "1,20,,nan"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    config = {"model": {"class_path": "Foreign", "init_args": {"lr": lr, "depth": 2}}, "seed_everything": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name, seed, lr) for name, seed, lr in (("slow", 0, 0.5), ("<fast>", 1, 0.75))]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_comparison(runs, tmp_path_factory.mktemp("out") / "compare.html"))


def test_the_page_has_the_numbers_of_both_reports_and_marks_the_best(page: Page, runs: list[Path]):
    records = [load_record(run / "plots" / "report") for run in runs]
    for place, row in enumerate(records[0].rows):
        both = [row.value, records[1].rows[place].value]
        if any(map(math.isnan, both)):
            continue
        texts = [text for text in page.texts[page.texts.index(row.name) :] if text and text != "best"]
        shown = [text.removesuffix(" ★") for text in texts[2:4]]
        assert [float(text) for text in shown] == pytest.approx(both, rel=1e-3), row.name
        expected = [value == max(both) if row.better == "higher" else value == min(both) for value in both]
        if row.better == "neither" or both[0] == both[1]:
            expected = [False, False]
        assert [text.endswith("★") for text in texts[2:4]] == expected, row.name


def test_the_page_has_curves_matrices_maps_and_settings(page: Page):
    assert len(pictures(page)) == 5
    alts = [image["alt"] or "" for image in page.all("img")]
    assert "train/loss from 2.5 to 1.5, val/knn from 0.25 to 0.5" in alts[0]
    assert "train/loss from 2.75 to 1.5, val/knn from 0.25 to 0.75" in alts[0]
    assert [alt.split(":")[0] for alt in alts[1:]] == ["slow", "<fast>"] * 2
    assert page.after("model.lr") == "0.5"
    assert "model.depth" not in page.texts  # the same in both
    assert "seed_everything" not in page.texts


def test_the_page_stands_alone_and_is_valid(page: Page):
    Nesting().check(page.source)
    assert page.all("script") == page.all("link") == []
    for word in ("http:", "https:", "file:", "url(", str(page.path.parent), "<fast>"):
        assert word not in page.source, word


def test_the_command(runs: list[Path], capsys: pytest.CaptureFixture[str]):
    main(["compare", str(runs[0]), str(runs[1] / "plots" / "report"), "--out", "new/page.html"])
    assert capsys.readouterr().out == "comparison  new/page.html\n"
    page = Page(Path("new/page.html"))
    assert len(pictures(page)) == 5
    assert page.after("Number") == "slow"
    assert "report" in page.texts


def test_a_run_without_a_report_is_named_with_the_command(runs: list[Path], capsys: pytest.CaptureFixture[str]):
    for name in ("one", "two"):
        Path(name).mkdir()
        shutil.copy(runs[0] / "config.yaml", name)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "one", str(runs[0]), "two"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for name in ("one", "two"):
        assert f"{name} has no report, simo plot --config {name}/config.yaml --run_dir {name} makes it" in error


def test_wrong_arguments_are_reported(runs: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match="runs must be at least two to be compared, got 1"):
        write_comparison(runs[:1], "x.html")
    with pytest.raises(ValueError, match="runs must be different folders"):
        write_comparison([runs[0], runs[0]], "x.html")
    with pytest.raises(FileNotFoundError, match="no run at none"):
        write_comparison([runs[0], "none"], "x.html")
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is neither a run nor a report"):
        write_comparison([runs[0], tmp_path / "empty"], "x.html")
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    path = other / "plots" / "report" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stage": "test"}))
    with pytest.raises(ValueError, match="reports must be of the same split to be compared, got val in slow, test in"):
        write_comparison([runs[0], other], "x.html")
    assert not Path("x.html").exists()


@pytest.mark.parametrize(
    ("values", "better", "expected"),
    [
        ([1.0, 2.0], "higher", [False, True]),
        ([1.0, 2.0], "lower", [True, False]),
        ([1.0, 2.0], "neither", [False, False]),
        ([1.0, 1.0], "higher", [False, False]),
        ([2.0, 1.0, 2.0], "higher", [True, False, True]),
        ([math.nan, 1.0], "higher", [False, False]),
    ],
)
def test_the_best_value(values: list[float], better: str, expected: list[bool]):
    assert best_of(values, better) == expected


def test_settings_have_dotted_names():
    config = {"a": {"class_path": "A", "init_args": {"b": [1, 2], "c": {}}}, "d": None}
    assert flat_settings(config) == {"a.class_path": "A", "a.b": "[1, 2]", "a.c": "{}", "d": "None"}


def test_curves_are_those_of_the_file(runs: list[Path]):
    curves = read_curves(runs[0])
    assert curves == {"train/loss": ([9.0, 19.0], [2.5, 1.5]), "val/knn": ([10.0, 20.0], [0.25, 0.5])}
    assert read_curves(Path("none")) == {}
    Path("metrics.csv").write_text("step,a\n1,x\n")
    with pytest.raises(ValueError, match=r"metrics.csv must be a table of numbers"):
        read_curves(Path())
