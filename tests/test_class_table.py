"""The table per class of validation and test, against loops in float64, with classes that are missing, and by ranks."""

import csv
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import ClassTable, OnlineKNN, RetrievalMonitor
from simo_lightning.cli import main
from tests.callback_parts import Encoder, Pictures, Returned, pictures, trainer
from tests.digits_run import copy_of
from tests.rank_processes import start_ranks

COLUMNS = ["class", "images", "knn", "nearest_class_mean", "map_at_r", "r_precision", "recall_at_1"]
COLUMNS += ["most_confused_with", "confused"]


class Missing(Pictures):
    """The split lacks the first class and has two that training lacks, one of them with a single image."""

    num_classes = 6
    class_names = ("cat", "dog", "ship", "frog", 'owl, "the\nlittle"', "emu")

    def __init__(self) -> None:
        super().__init__()
        images, labels = pictures(60, 3).tensors
        labels = torch.tensor([0, 1, 2, 3])[torch.where(torch.arange(60) % 5 == 0, 3, labels)]
        images, labels = images[labels > 0], labels[labels > 0]
        labels[0] = 4
        self.val = TensorDataset(images, labels)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def loop_knn(query: np.ndarray, bank: np.ndarray, bank_labels: list[int]) -> int:
    """The class with the largest share of its k_c neighbours; of equals the one whose votes are more similar."""
    cosines = bank @ query
    order = sorted(range(len(bank)), key=lambda image: -cosines[image])
    scores = {}
    for label, size in Counter(bank_labels).items():
        k = min(20, math.ceil(size / 3))
        votes = [cosines[image] for image in order[:k] if bank_labels[image] == label]
        scores[label] = (len(votes) / k, sum(votes) / k)
    return max(sorted(scores), key=scores.__getitem__)


def loop_retrieval(image: int, rows: np.ndarray, labels: list[int]) -> tuple[float, float, float]:
    """MAP@R, R-precision and Recall@1 of one query among all others."""
    cosines = rows @ rows[image]
    order = sorted((other for other in range(len(rows)) if other != image), key=lambda other: -cosines[other])
    relevant = labels.count(labels[image]) - 1
    if not relevant:
        return (math.nan,) * 3
    hits = [labels[other] == labels[image] for other in order[:relevant]]
    precision = sum(sum(hits[: i + 1]) / (i + 1) for i in range(relevant) if hits[i]) / relevant
    return precision, sum(hits) / relevant, float(labels[order[0]] == labels[image])


def loop_table(rows: np.ndarray, labels: list[int], bank: np.ndarray, bank_labels: list[int]) -> dict[int, list]:
    """Columns after the name, by label."""
    rows, bank = unit(rows), unit(bank)
    known = sorted(set(bank_labels))
    means = unit(np.stack([bank[np.array(bank_labels) == label].mean(axis=0) for label in known]))
    table = {}
    for label in sorted(set(labels)):
        own = [image for image, each in enumerate(labels) if each == label]
        voted = [loop_knn(rows[image], bank, bank_labels) for image in own]
        nearest = [known[int(np.argmax(means @ rows[image]))] for image in own]
        retrieval = [loop_retrieval(image, rows, labels) for image in own]
        wrong = Counter(each for each in voted if each != label)
        worst = max(sorted(wrong), key=wrong.__getitem__) if wrong else None
        accuracies = [math.nan] * 2
        if label in known:
            accuracies = [sum(each == label for each in values) / len(own) for values in (voted, nearest)]
        else:
            worst = None
        confused = math.nan if label not in known else wrong[worst]
        table[label] = [len(own), *accuracies, *np.mean(retrieval, axis=0), worst, confused]
    return table


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(field: str) -> float:
    return float(field) if field else math.nan


def check(path: Path, expected: dict[int, list], names: tuple[str, ...]) -> None:
    found = read(path)
    assert list(found[0]) == COLUMNS
    assert [row["class"] for row in found] == [names[label] for label in expected]
    for row, (images, *values, worst, confused) in zip(found, expected.values(), strict=True):
        assert int(row["images"]) == images
        assert [number(row[name]) for name in COLUMNS[2:7]] == pytest.approx(values, abs=1e-6, nan_ok=True)
        assert row["most_confused_with"] == ("" if worst is None else names[worst])
        assert number(row["confused"]) == pytest.approx(confused, nan_ok=True)


def evaluate(folder: Path, data: Pictures, *further, stage: str = "validate", **options) -> Path:
    callbacks = [ClassTable(), RetrievalMonitor(), OnlineKNN(), *further]  # before those whose values it shows
    run = trainer(folder, *callbacks, precision="64-true", **options)
    getattr(run, stage)(Encoder(), data, verbose=False)
    return folder / f"{'val' if stage == 'validate' else stage}_classes.csv"


