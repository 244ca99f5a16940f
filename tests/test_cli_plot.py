"""``simo plot`` as a user runs it."""

from pathlib import Path

import pytest
import torch

from simo_lightning import DigitsPairDataModule, SimOModule
from simo_lightning.cli import main
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.knn import knn_accuracy
from simo_lightning.functional.moments import class_moments
from tests.digits_run import QUIET, SMALL, copy_of
from tests.test_report import Page, pictures


def plot(*words: str) -> None:
    main(["plot", *SMALL, *QUIET, *words])


def embed(checkpoint: Path, stage: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Embeddings, labels and kNN accuracy, by the parts alone."""
    module = SimOModule.load_from_checkpoint(checkpoint).eval()
    data = DigitsPairDataModule(samples_per_class=10)
    data.setup("fit")
    data.setup("test")
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader(), "bank": data.bank_dataloader()}
    rows = {}
    with torch.no_grad():
        for name, loader in loaders.items():
            batches = [data.prepare(batch, augment=False) for batch in loader]
            rows[name] = [torch.cat(part) for part in zip(*((module(x), y) for x, y in batches), strict=True)]
    return *rows[stage], float(knn_accuracy(*rows[stage], *rows["bank"]))


@pytest.mark.parametrize(("stage", "which"), [("val", "last"), ("test", "best")])
def test_the_table_holds_the_numbers_of_the_embeddings(
    digits_run: Path, stage: str, which: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(digits_run)
    plot("--run_dir", str(run), "--ckpt_path", which, "--stage", stage, "--projections", "[pca]", "--out", "here")
    assert "report      here/index.html" in capfd.readouterr().out
    page = Page(Path("here/index.html"))
    embeddings, labels, knn = embed(run / "checkpoints" / f"{which}.ckpt", stage)
    moments = class_moments(embeddings, labels, 10)
    for name, function in GEOMETRY.items():
        assert float(page.value(name)) == pytest.approx(float(function(moments)), rel=1e-3), name
    assert float(page.value("knn")) == pytest.approx(knn, abs=1e-4)
    assert page.after("Config") == "digits"
    assert page.after("Images") == f"{len(labels)} of 10 classes"
    assert page.after("Data") == f"DigitsPairDataModule, {'validation' if stage == 'val' else 'test'} split"
    epoch = torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)["epoch"]
    assert page.after("Checkpoint").startswith(f"{which}.ckpt, epoch {epoch}, step ")
    assert str(run.absolute()) not in page.source


def test_all_pictures_are_in_the_folder_of_the_run_by_default(digits_run: Path) -> None:
    run = copy_of(digits_run)
    before = {path for path in run.rglob("*") if "report" not in path.parts}
    plot("--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--queries", "[3,17]", "--max_points", "50")
    assert {path for path in run.rglob("*") if "report" not in path.parts} == before
    folder = run / "plots" / "report"
    names = ["curves", "norms", "pca", "reliability", "shares", "similarity", "spectrum", "tsne"]
    names += ["training_points", "training_similarity"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            "index.html",
            "report.json",
            "report.npz",
            "training.gif",
            *(f"{name}.{kind}" for name in names for kind in ("png", "svg")),
        ]
    )
    page = Page(folder / "index.html")
    assert len(pictures(page)) == 8  # without the matrix and the maps
    assert any("Queries, from 0: 3, 17." in text for text in page.texts)
    assert any("50 of 143" in text for text in page.texts)


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plot", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--ckpt_path", "--out", "--stage {val,test}", "--projections", "--queries", "--max_points"):
        assert word in out, word
    assert "--config_name" not in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--stage", "train"], 2, "stage"),
        (["--projections", "[lda]"], 2, "lda"),
        (["--ckpt_path", "none.ckpt"], 1, "no checkpoint at none.ckpt"),
        (["--ckpt_path", "cut.ckpt"], 1, "checkpoint cut.ckpt cannot be read: it is cut short"),
        ([], 1, "no checkpoint at runs/digits/version_0/checkpoints/best.ckpt"),
        (["--ckpt_path", "good.ckpt", "--model.encoder.width", "0.25"], 1, "good.ckpt does not fit"),
        (["--ckpt_path", "good.ckpt", "--out", "file/out"], 1, "the report's folder file/out cannot be created"),
        (["--ckpt_path", "good.ckpt", "--data.val_fraction", "0"], 1, "must return a dictionary with embeddings"),
        (["--ckpt_path", "good.ckpt", "--projections", "[pca]", "--queries", "[143]"], 1, "must be indices 0..142"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_arguments_are_reported_in_one_line(
    words: list[str], code: int, message: str, digits_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    whole = (digits_run / "checkpoints" / "last.ckpt").read_bytes()
    Path("good.ckpt").write_bytes(whole)
    Path("cut.ckpt").write_bytes(whole[:9999])
    with pytest.raises(SystemExit) as stop:
        plot(*words)
    assert stop.value.code == code
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("simo: error:")
    assert message in lines[0]


def test_the_report_leaves_out_what_exceeds_the_budget(digits_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = copy_of(digits_run)
    with caplog.at_level("INFO"):
        plot(
            "--run_dir",
            str(run),
            "--ckpt_path",
            "last",
            "--second_budget_mb",
            "0",
            "--projections",
            "[]",
            "--out",
            "here",
        )
    line = (
        "ot computed: participation_ratio, subspace_overlap, variance_across, variance_along: the second moments of 10 "
    )
    assert f"n{line}" in caplog.text
    assert f"N{line}" in Path("here/index.html").read_text()
