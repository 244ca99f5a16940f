"""Splits with other classes, held-out classes, small classes in a data module, query, gallery and unknown images."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simo_lightning import SimOModule
from simo_lightning.data import (
    FolderImages,
    ImageSource,
    LabelledImages,
    PairDataModule,
    SemiSupervisedPairDataModule,
    load_image_folder,
)
from simo_lightning.data.labels import index_by_name
from simo_lightning.data.sources import JoinedImages, Split, join_images
from simo_lightning.data.splits import draw_unseen_classes
from simo_lightning.testing import check_resume
from tests.rank_processes import start_ranks

NAMES = [f"class {number}" for number in range(10)]


def coded(counts: dict[int, int], part: int) -> LabelledImages:
    """``counts[c]`` images of class c; the pixels of an image are its split, its class and its number in the class."""
    present = sorted(counts)
    values = [(part, label, number) for label in present for number in range(counts[label])]
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 3, 1, 1).repeat(1, 1, 2, 2)
    labels = torch.tensor([present.index(label) for _, label, _ in values])
    return LabelledImages(images, labels, [NAMES[label] for label in present])


class Coded(PairDataModule):
    """Splits of coded images, by split and class."""

    def __init__(self, splits: dict[str, dict[int, int]], **arguments: Any) -> None:
        given = {
            "classes_per_batch": 2,
            "samples_per_class": 2,
            "augment": None,
            "mean": [0.0] * 3,
            "std": [1 / 255] * 3,
        }
        super().__init__(**{**given, **arguments})
        self.given = splits
        self.extra_splits = tuple(set(splits) - {"train", "val", "test"})  # type: ignore[arg-type]

    def load(self, split: Split) -> ImageSource | None:
        order = ("train", "val", "test", "query", "gallery", "unknown")
        return coded(self.given[split], order.index(split)) if split in self.given else None


class SemiCoded(SemiSupervisedPairDataModule, Coded):
    """The same with hidden labels."""


def ready(data: PairDataModule, stage: str | None = "test") -> Any:
    data.setup(stage)
    return data


def seen_in(data: Any, loader: Any) -> set[tuple[int, int, int]]:
    """The codes of all images of a loader, each once, after a check of their labels by name."""
    codes = []
    for images, labels in loader:
        found = [tuple(code) for code in images[:, :, 0, 0].tolist()]
        assert [data.class_names[label] for label in labels.tolist()] == [NAMES[code[1]] for code in found]
        codes += found
    assert len(set(codes)) == len(codes)
    return set(codes)


def training_codes(data: Any) -> set[tuple[int, int, int]]:
    codes: set[tuple[int, int, int]] = set()
    for images, labels, _ in data.train_dataloader():
        found = [tuple(code) for code in images[:, :, 0, 0].tolist()]
        assert [data.train_class_names[label] for label in labels.tolist()] == [NAMES[code[1]] for code in found]
        assert int(labels.max()) < data.num_train_classes
        codes |= set(found)
    return codes


def of(classes: Any, codes: set[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    return {code for code in codes if code[1] in classes}


EVERY = dict.fromkeys(range(10), 6)
WHOLE = {"train": EVERY, "val": dict.fromkeys(range(8), 2), "test": dict.fromkeys(range(2, 10), 3)}
ALL = {
    (part, label, n) for part, name in enumerate(WHOLE) for label, count in WHOLE[name].items() for n in range(count)
}


# ---- joined sources


def test_joined_images_are_the_images_one_after_the_other(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / NAMES[label]).mkdir()
        for number in range(3):
            pixels = np.full((2, 2, 3), (9, label, number), np.uint8)
            Image.fromarray(pixels).save(tmp_path / NAMES[label] / f"{number}.png")
    disk = load_image_folder(tmp_path, 2, max_memory=0)
    assert isinstance(disk, FolderImages)
    parts = [index_by_name(source, NAMES) for source in (coded({3: 2, 1: 1}, 0), disk, coded({0: 2}, 2))]
    joined = join_images(parts, NAMES)
    assert isinstance(joined, JoinedImages)
    whole = torch.cat([part.__getitems__(range(len(part)))[0] for part in parts])
    assert torch.equal(joined.labels, whole[:, 1, 0, 0].long())
    index = torch.tensor([10, 0, 5, 3, 5, 9])
    images, labels = joined.__getitems__(index.tolist())
    assert torch.equal(images, whole[index])
    assert torch.equal(labels, joined.labels[index])
    chosen = joined.subset(index)
    assert torch.equal(chosen.labels, joined.labels[index])
    again = chosen.subset(torch.tensor([4, 1]))
    assert torch.equal(again.__getitems__([1, 0])[0], whole[[0, 5]])
    assert len(again) == 2
    assert torch.equal(chosen[2][0], whole[5])
    assert isinstance(join_images(parts[::2], NAMES), LabelledImages)
    with pytest.raises(ValueError, match="at least one source"):
        JoinedImages([], [])


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="class_names must hold every class of the images, but lacks 'class 3'"):
        index_by_name(coded({1: 1, 3: 1}, 0), NAMES[:2])


# ---- classes held out


@pytest.mark.parametrize("share, number", [(0.5, 2), (0.75, 3), (0.25, 1)])
@pytest.mark.parametrize("unseen", [4, 0.4, "list", "file"])
def test_unseen_classes_are_held_out_with_all_their_images(
    unseen: Any, share: float, number: int, tmp_path: Path
) -> None:
    if unseen in ("list", "file"):
        names = ["class 2", "class 9", "class 0", "class 5"]
        (tmp_path / "names.txt").write_text("\n".join([names[0], "", *names[1:]]) + "\n")
        unseen = names if unseen == "list" else str(tmp_path / "names.txt")
    data = ready(Coded(WHOLE, unseen_classes=unseen, unseen_val_share=share), "fit")
    val, test, train = (seen_in(data, loader) for loader in (data.val_dataloader(), data.test_dataloader(), bank(data)))
    classes = [{code[1] for code in codes} for codes in (val, test, train)]
    assert [len(each) for each in classes] == [number, 4 - number, 6]
    assert len(set.union(*classes)) == 10  # no class in two places
    assert val == of(classes[0], ALL)  # with the images of every split
    assert test == of(classes[1], ALL)
    assert train == {code for code in of(classes[2], ALL) if code[0] == 0}
    assert training_codes(data) == train
    assert data.num_train_classes == 6
    assert data.class_names[:6] == data.train_class_names == sorted(data.train_class_names)
    assert data.num_classes == 10
    assert set(data.unseen_class_names) == {NAMES[label] for label in classes[0] | classes[1]}
    if isinstance(unseen, list):
        assert {*data.unseen_class_names} == {*unseen}


def bank(data: Any) -> Any:
    return data.bank_dataloader()


def test_the_draw_of_unseen_classes_depends_on_split_seed() -> None:
    draws = [
        ready(Coded(WHOLE, unseen_classes=4, split_seed=split_seed, seed=seed)).unseen_class_names
        for split_seed, seed in ((0, 0), (0, 1), (1, 0), (2, 0))
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) > 1
    more = draw_unseen_classes(6, NAMES, NAMES, seed=0)
    assert more[:4] == draw_unseen_classes(4, NAMES, NAMES, seed=0)


def test_a_share_of_zero_leaves_validation_to_the_seen_classes() -> None:
    data = ready(Coded(WHOLE, unseen_classes=4, unseen_val_share=0.0))
    unseen = {NAMES.index(name) for name in data.unseen_class_names}
    assert len(unseen) == 4
    assert seen_in(data, data.test_dataloader()) == of(unseen, ALL)
    val = {code for code in ALL if code[0] == 1 and code[1] not in unseen}
    assert seen_in(data, data.val_dataloader()) == val
    known = {code for code in ALL if code[0] == 2 and code[1] not in unseen}
    assert seen_in(data, data.known_dataloader("test")) == known
    assert seen_in(data, data.unknown_dataloader("test")) == of(unseen, ALL)
    assert data.unknown_dataloader("val") is None


def test_a_share_of_one_leaves_test_to_the_seen_classes() -> None:
    data = ready(Coded(WHOLE, unseen_classes=4, unseen_val_share=1.0))
    unseen = {NAMES.index(name) for name in data.unseen_class_names}
    assert seen_in(data, data.val_dataloader()) == of(unseen, ALL)
    assert seen_in(data, data.test_dataloader()) == {c for c in ALL if c[0] == 2 and c[1] not in unseen}
    assert seen_in(data, data.known_dataloader("val")) == {c for c in ALL if c[0] == 1 and c[1] not in unseen}
    assert data.unknown_dataloader("test") is None


def test_known_images_are_held_out_of_training_where_the_data_set_has_none() -> None:
    data = ready(Coded({"train": dict.fromkeys(range(10), 10)}, unseen_classes=4, val_fraction=0.2), "fit")
    train = seen_in(data, bank(data))
    held = seen_in(data, data.known_dataloader("val"))
    assert seen_in(data, data.known_dataloader("test")) == held
    assert len(held) == 12
    assert len(train) == 48
    assert not held & train
    assert {code[1] for code in held} == {code[1] for code in train}
    assert seen_in(data, data.unknown_dataloader("val")) == seen_in(data, data.val_dataloader())
    none = ready(Coded({"train": dict.fromkeys(range(10), 10)}, unseen_classes=4, val_fraction=0))
    assert none.known_dataloader("val") is None
    assert none.unknown_dataloader("test") is None
    assert len(seen_in(none, bank(none))) == 60


def test_classes_that_training_lacks_join_the_unseen_ones_of_test() -> None:
    splits = {"train": dict.fromkeys(range(6), 4), "val": {0: 2, 6: 2, 7: 2}, "test": {1: 2, 7: 2, 8: 2}}
    data = ready(Coded(splits, unseen_classes=2))
    test = {code[1] for code in seen_in(data, data.test_dataloader())}
    val = {code[1] for code in seen_in(data, data.val_dataloader())}
    assert {6, 7, 8} < test
    assert (len(val), len(test)) == (1, 4)
    assert not val & test


def test_coarse_classes_without_the_unseen_ones() -> None:
    coarse = {"low": NAMES[:2], "middle": NAMES[2:6], "high": NAMES[6:]}
    data = ready(Coded(WHOLE, coarse=coarse, unseen_classes=["class 0", "class 1", "class 3"]))
    assert data.train_class_names == ["middle", "high"]
    for images, labels, _ in data.train_dataloader():
        assert labels.tolist() == [int(label >= 6) for label in images[:, 1, 0, 0].tolist()]
    assert seen_in(data, data.val_dataloader()) | seen_in(data, data.test_dataloader()) == of({0, 1, 3}, ALL)


def test_hidden_labels_beside_unseen_classes() -> None:
    data = ready(SemiCoded(splits=WHOLE, unseen_classes=4, label_fraction=0.5, views=2, unlabelled_per_batch=3))
    assert (data.num_train_classes, data.num_classes) == (6, 10)
    labels = torch.cat([batch.labels for batch in data.train_dataloader()])
    assert set(range(6)) == {label for label in labels.tolist() if label < 10}
    assert int((labels >= 10).sum()) == 3 * len(data.train_dataloader())


@pytest.mark.parametrize(
    "unseen, message",
    [
        (0, r"unseen_classes must be a number of at least 1 or a share in \(0, 1\), got 0"),
        (1.5, r"share in \(0, 1\), got 1.5"),
        (True, "got True"),
        (9, "must leave at least 2 classes to train on, but leaves 1"),
        (40, "must leave at least 2 classes to train on, but leaves 0"),
        ([], "must name classes of the data set, each once, got none"),
        (["class 1", "class 1", "cow"], "got unknown or repeated: 'class 1', 'cow'"),
    ],
)
def test_errors_of_unseen_classes(unseen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(Coded(WHOLE, unseen_classes=unseen))


def test_errors_of_a_file_of_unseen_classes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one name per line, got 'nothing\.txt', which is not"):
        ready(Coded(WHOLE, unseen_classes="nothing.txt"))
    (tmp_path / "names").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8 text with one name per line"):
        ready(Coded(WHOLE, unseen_classes=str(tmp_path / "names")))
    with pytest.raises(ValueError, match=r"unseen_val_share must lie in \[0, 1\], got 1.5"):
        Coded(WHOLE, unseen_val_share=1.5)


# ---- query, gallery, unknown


def test_queries_gallery_and_unknown_images(caplog: pytest.LogCaptureFixture) -> None:
    splits = {"train": EVERY, "query": {2: 2, 9: 1}, "gallery": {9: 4, 2: 3}, "unknown": {4: 0, 8: 0}}
    splits["train"], splits["unknown"] = dict.fromkeys(range(1, 6), 6), {7: 2, 8: 1}
    data = ready(Coded(splits), "fit")
    unknown = [torch.cat(parts) for parts in zip(*data.unknown_dataloader(), strict=True)]
    assert unknown[0][:, 1, 0, 0].tolist() == [7, 7, 8]
    assert int(unknown[1].min()) >= data.num_classes
    assert data.gallery_dataloader() is None  # until it is needed
    data.setup("test")
    assert seen_in(data, data.test_dataloader()) == {(3, 2, 0), (3, 2, 1), (3, 9, 0)}
    assert {code[:2] for code in seen_in(data, data.gallery_dataloader())} == {(4, 2), (4, 9)}
    assert data.unseen_class_names == ["class 9"]
    assert "query split: 1 of its 2 classes without training images ('class 9')" in caplog.text
    assert data.known_dataloader("test") is None  # these are in the test split
    with pytest.raises(ValueError, match="unseen_classes must be null where the data set has a split 'query'"):
        ready(Coded(splits, unseen_classes=1))
    with pytest.raises(ValueError, match="the unknown split must hold no class of training, got 'class 2'"):
        ready(Coded(splits | {"unknown": {2: 1}}))


def test_a_split_of_both_known_and_unknown_classes() -> None:
    data = ready(Coded({"train": dict.fromkeys(range(5), 4), "test": dict.fromkeys(range(3, 8), 2)}))
    assert {code[1] for code in seen_in(data, data.unknown_dataloader("test"))} == {5, 6, 7}
    assert data.known_dataloader("test") is None  # these are in the test split
    assert data.unknown_dataloader("val") is None


def test_without_further_splits_there_are_no_such_loaders() -> None:
    data = ready(Coded({"train": EVERY, "test": EVERY}))
    assert data.gallery_dataloader() is data.unknown_dataloader("test") is data.known_dataloader("test") is None
    assert data.unseen_class_names == []


def test_a_test_split_of_other_classes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    data = ready(Coded({"train": dict.fromkeys(range(5), 4), "test": dict.fromkeys(range(5, 10), 2)}))
    assert "test split: 5 of its 5 classes without training images" in caplog.text
    assert data.unseen_class_names == NAMES[5:]
    assert data.train_class_names == NAMES[:5]


def test_prepare_data_reads_what_the_run_needs() -> None:
    data, read = Coded(WHOLE), []
    load = data.load
    data.load = lambda split: (read.append(split), load(split))[1]  # type: ignore[assignment, func-returns-value]
    trainer = pl.Trainer(**QUIET, max_steps=1, limit_val_batches=0)
    trainer.fit(Model(), data)
    assert (read, data._prepared) == (["train", "val"], {})
    trainer.test(Model(), data, verbose=False)
    assert read == ["train", "val", "test"]


# ---- small classes


TAIL = {0: 9, 1: 1, 2: 5, 3: 3, 4: 12, 5: 2}


def test_small_classes_are_repeated_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    data = ready(Coded({"train": TAIL}, classes_per_batch=3, samples_per_class=4, val_fraction=0), "fit")
    data.setup("fit")
    line = (
        "small_classes 'repeat': 3 of 6 training classes with fewer than samples_per_class = 4 images (smallest: "
        "'class 1' with 1): filled with copies (augment is null) of their images, 6 for all of these classes once"
    )
    assert caplog.text.count(line) == 1
    codes = {code for code in training_codes(data) if code[1] in (1, 3, 5)}
    assert {code[1:] for code in codes} == {(1, 0), (3, 0), (3, 1), (3, 2), (5, 0), (5, 1)}
    assert data.train_class_names == NAMES[:6]


def test_small_classes_are_left_out_of_training_only(caplog: pytest.LogCaptureFixture) -> None:
    splits = {"train": TAIL, "val": dict.fromkeys(range(7), 1)}
    data = ready(Coded(splits, samples_per_class=4, small_classes="skip"), "fit")
    assert "training leaves out 'class 1', 'class 3', 'class 5'; validation, test and bank keep them" in caplog.text
    assert data.train_class_names == ["class 0", "class 2", "class 4"]
    assert {code[1] for code in training_codes(data)} == {0, 2, 4}
    assert {code[1] for code in seen_in(data, data.val_dataloader())} == set(range(7))
    assert {code[1] for code in seen_in(data, bank(data))} == set(range(6))
    assert data.unseen_class_names == ["class 6"]
    assert data.class_names[:3] == data.train_class_names
    coarse = {"few": [NAMES[1]], "rest": [NAMES[0], *NAMES[2:4]], "more": NAMES[4:6]}
    merged = ready(Coded({"train": TAIL}, samples_per_class=4, small_classes="skip", coarse=coarse, val_fraction=0))
    assert merged.train_class_names == ["rest", "more"]
    for images, labels, _ in merged.train_dataloader():
        assert labels.tolist() == [int(label >= 4) for label in images[:, 1, 0, 0].tolist()]


def test_small_classes_may_be_an_error() -> None:
    with pytest.raises(ValueError, match="'class 1' has 1 images, got 4; small_classes 'repeat' or 'skip' allows it"):
        ready(Coded({"train": TAIL}, samples_per_class=4, small_classes="error", val_fraction=0))


def test_a_class_without_training_images_is_not_trained() -> None:
    class Named(Coded):
        def load(self, split: Split) -> ImageSource | None:
            source = super().load(split)
            return None if source is None else index_by_name(source, NAMES)

    data = ready(Named({"train": {3: 4, 7: 4}, "val": {3: 1, 5: 2}}), "fit")
    assert data.train_class_names == ["class 3", "class 7"]
    assert data.num_classes == 10
    training_codes(data)
    assert seen_in(data, data.val_dataloader()) == {(1, 3, 0), (1, 5, 0), (1, 5, 1)}


def test_by_default_a_batch_holds_ten_classes_or_all() -> None:
    few = ready(Coded({"train": TAIL}, classes_per_batch=None))
    assert few.classes_per_batch == 6
    many = ready(Coded({"train": EVERY}, classes_per_batch=None, coarse={"a": NAMES[:1], "b": NAMES[1:]}))
    assert many.classes_per_batch == 2
    semi = ready(
        SemiCoded(splits={"train": EVERY}, classes_per_batch=None, label_fraction=0.5, views=2, val_fraction=0)
    )
    assert (semi.classes_per_batch, semi.unlabelled_per_batch) == (10, 20)


@pytest.mark.parametrize("sampling", ["natural", "sqrt", "balanced"])
def test_class_sampling_reaches_the_sampler(sampling: Any) -> None:
    data = ready(Coded({"train": TAIL}, samples_per_class=3, val_fraction=0, class_sampling=sampling))
    labels = torch.cat([batch.labels for batch in data.train_dataloader()])
    counts = labels.bincount() // 3
    expected = {"natural": [3, 1, 1, 1, 4, 1], "balanced": None, "sqrt": None}[sampling]
    if expected is not None:
        assert (counts <= torch.tensor(expected)).all()
    if sampling == "balanced":
        assert int(counts.max() - counts.min()) <= 1
    if sampling == "sqrt":
        assert counts[1] < counts[0] <= counts[4] < 4 * counts[1].clamp(min=1) + 1


class Model(pl.LightningModule):
    """Remembers the codes of its training images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        codes = torch.cat([images[:, :, 0, 0].round().int(), labels[:, None]], 1)
        self.seen.append(codes.tolist())
        return self.weight * images.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...
    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def make_module() -> SimOModule:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    return SimOModule(net, optimizer=torch.optim.Adam)


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_a_run_with_repeated_images_resumes_bit_identical_under_workers(sampling: Any) -> None:
    make = partial(
        Coded, {"train": TAIL, "val": TAIL}, samples_per_class=4, class_sampling=sampling, num_workers=1, views=2
    )
    check_resume(make_module, make, stop_after=4)  # three batches an epoch


