import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from benchmarks.paper import __main__ as command
from benchmarks.paper.apart import classes_apart
from benchmarks.paper.run import run
from benchmarks.paper.table import markdown
from benchmarks.recipes.drive import Driver
from benchmarks.recipes.plan import read_recipes, read_setting
from benchmarks.recipes.run import make_parts
from benchmarks.recipes.store import path_of, write_result
from simo_lightning.data.labels import coarse_index
from tests.recipe_parts import DIGITS, write_yaml

ROOT = Path(__file__).parent.parent
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RECIPES = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
EVEN_ODD = {"even": ["0", "2", "4", "6", "8"], "odd": ["1", "3", "5", "7", "9"]}


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paper"])  # LightningCLI warns of two sources of words


# ---- classes apart


def loops(means: Any, rows: Any, labels: Any) -> Any:
    """Pairwise balanced accuracy and accuracy of the nearest mean, image by image."""
    count = len(means)
    pairwise = [[1.0] * count for _ in range(count)]
    accuracy = []
    for a in range(count):
        own = [row for row, label in zip(rows, labels, strict=True) if label == a]
        nearest = [min(range(count), key=lambda c: sum((x - m) ** 2 for x, m in zip(row, means[c]))) for row in own]  # noqa: B905
        accuracy.append(sum(guess == a for guess in nearest) / len(own))
    for a in range(count):
        for b in range(count):
            if a == b:
                continue
            hits = {a: 0.0, b: 0.0}
            for row, label in zip(rows, labels, strict=True):
                if label in hits:
                    d = {c: sum((x - m) ** 2 for x, m in zip(row, means[c], strict=True)) for c in (a, b)}
                    hits[label] += d[label] < d[a + b - label]
            pairwise[a][b] = sum(hits[c] / labels.count(c) for c in (a, b)) / 2
    return pairwise, accuracy


def test_classes_apart_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = [0] * 7 + [1] * 9 + [2] * 4 + [3] * 6 + [4] * 8
    rows = means[labels] + torch.randn(34, 3, generator=generator, dtype=torch.float64)
    apart = classes_apart(means, rows, torch.tensor(labels))
    pairwise, accuracy = loops(means.tolist(), rows.tolist(), labels)
    torch.testing.assert_close(apart.pairwise, torch.tensor(pairwise, dtype=torch.float64))
    torch.testing.assert_close(apart.accuracy, torch.tensor(accuracy, dtype=torch.float64))


def test_merging_connects_and_all_in_one_point_is_one_group() -> None:
    places = torch.tensor([0.0, 1.0, 2.0, 50.0, 60.0, 61.0])[:, None]  # a chain of three, one alone, a pair
    labels = torch.arange(6).repeat_interleave(200)
    rows = places[labels] + torch.randn(1200, 1, generator=torch.Generator().manual_seed(0))
    apart = classes_apart(places, rows, labels)
    assert apart.groups.tolist() == [0, 0, 0, 1, 2, 2]
    assert apart.pairwise[0, 2] > 0.75  # told from each other, but both merged with the one between
    assert (apart.count, apart.alone) == (3, 1)
    assert classes_apart(places, places[labels], labels).count == 6
    collapsed = classes_apart(torch.zeros(6, 1), torch.zeros(1200, 1), labels)
    assert (collapsed.count, collapsed.alone) == (1, 0)
    assert (collapsed.pairwise[~torch.eye(6, dtype=torch.bool)] == 0.5).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"means": torch.zeros(3, 4)}, r"means must be \(C, 2\) with C >= 2, got \(3, 4\)"),
        ({"labels": torch.tensor([0, 0, 1, 1])}, r"every class of 0..2, got counts \[2, 2, 0\]"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"every class of 0..2"),
        ({"merged_below": 0.5}, r"merged_below must lie in \(0.5, 1\], got 0.5"),
    ],
)
def test_errors_of_classes_apart(change: dict[str, Any], message: str) -> None:
    given = {"means": torch.zeros(3, 2), "embeddings": torch.zeros(4, 2), "labels": torch.tensor([0, 1, 2, 2])}
    with pytest.raises(ValueError, match=message):
        classes_apart(**{**given, **change})


# ---- the recipes


def test_every_recipe_of_the_paper_makes_its_parts(tmp_path: Path) -> None:
    setting = read_setting(ROOT / "configs" / "recipes" / "base.yaml", None, 5)
    recipes = read_recipes([str(path) for path in RECIPES], setting)
    assert len(recipes) == len(RECIPES) >= 15
    for recipe in recipes:
        parts = make_parts({"config": recipe.config_of(1e-3, 0), "epochs": 5, "overrides": []})
        data, loss = parts.datamodule, parts.model.loss
        assert data.classes_per_batch * data.samples_per_class == 120  # as much as the base in a batch
        if data.coarse:
            assert len(set(coarse_index(CIFAR, data.coarse).tolist())) == data.classes_per_batch
        dim = parts.model.encoder.embedding_dim
        rows = torch.randn(40, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = loss(rows, torch.arange(40) % data.classes_per_batch)
        (gradient,) = torch.autograd.grad(value, rows)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "coarse").glob("*.yaml")), ids=lambda path: path.stem)
