"""Image folders as users have them: what is found, left out, refused and logged."""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from simo_lightning.data import (
    FolderImages,
    ImageFolderPairDataModule,
    LabelledImages,
    SemiSupervisedImageFolderPairDataModule,
    find_splits,
    load_image_folder,
)
from simo_lightning.data.cache import fingerprint
from simo_lightning.data.folder import SPLIT_NAMES, list_image_folder
from simo_lightning.data.reading import read_images
from simo_lightning.preprocessing import Preprocessing
from tests.test_data_decode import as_nobody
from tests.test_data_sources import pixels, write_folder

ARGUMENTS: dict[str, Any] = {"image_size": 8, "classes_per_batch": 2, "samples_per_class": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Lines of the log, as they come."""
    logger, found = logging.getLogger("lightning.pytorch.utilities.rank_zero"), []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


# ---- splits


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("Training", "validation", "Testing"), ("TRAIN", "Valid", "TEST"), ("training",)],
)
def test_splits_go_by_their_usual_names(tmp_path: Path, lines: list[str], names: tuple[str, ...]) -> None:
    for name, count in zip(names, (4, 3, 2), strict=False):
        write_folder(tmp_path / name, count=count)
    write_folder(tmp_path / "extra")
    (tmp_path / "labels.csv").touch()
    data = ImageFolderPairDataModule(tmp_path, **ARGUMENTS)
    data.setup("test")
    sizes = [None if data._splits[split] is None else len(data._splits[split]) for split in ("train", "val", "test")]
    assert sizes == ([8, 6, 4] if len(names) == 3 else [6, 2, None])  # a tenth of each class is at least one image
    found = ", ".join(
        f"{split} split in {name!r}" for split, name in zip(("train", "val", "test"), names, strict=False)
    )
    assert lines[0] == f"{str(tmp_path)!r}: {found}; left out: 'extra'"
    assert len(lines) == 1 + len(names)


def test_class_folders_without_splits(tmp_path: Path, lines: list[str]) -> None:
    write_folder(tmp_path, ("ant", "test", "train"))  # a class may have a split's name
    assert find_splits(tmp_path) == {"train": tmp_path}
    assert lines == []


def test_a_path_begins_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "photos" / "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("~/photos", Path("~/photos"), "photos"):
        data = ImageFolderPairDataModule(given, val_fraction=0, **ARGUMENTS)
        data.setup("fit")
        assert len(data.bank_dataloader().dataset) == 6  # type: ignore[arg-type]
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "folders, message",
    [
        (
            ["fold1/ant", "fold1/bee", "fold2/ant", "fold2/bee"],
            r"one level too high: its folders 'fold1', 'fold2' hold",
        ),
        (["a/train/ant", "a/test/ant", "b/train/ant", "b/test/ant"], "one level too high"),
        (["data/train/ant", "data/test/ant"], "holds the single folder 'data', is that the data_dir"),
        (["test/ant", "test/bee", "other/ant"], "looks like a test split, but there is no training folder"),
        (["train/ant", "Training/ant"], r"must hold one train folder, found \["),
    ],
)
def test_a_level_too_high_is_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        write_folder(tmp_path / folder, ("1",), 2)
        (tmp_path / folder / "1" / "0.png").rename(tmp_path / folder / "0.png")
    with pytest.raises(ValueError, match=message) as raised:
        ImageFolderPairDataModule(tmp_path, **ARGUMENTS).setup("fit")
    assert "\n" not in str(raised.value)


# ---- the level of the classes


def write_tree(root: Path, folders: Sequence[str], count: int = 2) -> Path:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(pixels(100 * number + index)).save(root / folder / f"{number}_{index}.png")
    return root


TREE = ["fruit/apple/fuji", "fruit/apple/gala", "fruit/pear", "milk/oat"]


@pytest.mark.parametrize(
    "class_level, expected",
    [
        (1, {"fruit": 6, "milk": 2}),
        (2, {"apple": 4, "oat": 2, "pear": 2}),
        (-1, {"fuji": 2, "gala": 2, "oat": 2, "pear": 2}),
        (-2, {"apple": 4, "fruit": 2, "milk": 2}),
    ],
)
def test_class_level_says_which_folder_names_the_class(
    tmp_path: Path, class_level: int, expected: dict[str, int]
) -> None:
    for root in (write_tree(tmp_path / "splits" / "train", TREE).parent, write_tree(tmp_path / "plain", TREE)):
        data = ImageFolderPairDataModule(root, class_level=class_level, image_size=8)
        source = data.load("train")
        assert source is not None
        counts = torch.bincount(source.labels).tolist()
        assert dict(zip(source.class_names, counts, strict=True)) == expected
        by_name = {name: pixels(100 * int(name[-7]) + int(name[-5])) for name in list_names(root)}
        images = {image.permute(1, 2, 0).numpy().tobytes() for image in source.__getitems__(range(8))[0]}
        assert images == {image.tobytes() for image in by_name.values()}


def list_names(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in sorted(root.rglob("*.png"))]


def test_labels_of_a_deep_tree_are_those_of_the_files(tmp_path: Path) -> None:
    write_tree(tmp_path, TREE)
    listed = list_image_folder(tmp_path, Preprocessing(8), class_level=2).images
    assert [
        (listed.class_names[label], str(name)) for label, name in zip(listed.labels, listed.names, strict=True)
    ] == [
        *(("apple", f"fruit/apple/{kind}_{index}.png") for kind in ("fuji/0", "gala/1") for index in (0, 1)),
        *(("oat", f"milk/oat/3_{index}.png") for index in (0, 1)),
        *(("pear", f"fruit/pear/2_{index}.png") for index in (0, 1)),
    ]


@pytest.mark.parametrize("place", ["", "train"])
def test_a_tree_that_can_be_read_in_two_ways_is_refused_until_class_level_is_given(tmp_path: Path, place: str) -> None:
    root = write_tree(tmp_path / place, TREE)
    with pytest.raises(ValueError) as raised:
        ImageFolderPairDataModule(tmp_path, **ARGUMENTS).load("train")
    assert str(raised.value) == (
        f"{str(root)!r} holds no class folder that holds an image itself: set class_level to 1 if its 2 folders "
        "('fruit', 'milk') are the classes, or to -1 if the folders that hold the images (4 names: 'fuji', 'gala', "
        "'oat', 'pear') are"
    )


def test_one_inner_folder_of_the_same_name_is_no_class(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", ["n01/images", "n02/images"])  # as in Tiny ImageNet
    source = ImageFolderPairDataModule(tmp_path, **ARGUMENTS).load("train")
    assert source is not None
    assert source.class_names == ["n01", "n02"]


def test_folds_are_joined_by_class_level(tmp_path: Path) -> None:
    write_tree(tmp_path, ["fold1/ant", "fold1/bee", "fold2/ant", "fold2/bee"])
    with pytest.raises(
        ValueError, match=r"one level too high: .* or set class_level \(1\), or 2 if 'ant', 'bee' are the"
    ):
        ImageFolderPairDataModule(tmp_path, **ARGUMENTS).load("train")
    source = ImageFolderPairDataModule(tmp_path, class_level=2, **ARGUMENTS).load("train")
    assert source is not None
    assert (source.class_names, source.labels.tolist()) == (["ant", "bee"], [0] * 4 + [1] * 4)


@pytest.mark.parametrize(
    "folders, class_level, message",
    [
        (TREE, 3, r"class_level 3 must name a folder above every image below '.*', but 'fruit/pear/2_0.png' has 2"),
        (TREE, -3, r"class_level -3 must name a folder above every image below '.*', but 'fruit/pear/2_0.png' has 2"),
        (["ant", "bee"], 0, "class_level must be positive .* or negative .*, got 0"),
    ],
)
def test_a_level_that_some_image_lacks_is_refused(
    tmp_path: Path, folders: list[str], class_level: int, message: str
) -> None:
    write_tree(tmp_path, folders)
    with pytest.raises(ValueError, match=message):
        ImageFolderPairDataModule(tmp_path, class_level=class_level, **ARGUMENTS).load("train")


def test_the_folder_above_may_be_the_coarse_class(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", ["fruit/apple", "fruit/pear", "milk/oat", "milk/soy"], 4)
    for class_level in (2, -1):
        data = ImageFolderPairDataModule(tmp_path, class_level=class_level, coarse="folder", **ARGUMENTS)
        data.setup("fit")
        assert data.coarse == {"fruit": ["apple", "pear"], "milk": ["oat", "soy"]}
        assert data.train_class_names == ["fruit", "milk"]
        assert data.class_names == ["apple", "oat", "pear", "soy"]
        _, labels = data.prepare(next(iter(data.train_dataloader())), augment=True)
        assert labels.bincount().tolist() == [2, 2]
    with pytest.raises(
        ValueError, match=r"coarse 'folder' requires a folder above each class folder .* at class_level 1"
    ):
        ImageFolderPairDataModule(tmp_path, class_level=1, coarse="folder", **ARGUMENTS).load("train")
    write_tree(tmp_path / "train", ["milk/apple"])
    with pytest.raises(ValueError, match="requires each class in one folder, but 'apple' is in 'fruit', 'milk'"):
        ImageFolderPairDataModule(tmp_path, class_level=2, coarse="folder", **ARGUMENTS).load("train")


# ---- further splits


def test_query_gallery_and_unknown_images(tmp_path: Path, lines: list[str]) -> None:
    for split, count in {"train": 3, "Query": 1, "gallery": 2}.items():
        write_folder(tmp_path / split, ("ant", "cow") if split == "Query" else ("ant", "bee"), count)
    write_tree(tmp_path / "unknown", [".", "any/where"], 3)
    data = ImageFolderPairDataModule(tmp_path, **ARGUMENTS)
    loaded = {split: data.load(split) for split in SPLIT_NAMES}
    found = {split: (source.class_names, len(source)) for split, source in loaded.items() if source is not None}
    assert found == {
        "train": (["ant", "bee"], 6),
        "query": (["ant", "cow"], 2),
        "gallery": (["ant", "bee"], 4),
        "unknown": (["unknown"], 6),
    }
    assert "6 png images of 1 class ('unknown')" in lines[-1]
    assert set(find_splits(tmp_path)) == {"train", "query", "gallery", "unknown"}


def test_a_class_called_unknown_is_said_to_be_one(tmp_path: Path, lines: list[str]) -> None:
    write_folder(tmp_path, ("cat", "dog", "unknown"))
    assert find_splits(tmp_path) == {"train": tmp_path}
    assert "is taken as a class; a split of that name requires a folder 'train' beside it" in lines[0]


# ---- left out and refused


def test_what_systems_leave_behind_is_left_out(tmp_path: Path, lines: list[str]) -> None:
    write_folder(tmp_path)
    for name in ("__MACOSX/ant", "@eaDir/ant", ".ipynb_checkpoints", "ant/@eaDir", "ant/.ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "0.png").write_bytes(b"no image")
    for name in ("ant/._0.png", "ant/.DS_Store", "bee/Thumbs.db", "bee/desktop.ini", "README.md"):
        (tmp_path / name).write_bytes(b"no image")
    data = load_image_folder(tmp_path, 8)
    assert (data.class_names, len(data)) == (["ant", "bee"], 6)
    assert lines[0].startswith(f"train split in {str(tmp_path)!r}: 6 png images of 2 classes, 3 each; ")
    assert "; left out: 2 .ipynb_checkpoints, 2 @eaD" in lines[0]
    for name in ("__MACOSX", "._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "README.md"):
        assert f"1 {name}" in lines[0] or "2 others" in lines[0]


@pytest.mark.parametrize("target", [".", "..", "../..", "../bee/deep"], ids=["itself", "root", "above", "round"])
def test_a_link_back_is_refused(tmp_path: Path, target: str) -> None:
    root = write_folder(tmp_path / "data")
    (root / "bee" / "deep").mkdir()
    (root / "bee" / "deep" / "back").symlink_to(root / "ant")
    (root / "ant" / "loop").symlink_to(target)
    with pytest.raises(ValueError, match=r"link '.*/data/(ant|bee)/.*' leads back to a folder that contains it"):
        load_image_folder(root, 8)


def test_links_elsewhere_are_followed(tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other")
    root = write_folder(tmp_path / "data", ("cow",))
    (root / "ant").symlink_to(other / "ant")
    (root / "cow" / "more").symlink_to(other / "bee")
    (root / "cow" / "one.png").symlink_to(other / "bee" / "0.png")
    assert load_image_folder(root, 8).labels.bincount().tolist() == [3, 7]


@pytest.mark.parametrize("name", ["cow", "ant/more", "ant/9.png"])
def test_a_broken_link_is_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError) as raised:
        load_image_folder(tmp_path, 8)
    assert raised.value.filename == str(tmp_path / name)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    write_folder(tmp_path)
    os.mkfifo(tmp_path / "ant" / "9.png")
    with pytest.raises(ValueError, match=r"9\.png' is neither a file nor a folder"):
        load_image_folder(tmp_path, 8)


@pytest.mark.parametrize("name", ["ant", "ant/deep", "ant/0.png"])
def test_what_may_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    root = write_folder(tmp_path / "data")
    write_folder(root / "ant", ("deep",))
    (root / name).chmod(0)
    answer = as_nobody(tmp_path, lambda: load_image_folder(root, 8, workers=1))
    (root / name).chmod(0o755)
    assert answer == f"PermissionError {root / name}"


# ---- what the log says


def odd_folder(root: Path) -> Path:
    write_folder(root, ("ant", "bee"), 3)
    image, exif = Image.fromarray(pixels(0)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(root / "ant" / "turned.jpg", exif=exif)
    image.convert("CMYK").save(root / "ant" / "print.jpg")
    image.convert("L").save(root / "ant" / "grey.png")
    clear = image.convert("RGBA")
    clear.putalpha(100)
    clear.save(root / "bee" / "clear.png")
    image.save(root / "bee" / "moving.gif", save_all=True, append_images=[Image.fromarray(pixels(1))])
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(root / "bee" / "deep.tif")
    return root


def test_one_log_line_counts_images_and_conversions(tmp_path: Path, lines: list[str]) -> None:
    root = odd_folder(tmp_path / "data")
    expected = (
        f"train split in {str(root)!r}: 12 images (8 png, 2 jpg, 1 gif, 1 tif) of 2 classes, 6 each; 8 x 8 pixels, "
        "used at this size; decoded into memory (2.1e-06 GiB); converted: 2 grey, 1 16-bit, upper byte kept, 1 CMYK, "
        "1 first picture of several, 1 transparency on white, 1 turned upright by EXIF"
    )
    images = load_image_folder(root, 8)
    assert lines == [expected]
    assert torch.equal(load_image_folder(root, 8).images, images.images)  # from the cache
    assert lines == [expected] * 2


def test_images_on_disk_equal_those_in_memory_and_the_log_names_what_is_not_counted(
    tmp_path: Path, lines: list[str]
) -> None:
    root = odd_folder(tmp_path / "data")
    disk, memory = load_image_folder(root, 8, max_memory=0), load_image_folder(root, 8)
    assert isinstance(disk, FolderImages)
    assert isinstance(memory, LabelledImages)
    assert torch.equal(disk.__getitems__(range(12))[0], memory.images)
    assert lines[0].endswith(
        "; decoded batch by batch (larger than max_memory_gib); not opened yet: a broken file ends the run when it is "
        "read (on_broken: skip checks all at start)"
    )


@pytest.mark.parametrize(
    "sizes, image_size, expected",
    [
        ([(8, 8), (8, 8)], 8, "8 x 8 pixels, used at this size"),
        ([(40, 40), (20, 20)], 12, "20 to 40 pixels square; shorter side resized to 12, centre cropped to 12 x 12"),
        ([(40, 30), (20, 50)], 12, "shorter side 20 to 30 pixels, longer side 40 to 50; shorter side resized to 12"),
        ([(40, 20), (20, 40)], 48, "shorter side 20 pixels, longer side 40; shorter side resized to 48, centre cropped "
        "to 48 x 48 (enlarged: image_size 20 is faster)"),
    ],
)  # fmt: skip
def test_the_log_says_the_sizes_and_what_is_done_to_them(
    tmp_path: Path, lines: list[str], sizes: list[tuple[int, int]], image_size: int, expected: str
) -> None:
    for name, (width, height) in zip(("ant", "bee"), sizes, strict=True):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(1, height, width)).save(tmp_path / name / "0.png")
    Image.fromarray(pixels(1, *sizes[1][::-1])).save(tmp_path / "bee" / "1.png")
    load_image_folder(tmp_path, image_size)
    assert f"3 png images of 2 classes, 1 ('ant') to 2 ('bee') each; {expected}" in lines[0]


@pytest.mark.parametrize(
    "preprocessing, expected",
    [
        (Preprocessing(12, crop_fraction=0.5), "shorter side resized to 24, centre cropped to 12 x 12"),
        (Preprocessing((12, 6), resize="squash"), "both sides resized to 6 x 12"),
        (Preprocessing(12, resize="pad", background="black"), "longer side resized, padded with black to 12 x 12"),
        (Preprocessing(12, channels=1), "shorter side resized to 12"),
    ],
)
def test_images_are_read_by_the_rule_of_the_model(
    tmp_path: Path, lines: list[str], preprocessing: Preprocessing, expected: str
) -> None:
    write_tree(tmp_path, ["ant", "bee"])
    for max_memory in (2**30, 0):
        source = read_images(list_image_folder(tmp_path, preprocessing), max_memory=max_memory)
        expected_image = preprocessing.read(tmp_path / "bee" / "1_0.png")[0]
        assert np.array_equal(source.__getitems__([2])[0][0].numpy(), expected_image)
        assert expected in lines[-1]
    with_statistics = replace(preprocessing, mean=(0.5,) * preprocessing.channels, std=(1.0,) * preprocessing.channels)
    assert fingerprint(tmp_path, [], with_statistics) == fingerprint(tmp_path, [], preprocessing)


def test_a_whole_picture_is_upright_and_a_large_jpeg_may_be_decoded_smaller(tmp_path: Path) -> None:
    root = odd_folder(tmp_path / "data")
    photo = Image.fromarray(pixels(3, 64, 96))
    photo.save(root / "ant" / "photo.jpg", quality=95)
    listed = load_image_folder(root, 8, max_memory=0)
    assert isinstance(listed, FolderImages)
    index = {str(name): position for position, name in enumerate(listed.names)}
    picture = listed.picture(index["ant/photo.jpg"])
    assert (picture.mode, picture.size) == ("RGB", (96, 64))
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(root / "ant" / "photo.jpg")))
    assert listed.picture(index["ant/photo.jpg"], (40, 30)).size == (48, 32)
    turned = np.asarray(Image.open(root / "ant" / "turned.jpg"))
    assert np.array_equal(np.asarray(listed.picture(index["ant/turned.jpg"])), np.rot90(turned, -1))
    subset = listed.subset(torch.tensor([index["bee/clear.png"]]))
    assert subset.picture(0).mode == "RGB"


def test_the_cache_knows_how_images_are_decoded(tmp_path: Path) -> None:
    root = odd_folder(tmp_path / "data")
    white, black = (load_image_folder(root, 8, background=colour) for colour in ("white", "black"))
    assert (white.images != black.images).flatten(1).any(1).sum() == 1
    brighter = load_image_folder(root, 8, max_value=40_000)
    assert (white.images != brighter.images).flatten(1).any(1).sum() == 1
    data = ImageFolderPairDataModule(root, background="black", max_value=40_000, val_fraction=0, **ARGUMENTS)
    data.setup("fit")
    images = torch.cat([batch[0] for batch in data.bank_dataloader()])
    assert (images != white.images).flatten(1).any(1).sum() == 2


def test_an_old_cache_is_not_used(tmp_path: Path) -> None:
    """A file as version 0.1 wrote it: another fingerprint, and no counts of conversions."""
    write_folder(tmp_path)
    (tmp_path / ".simo_lightning_8.pt").unlink(missing_ok=True)
    old = {"fingerprint": "0" * 32, "images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8), "checksum": 0}
    torch.save(old, tmp_path / ".simo_lightning_8.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image_folder(tmp_path, 8).images.any()


def test_few_labels_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, count=10)
    data = SemiSupervisedImageFolderPairDataModule(
        data_dir=tmp_path, label_fraction=0.4, views=2, val_fraction=0, **ARGUMENTS
    )
    data.setup("fit")
    images, labels = data.prepare(next(iter(data.train_dataloader())), augment=True)
    assert images.shape == (16, 3, 8, 8)
    assert (labels < 2).sum() == 8


# ---- broken files


def break_some(root: Path) -> set[str]:
    """Files of each kind of damage, and a class of which nothing is left."""
    write_folder(root, ("ant", "bee", "cow"), 4, size=32, suffix=".jpg")
    for number in range(4):
        (root / "cow" / f"{number}.jpg").write_bytes(b"no image")
    (root / "ant" / "1.jpg").write_bytes(b"")
    whole = (root / "bee" / "2.jpg").read_bytes()
    (root / "bee" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "bee" / "notes.txt").touch()
    return {"ant/1.jpg", "bee/2.jpg", *(f"cow/{number}.jpg" for number in range(4))}


@pytest.mark.parametrize("max_memory_gib", [1.0, 0.0], ids=["memory", "disk"])
def test_broken_files_are_counted_and_left_out(tmp_path: Path, lines: list[str], max_memory_gib: float) -> None:
    broken = break_some(tmp_path)
    good = [path for path in sorted(tmp_path.rglob("*.jpg")) if str(path.relative_to(tmp_path)) not in broken]
    arguments = {**ARGUMENTS, "image_size": 32, "max_memory_gib": max_memory_gib, "val_fraction": 0}
    for _ in range(2):  # the second time from the cache
        data = ImageFolderPairDataModule(tmp_path, on_broken="skip", **arguments)
        source = data.load("train")
        assert source is not None
        assert (source.class_names, source.labels.tolist()) == (["ant", "bee"], [0] * 3 + [1] * 3)
        images = source.__getitems__(range(6))[0].numpy()
        assert np.array_equal(images, [Preprocessing(32).read(path)[0] for path in good])
        assert lines.pop().endswith(
            "left out: 1 *.txt; 6 broken files ('ant/1.jpg', 'bee/2.jpg', 'cow/0.jpg', 'cow/1.jpg', 'cow/2.jpg' "
            "and 1 more)"
        )
    (cache,) = tmp_path.glob(".simo*")
    written = cache.stat().st_mtime_ns
    data = ImageFolderPairDataModule(tmp_path, on_broken="skip", **arguments)
    data.load("train")
    assert cache.stat().st_mtime_ns == written
    (tmp_path / "bee" / "notes.txt").unlink()
    data = ImageFolderPairDataModule(tmp_path, on_broken="error", **arguments)
    with pytest.raises(ValueError, match=r"1\.jpg' does not decode as an image: .*; remove it, or set on_broken to "):
        data.load("train")


def test_a_broken_file_that_is_repaired_is_used_again(tmp_path: Path) -> None:
    break_some(tmp_path)
    assert len(load_image_folder(tmp_path, 32, max_memory=0, on_broken="skip")) == 6
    Image.fromarray(pixels(5, 32, 32)).save(tmp_path / "cow" / "0.jpg")
    source = load_image_folder(tmp_path, 32, max_memory=0, on_broken="skip")
    assert (source.class_names, len(source)) == (["ant", "bee", "cow"], 7)


def test_processes_find_the_same_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_some(tmp_path)
    monkeypatch.setattr("simo_lightning.data.reading.CHUNK", 5)
    for max_memory in (2**30, 0):
        one, two = (load_image_folder(tmp_path, 32, max_memory, workers, on_broken="skip") for workers in (1, 2))
        assert torch.equal(one.__getitems__(range(6))[0], two.__getitems__(range(6))[0])
        for cache in tmp_path.glob(".simo*"):
            cache.unlink()
        again = load_image_folder(tmp_path, 32, max_memory, workers=2, on_broken="skip")
        assert torch.equal(one.__getitems__(range(6))[0], again.__getitems__(range(6))[0])


@pytest.mark.parametrize("max_memory", [2**30, 0])
def test_too_few_classes_after_broken_files(tmp_path: Path, max_memory: float) -> None:
    write_folder(tmp_path)
    for path in tmp_path.glob("bee/*"):
        path.write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"at least 2 classes of readable images for the train split, found 1: \['ant'\]"
    ):
        load_image_folder(tmp_path, 8, max_memory, on_broken="skip")
    assert load_image_folder(tmp_path, 8, max_memory, on_broken="skip", split="val").class_names == ["ant"]


def test_empty_class_folders_are_left_out(tmp_path: Path, lines: list[str]) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", ("bee",))
    for name in ("train/cow", "train/dog/deep", "val/ant", "val/cow"):
        (tmp_path / name).mkdir(parents=True)
    data = ImageFolderPairDataModule(tmp_path, **ARGUMENTS)
    train, val = data.load("train"), data.load("val")
    assert train is not None
    assert val is not None
    assert (train.class_names, val.class_names) == (["ant", "bee"], ["bee"])
    assert lines[1].endswith("left out: 2 empty class folders ('cow', 'dog')")
    assert lines[2].endswith("left out: 2 empty class folders ('ant', 'cow')")


def test_each_folder_is_read_once_and_no_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a listing takes time in proportion to the files, and little of it for each."""
    for number in range(50):
        (tmp_path / f"{number:02}").mkdir()
        for index in range(20):
            (tmp_path / f"{number:02}" / f"{index:02}.jpg").touch()
    read, scan, looked_at, look = Counter[str](), os.scandir, list[str](), os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: (read.update([str(path)]), scan(path))[1])
        patch.setattr(os, "stat", lambda path, **kwargs: (looked_at.append(str(path)), look(path, **kwargs))[1])
        listed = list_image_folder(tmp_path, Preprocessing(8)).images
    assert (len(listed), len(listed.class_names)) == (1000, 50)
    assert max(read.values()) == 1
    assert str(tmp_path) in looked_at
    assert not [path for path in looked_at if path.endswith(".jpg")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data_dir": None}, "data_dir or manifest must be given, got neither"),
        ({"on_broken": "ignore"}, "on_broken must be 'error' or 'skip', got 'ignore'"),
        ({"class_level": 0}, "class_level must be positive"),
        ({"manifest": "a.csv", "class_level": 1}, "class_level must be null with a manifest.*, got 1"),
        ({"manifest": "a.csv", "coarse": "folder"}, "coarse 'folder' requires class folders, got a manifest"),
        ({"coarse": "manifest"}, "coarse 'manifest' requires a manifest, got none"),
        ({"max_memory_gib": -1}, "max_memory_gib must be non-negative, got -1"),
    ],
)
def test_arguments_are_checked_at_once(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolderPairDataModule(**{"data_dir": tmp_path, **arguments})


def test_photographs_are_224_pixels_where_nothing_else_is_known(tmp_path: Path) -> None:
    write_tree(tmp_path, ["ant", "bee"])
    source = ImageFolderPairDataModule(tmp_path).load("train")
    assert source is not None
    assert source.__getitems__([0])[0].shape == (1, 3, 224, 224)
