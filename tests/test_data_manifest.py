"""Tables of image files: CSV and Parquet, their columns, and what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from simo_lightning.data import ImageFolderPairDataModule, ImageSource
from simo_lightning.data.manifest import coarse_classes, read_coarse, read_manifest
from tests.test_data_folder import lines  # noqa: F401  # a fixture
from tests.test_data_sources import pixels, write_folder

ARGUMENTS: dict[str, Any] = {"image_size": 8, "classes_per_batch": 2, "samples_per_class": 2}
ROWS = [  # path, label, split, coarse; in no order
    ("images/5.png", "dog", "train", "animal"),
    ("images/0.png", "cat", "train", "animal"),
    ("images/1.png", "cat", "Training", "animal"),
    ("images/2.png", "car", "train", "vehicle"),
    ("images/3.png", "car", "train", "vehicle"),
    ("images/4.png", "dog", "train", "animal"),
    ("images/6.png", "car", "valid", "vehicle"),
    ("images/7.png", "owl", "test", "animal"),
    ("images/8.png", "", "unknown", ""),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.fromarray(pixels(number)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write_csv(path: Path, rows: Any = ROWS, header: str = "path,label,split,coarse", delimiter: str = ",") -> Path:
    content = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    path.write_text("\n".join(content) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Any = ROWS) -> Path:
    names = ["path", "label", "split", "coarse"]
    columns = [[value or None for value in column] for column in zip(*rows, strict=True)]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path)
    return path


def content(source: ImageSource | None) -> list[tuple[str, int]]:
    """Class and number of each image, found by its pixels."""
    assert source is not None
    images, labels = source.__getitems__(range(len(source)))
    number = {pixels(index).tobytes(): index for index in range(9)}
    found = [number[image.permute(1, 2, 0).numpy().tobytes()] for image in images]
    return list(zip([source.class_names[label] for label in labels], found, strict=True))


def one_delimiter(character: str) -> Callable[[Path], Path]:
    return lambda path: write_csv(path, delimiter=character)


def with_bom(path: Path) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + write_csv(path).read_bytes().replace(b"\n", b"\r\n") + b"\r\n,,,\r\n")
    return path


def other_header(path: Path) -> Path:
    rows = [(coarse, "me", label, f'"{name}"', split) for name, label, split, coarse in ROWS]
    return write_csv(path, rows, "coarse, photographer, Label, PATH, Split")


@pytest.mark.parametrize("max_memory_gib", [1.0, 0.0], ids=["memory", "disk"])
@pytest.mark.parametrize(
    "name, write",
    [
        ("m.csv", write_csv),
        ("m.csv", one_delimiter(";")),
        ("m.tsv", one_delimiter("\t")),
        ("m.csv", with_bom),
        ("m.csv", other_header),
        ("m.parquet", write_parquet),
        ("m.PQ", write_parquet),
    ],
)
def test_a_manifest_names_files_classes_and_splits(
    root: Path, name: str, write: Callable[[Path], Path], max_memory_gib: float
) -> None:
    data = ImageFolderPairDataModule(manifest=write(root / name), max_memory_gib=max_memory_gib, **ARGUMENTS)
    for _ in range(2):  # the second time from the cache
        assert content(data.load("train")) == [("car", 2), ("car", 3), ("cat", 0), ("cat", 1), ("dog", 4), ("dog", 5)]
        assert content(data.load("val")) == [("car", 6)]
        assert content(data.load("test")) == [("owl", 7)]
        assert content(data.load("unknown")) == [("unknown", 8)]
        assert data.load("query") is None
    assert len(list(root.glob(".simo*"))) == (4 if max_memory_gib else 0)  # each split has its own cache


def test_without_splits_all_images_are_for_training(root: Path, lines: list[str]) -> None:  # noqa: F811
    manifest = write_csv(root / "m.csv", [row[:2] for row in ROWS[:6]], "path,label")
    data = ImageFolderPairDataModule(manifest=manifest, **ARGUMENTS)
    train = data.load("train")
    assert train is not None
    assert (len(train), train.class_names, data.load("val")) == (6, ["car", "cat", "dog"], None)
    assert lines[0] == f"{str(manifest)!r}: 6 images in the train split"


def test_columns_that_are_not_used_are_named(root: Path, lines: list[str]) -> None:  # noqa: F811
    read_manifest(other_header(root / "m.csv"))
    assert lines == [
        f"{str(root / 'm.csv')!r}: 6 images in the train split, 1 images in the val split, 1 images in the test split, "
        "1 images in the unknown split; columns not used: 'photographer'"
    ]


def test_where_paths_and_the_manifest_are_looked_up(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    absolute = [(str(root / name), *rest) for name, *rest in ROWS]
    write_csv(root / "here.csv")
    cases = [
        (None, root / "here.csv"),
        (root, "here.csv"),
        (root, write_csv(elsewhere / "m.csv")),
        (None, write_csv(elsewhere / "absolute.csv", absolute)),
        (root / "images", write_csv(elsewhere / "names.csv", [(name[7:], *rest) for name, *rest in ROWS])),
    ]
    for data_dir, manifest in cases:
        data = ImageFolderPairDataModule(data_dir, manifest=manifest, **ARGUMENTS)
        assert content(data.load("test")) == [("owl", 7)]
    monkeypatch.chdir(elsewhere)
    with pytest.raises(FileNotFoundError, match=rf"no file '.*/gone\.csv' nor '{root}/gone\.csv'"):
        ImageFolderPairDataModule(root, manifest="gone.csv", **ARGUMENTS).load("train")


def test_the_order_of_the_rows_does_not_matter(root: Path) -> None:
    forwards, backwards = write_csv(root / "a.csv"), write_csv(root / "b.csv", ROWS[::-1])
    sources = [ImageFolderPairDataModule(manifest=path, **ARGUMENTS).load("train") for path in (forwards, backwards)]
    assert content(sources[0]) == content(sources[1])


def changed(row: int, column: int, value: str) -> list[tuple[str, ...]]:
    rows = [list(each) for each in ROWS]
    rows[row][column] = value
    return [tuple(each) for each in rows]


@pytest.mark.parametrize("write, unit, first", [(write_csv, "line", 2), (write_parquet, "row", 1)])
@pytest.mark.parametrize(
    "rows, row, message",
    [
        (changed(3, 0, ""), 3, "path must not be empty"),
        (changed(2, 1, " "), 2, "label must not be empty"),
        (changed(6, 2, "dev"), 6, "split must be one of train, training, .*, unknown, got 'dev'"),
        (changed(6, 2, ""), 6, "split must be one of .*, got ''"),
        (changed(4, 0, "images/gone.png"), 4, "path must be a file, relative to '.*', got 'images/gone.png'"),
        (changed(5, 0, "images"), 5, "path must be a file, relative to '.*', got 'images'"),
        (changed(5, 0, "images/0.png/a.png"), 5, "path must be a file, .*, got 'images/0.png/a.png'"),
        (changed(7, 0, "./images/../images/1.png"), 7, "path must be named once, got '.*' again after UNIT 2"),
    ],
)
def test_a_wrong_row_is_named(
    root: Path,
    write: Callable[..., Path],
    unit: str,
    first: int,
    rows: list[tuple[str, ...]],
    row: int,
    message: str,
) -> None:
    message = message.replace("UNIT 2", f"{unit} {2 + first}$")
    data = ImageFolderPairDataModule(manifest=write(root / f"m.{'csv' if unit == 'line' else 'pq'}", rows), **ARGUMENTS)
    with pytest.raises(ValueError, match=rf"m\.\w+', {unit} {row + first}: {message}") as raised:
        data.load("train")
    assert "\n" not in str(raised.value)


def test_further_wrong_rows_are_counted(root: Path) -> None:
    rows = [(name.replace("png", "jpg"), *rest) for name, *rest in ROWS]
    with pytest.raises(ValueError, match=r"line 2: path must be a file.*got 'images/5\.jpg' \(and 5 more rows\)"):
        ImageFolderPairDataModule(manifest=write_csv(root / "m.csv", rows), **ARGUMENTS).load("train")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"file,label\na.png,cat\n", r"must have the columns path and label, got 'file', 'label'"),
        (b"images/0.png,cat\n", "must have the columns path and label, got"),
        (b"", "must have the columns path and label"),
        (b"path,label,Path\n", "must name each column once, got 'path' twice"),
        (b"path,label\na.png\n", r"m\.csv', line 2: must have 2 values as the header, got 1"),
        (b'path,label\n"a.png,cat\n', r"m\.csv' is not a CSV file in UTF-8: unexpected end"),
        ("path,label\nä.png,cat\n".encode("latin-1"), r"m\.csv' is not a CSV file in UTF-8: 'utf-8' codec"),
    ],
)
def test_what_is_no_table_is_refused(root: Path, text: bytes, message: str) -> None:
    (root / "m.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(root / "m.csv")


def test_what_is_no_parquet_file_is_refused(root: Path) -> None:
    write_csv(root / "m.parquet")
    with pytest.raises(ValueError, match=r"m\.parquet' is not a Parquet file that can be read"):
        read_manifest(root / "m.parquet")


def test_labels_of_a_parquet_file_may_be_numbers_or_categories(root: Path) -> None:
    table = {"path": [f"images/{number}.png" for number in range(4)], "label": [3, 10, 3, 10]}
    for labels in (pyarrow.array(table["label"]), pyarrow.array(["3", "10", "3", "10"]).dictionary_encode()):
        pyarrow.parquet.write_table(pyarrow.table({**table, "label": labels}), root / "m.parquet")
        source = ImageFolderPairDataModule(manifest=root / "m.parquet", **ARGUMENTS).load("train")
        assert content(source) == [("10", 1), ("10", 3), ("3", 0), ("3", 2)]


class NoPyArrow:
    """Python as it is where pyarrow is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_parquet_manifest_without_pyarrow_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(root / "m.parquet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoPyArrow(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r"^pyarrow is missing: pip install 'simo_lightning\[parquet\]'$"):
        read_manifest(root / "m.parquet")


def test_missing_and_broken_files_are_left_out_on_request(root: Path, lines: list[str]) -> None:  # noqa: F811
    (root / "images" / "0.png").unlink()
    (root / "images" / "2.png").write_bytes(b"no image")
    data = ImageFolderPairDataModule(manifest=write_csv(root / "m.csv"), on_broken="skip", **ARGUMENTS)
    assert content(data.load("train")) == [("car", 3), ("cat", 1), ("dog", 4), ("dog", 5)]
    assert lines[-1].endswith("left out: 1 missing file ('images/0.png'); 1 broken file ('images/2.png')")


# ---- coarse classes


def test_the_coarse_column_may_be_the_classes_of_training(root: Path) -> None:
    for manifest in (write_csv(root / "m.csv"), write_parquet(root / "m.parquet")):
        data = ImageFolderPairDataModule(manifest=manifest, coarse="manifest", **ARGUMENTS)
        data.load("train")
        assert data.coarse == {"animal": ["cat", "dog"], "vehicle": ["car"]}


def test_coarse_classes_from_a_file_a_column_or_by_hand_train_alike(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("car", "cat", "dog"), 4)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    coarse_of = {"cat": "animal", "dog": "animal", "car": "vehicle", "owl": "animal"}
    rows = [(name, name.split("/")[1], "train", coarse_of[name.split("/")[1]]) for name in names]
    pairs = list(coarse_of.items())
    manifest = write_csv(tmp_path / "m.csv", rows)
    for arguments in (
        {"coarse": {"animal": ["cat", "dog"], "vehicle": ["car"]}},
        {"coarse": str(write_csv(tmp_path / "pairs.csv", pairs[1:], ",".join(pairs[0])))},  # no header
        {"coarse": "named.csv" if write_csv(tmp_path / "named.csv", pairs, "Label,coarse") else ""},
        {"coarse": "manifest", "manifest": manifest},
    ):
        data = ImageFolderPairDataModule(tmp_path, val_fraction=0, **arguments, **ARGUMENTS)  # type: ignore[arg-type]
        data.setup("fit")
        assert data.train_class_names == ["animal", "vehicle"]
        assert data.class_names == ["car", "cat", "dog"]
        assert data._training.labels.tolist() == [1] * 4 + [0] * 8
        batch = next(iter(data.train_dataloader()))
        by_pixels = {pixels(100 * label + number).tobytes(): label for label in range(3) for number in range(4)}
        true = [by_pixels[image.permute(1, 2, 0).numpy().tobytes()] for image in batch.images]
        assert np.array_equal(batch.labels, [1 if label == 0 else 0 for label in true])
        assert torch.cat([labels for _, labels in data.bank_dataloader()]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            changed(0, 3, "thing"),
            r"line 3: coarse must be one name for all images of class 'dog', got 'animal' and 'th",
        ),
        (changed(5, 3, ""), r"line 7: coarse must be one name for all images of class 'dog', got '' and 'animal'"),
    ],
)
def test_a_class_has_one_coarse_class(root: Path, rows: list[tuple[str, ...]], message: str) -> None:
    message = message.replace("line 3", "line 7")  # the second image of the class
    data = ImageFolderPairDataModule(manifest=write_csv(root / "m.csv", rows), coarse="manifest", **ARGUMENTS)
    with pytest.raises(ValueError, match=message):
        data.load("train")