def run(folder: Path) -> None:
    data = Coded(
        {"train": TAIL | {6: 4, 7: 4}}, samples_per_class=4, unseen_classes=2, val_fraction=0, class_sampling="balanced"
    )
    model = Model()
    trainer = pl.Trainer(**{**QUIET, "devices": 2}, strategy="ddp", max_epochs=2, limit_val_batches=0)
    trainer.fit(model, data)
    report = {"seen": model.seen, "unseen": data.unseen_class_names, "names": data.class_names}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(report))


def test_two_processes_hold_out_the_same_classes_and_share_an_epoch(tmp_path: Path) -> None:
    assert start_ranks(2, run, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["unseen"] == second["unseen"]
    assert first["names"] == second["names"]
    assert len(first["seen"]) == len(second["seen"]) > 0
    data = ready(Coded({"train": TAIL | {6: 4, 7: 4}}, samples_per_class=4, unseen_classes=2, val_fraction=0,
                       class_sampling="balanced"))  # fmt: skip
    sampler = data._train_sampler()
    for epoch in range(2):
        blocks = sampler.epoch_blocks(epoch)
        steps = len(blocks) // 2
        for step in range(steps):
            for rank, report in enumerate((first, second)):
                images, labels = data._training.__getitems__(blocks[2 * step + rank])
                expected = torch.cat([images[:, :, 0, 0].int(), labels[:, None]], 1)
                assert report["seen"][epoch * steps + step] == expected.tolist()
