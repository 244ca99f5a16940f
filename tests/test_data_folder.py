"""Image folders as users have them: what is found, left out, refused and logged."""

import logging
import os
import warnings
from collections.abc import Iterator
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


def test_the_same_folders_in_each_class_are_allowed_below_train(tmp_path: Path) -> None:
    for name in ("ant/monday", "ant/tuesday", "bee/monday", "bee/tuesday"):
        write_folder(tmp_path / "train" / name, (".",), 2)
    assert len(load_image_folder(find_splits(tmp_path)["train"], 8)) == 8


def test_classes_with_only_subfolders_give_a_warning(tmp_path: Path) -> None:
    write_folder(tmp_path / "animal", ("cat", "dog"), 2)
    write_folder(tmp_path / "vehicle", ("car", "ship"), 2)
    with pytest.warns(
        UserWarning, match="only sub-folders, whose images are joined: are 'animal', 'vehicle' the class"
    ):
        found = find_splits(tmp_path)
    assert len(load_image_folder(found["train"], 8)) == 8


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
    assert lines[0].startswith(
        f"{str(tmp_path)!r}: 6 images of 2 classes (6 png); left out: 2 .ipynb_checkpoints, 2 @eaD"
    )
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
        f"{str(root)!r}: 12 images of 2 classes (8 png, 2 jpg, 1 gif, 1 tif); converted: 2 grey, "
        "1 16-bit, upper byte kept, 1 CMYK, 1 first picture of several, 1 transparency on white, "
        "1 turned upright by EXIF"
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
        "12 images of 2 classes (8 png, 2 jpg, 1 gif, 1 tif); larger than max_memory_gib, so they stay on disk: no "
        "file is opened yet, conversions are not counted, and a damaged file ends the run when it is read"
    )


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