def test_coarse_without_its_column_or_a_class(root: Path) -> None:
    manifest = write_csv(root / "m.csv", [row[:2] for row in ROWS[:6]], "path,label")
    with pytest.raises(ValueError, match=r"coarse 'manifest' requires a column 'coarse' in '.*m\.csv'"):
        ImageFolderPairDataModule(manifest=manifest, coarse="manifest", **ARGUMENTS).load("train")
    with pytest.raises(
        ValueError, match="coarse 'manifest' must give the coarse class of every class, but lacks 'owl'"
    ):
        coarse_classes({"cat": "animal"}, ["cat", "owl"], "manifest")
    write_csv(root / "c.csv", [("cat", "animal"), ("cat", "pet")], "label,coarse")
    with pytest.raises(
        ValueError, match=r"c\.csv', line 3: each label must have one coarse class, got 'pet' for 'cat'"
    ):
        read_coarse(root / "c.csv")


def test_arguments_as_the_command_parses_them(root: Path) -> None:
    write_csv(root / "m.csv", [row for row in ROWS if row[2] != "unknown"])
    parser = ArgumentParser()
    parser.add_class_arguments(ImageFolderPairDataModule, "data")
    for coarse in ("manifest", "{animal: [cat, dog], vehicle: [car]}"):
        given = [f"--data.manifest={root / 'm.csv'}", f"--data.coarse={coarse}", "--data.image_size=8"]
        data = parser.instantiate_classes(parser.parse_args(given)).data
        data.load("train")
        assert data.coarse == {"animal": ["cat", "dog"], "vehicle": ["car"]}