def test_coarse_overlays_are_partitions_and_those_of_the_recipes(path: Path) -> None:
    arguments = yaml.safe_load(path.read_text())["data"]["init_args"]
    index = coarse_index(CIFAR, arguments["coarse"])
    assert int(index.max()) + 1 == arguments["classes_per_batch"]
    same = [recipe for recipe in RECIPES if yaml.safe_load(recipe.read_text()).get("data") == {"init_args": arguments}]
    assert len(same) == 3


# ---- a run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Digits on two coarse classes, one epoch, five snapshots, in this process."""
    folder = tmp_path_factory.mktemp("paper")
    write_yaml(folder / "digits.yaml", DIGITS)
    own = {"classes_per_batch": 2, "samples_per_class": 50, "coarse": EVEN_ODD}
    write_yaml(folder / "coarse.yaml", {"title": "even and odd", "data": {"init_args": own}})
    setting = read_setting(folder / "digits.yaml", [8e-3], 1)
    (recipe,) = read_recipes([str(folder / "coarse.yaml")], setting)
    driver = Driver(setting, None, folder / "out", [0])
    target = path_of(folder / "out", recipe.name, 1, 8e-3, 0)
    words, sys.argv = sys.argv, ["paper"]
    try:
        result = run(
            {**driver.job_of(recipe, 8e-3, 0, target), "snapshots": 5}, folder / "out" / "figures" / target.stem
        )
    finally:
        sys.argv = words
    write_result(target, result)
    return folder, json.loads(target.read_text())


def test_a_run_measures_the_true_classes_along_training(made: tuple[Path, dict[str, Any]]) -> None:
    _, result = made
    assert (result["train_class_names"], result["class_names"]) == (["even", "odd"], list("0123456789"))
    assert [snapshot["step"] for snapshot in result["snapshots"]] == [0, 3, 6, 9, 12]
    for snapshot in result["snapshots"]:
        assert len(snapshot["knn"]) == len(snapshot["groups"]) == len(snapshot["means"]) == 10
        assert snapshot["apart"]["groups"] == max(snapshot["groups"]) + 1
    test = result["metrics"]["test"]
    assert {"knn1", "knn20", "linear", "orthogonality", "apart", "apart_euclidean"} <= test.keys()
    assert 0.15 < test["knn20"] <= 1  # chance is 0.1
    assert result["metrics"]["val"]["knn20"] > 0.15


def test_a_run_leaves_its_pictures(made: tuple[Path, dict[str, Any]]) -> None:
    folder, result = made
    assert len(result["figures"]) == 2 + 2 * 5
    for name in result["figures"]:
        with Image.open(folder / "out" / "figures" / "coarse-1e-lr0.008-seed0" / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(2**20)) > 5


def test_snapshots_change_nothing(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = made
    setting = read_setting(folder / "digits.yaml", [8e-3], 1)
    (recipe,) = read_recipes([str(folder / "coarse.yaml")], setting)
    parts = make_parts({"config": recipe.config_of(8e-3, 0), "epochs": 1, "overrides": []})
    parts.trainer.fit(parts.model, datamodule=parts.datamodule)
    from benchmarks.paper.run import evaluate

    assert evaluate(parts.trainer, parts)["test"]["knn20"] == result["metrics"]["test"]["knn20"]


def test_the_command_goes_on_and_prints_its_table(
    made: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = made
    monkeypatch.chdir(folder)
    words = ["--base", "digits.yaml", "--recipes", "coarse.yaml", "--out", "out", "--epochs", "1", "--rates", "8e-3"]
    assert command.main(words) == 0  # all that it asks for is there
    assert "made before" in capsys.readouterr().out
    table = (folder / "out" / "table.md").read_text()
    assert f"| even and odd | 0.008 | 1 | {result['metrics']['test']['knn1']:.4f} |" in table
    assert command.main(["--out", "out", "--table"]) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit):
        command.main([*words, "--epoch", "3"])
    assert "unknown: --epoch" in capsys.readouterr().err


def test_a_diverged_run_is_in_the_table(made: tuple[Path, dict[str, Any]]) -> None:
    _, result = made
    assert "diverged at every rate" in markdown([{**result, "metrics": None}])
    with pytest.raises(ValueError, match="no finished run"):
        markdown([])