def bank_of(data: Pictures) -> tuple[np.ndarray, list[int]]:
    with torch.no_grad():
        rows = Encoder().double().eval().net(data.train.tensors[0].double() / 255 - 0.5)
    return rows.numpy(), data.train.tensors[1].tolist()


@pytest.mark.parametrize("data", [Pictures, Missing])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_table_is_that_of_a_loop(tmp_path, data, stage):
    data, returned = data(), Returned()
    if stage == "test":
        data.test_dataloader = data.val_dataloader
    path = evaluate(tmp_path, data, returned, stage=stage)
    expected = loop_table(returned.rows, returned.labels.tolist(), *bank_of(data))
    assert any(row[-2] is not None for row in expected.values())  # some images are misclassified
    check(path, expected, data.class_names)
    assert len(list(tmp_path.glob("*.csv"))) == 1


def ranks(folder: Path) -> None:
    evaluate(folder, Missing(), strategy="ddp", devices=2)


def test_two_processes_write_what_one_writes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    path = evaluate(one, Missing())
    assert start_ranks(2, ranks, two) == [0, 0]
    assert read(two / path.name) == read(path)


class Counting(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.embedded = 0

    def embed(self, images: Tensor) -> Tensor:
        self.embedded += len(images)
        return super().embed(images)


def test_the_bank_is_embedded_once(tmp_path):
    module = Counting()
    run = trainer(tmp_path, OnlineKNN(), RetrievalMonitor(), ClassTable())
    run.validate(module, Pictures(), verbose=False)
    assert module.embedded == len(Pictures.train) + len(Pictures.val)


def test_a_table_without_knn_and_one_without_both(tmp_path):
    table = ClassTable()
    loader = DataLoader([(image / 255 - 0.5, label) for image, label in Pictures.val], batch_size=16)
    trainer(tmp_path, table, RetrievalMonitor()).validate(Encoder(), loader, verbose=False)
    assert list(read(table.path)[0]) == ["class", "images", "map_at_r", "r_precision", "recall_at_1"]
    assert [row["class"] for row in table.rows] == ["0", "1", "2"]
    assert "map_at_r" in table.summary()[1]
    table.path.unlink()
    trainer(tmp_path, table).validate(Encoder(), loader, verbose=False)
    assert not list(tmp_path.glob("*.csv"))
    assert table.summary() == []


def test_labels_may_be_any_integers(tmp_path):
    class Far(Pictures):
        val = TensorDataset(pictures(40, 1).tensors[0], pictures(40, 1).tensors[1] * 10**12 - 1)
        class_names = ()

    table = ClassTable()
    trainer(tmp_path, table, RetrievalMonitor()).validate(Encoder(), Far(), verbose=False)
    assert [row["class"] for row in table.rows] == ["-1", "999999999999", "1999999999999"]


def test_training_writes_no_table(tmp_path):
    trainer(tmp_path, ClassTable(), OnlineKNN(), max_epochs=1).fit(Encoder(), Pictures())
    assert not list(tmp_path.glob("*.csv"))


def test_a_table_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "val_classes.csv").mkdir()
    run = trainer(tmp_path, ClassTable(), OnlineKNN())
    with pytest.warns(UserWarning, match=r"ClassTable cannot write .*val_classes.csv: Is a directory"):
        values = run.validate(Encoder(), Pictures(), verbose=False)[0]
    assert "val/knn" in values


def test_the_command_prints_the_worst_classes(digits_run, capsys):
    folder = copy_of(digits_run)
    main(["test", "--config", str(folder / "config.yaml"), "--trainer.enable_progress_bar", "false"])
    found = read(folder / "test_classes.csv")
    assert list(found[0]) == COLUMNS
    assert sum(int(row["images"]) for row in found) == 359
    printed = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(printed) if line.startswith("classes"))
    assert printed[start] == f"classes     {folder / 'test_classes.csv'}; the 5 with the lowest knn:"
    worst = sorted(found, key=lambda row: (float(row["knn"]), -int(row["images"])))[:5]
    for line, row in zip(printed[start + 1 : start + 6], worst, strict=True):
        assert line.split()[:3] == [row["class"], "knn", f"{float(row['knn']):.2f}"]
        assert f"of {row['images']} image" in line
        if row["confused"] != "0":
            assert line.endswith(f"; most often taken for {row['most_confused_with']} ({row['confused']})")
