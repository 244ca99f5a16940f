"""Images packed into Arrow files: their bytes, order and labels, and training from them as from the folder."""

import contextlib
import errno
import hashlib
import json
import logging
import multiprocessing as mp
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from simo_lightning import SimOModule
from simo_lightning.cli import main
from simo_lightning.data import (
    HubPairDataModule,
    ImageFolderPairDataModule,
    PackedImages,
    PhotoAugment,
    SemiSupervisedImageFolderPairDataModule,
    pack_images,
    verify_packed,
)
from simo_lightning.testing import check_resume
from tests.test_data_folder import lines  # noqa: F401  # a fixture
from tests.test_data_sources import _own_cache, pixels, write_folder  # noqa: F401  # a fixture

ARGUMENTS: dict[str, Any] = {"image_size": 16, "classes_per_batch": 3, "samples_per_class": 2, "seed": 3}
CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True, scope="module")
def _no_bars() -> None:
    datasets.disable_progress_bars()


def write_photographs(root: Path, count: int = 8) -> Path:
    """Three splits; JPEG and PNG files of several sizes, one upright by EXIF, one grey of 16 bits, one transparent."""
    for split, number in (("train", count), ("val", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                picture = Image.fromarray(pixels(1000 * label + index, 40 + index, 72 - index))
                exif = Image.Exif()
                exif[0x0112] = 6 if index == 1 else 1
                picture.save(root / split / name / f"{index}.jpg", exif=exif, quality=90)
    Image.fromarray(np.full((20, 24), 30_000, dtype=np.uint16)).save(root / "train" / "ant" / "grey.png")
    Image.new("RGBA", (30, 20), (200, 10, 10, 90)).save(root / "train" / "bee" / "clear.png")
    return root


def sources(path: Path, stage: str | None = None, **arguments: Any) -> dict[str, Any]:
    """The splits of a data module, which keeps no image in memory."""
    data = ImageFolderPairDataModule(
        path, **{**ARGUMENTS, "max_memory_gib": 0, "mean": [0.5] * 3, "std": [0.2] * 3}, **arguments
    )
    data.setup(stage)
    return data._splits  # type: ignore[return-value]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- what is packed


def test_load_from_disk_opens_the_original_bytes_and_labels(tmp_path: Path) -> None:
    folder, packed = write_photographs(tmp_path / "photos"), tmp_path / "packed"
    done = pack_images(folder, packed, shard_size=0.02, workers=2)
    opened = datasets.load_from_disk(str(packed))
    assert list(opened) == ["train", "val", "test"]
    assert (done.images, done.written, done.files) == (41, 41, len(list(packed.glob("*/*.arrow"))))
    assert done.files > 3
    for split, table in opened.items():
        expected = sorted((folder / split).rglob("*.*"))
        assert table.features["label"].names == list(CLASSES)
        assert table["path"][:] == [str(path.relative_to(folder / split)) for path in expected]
        assert [CLASSES[label] for label in table["label"]] == [path.parent.name for path in expected]
        stored = table.cast_column("image", datasets.Image(decode=False))["image"]
        assert [each["bytes"] for each in stored] == [path.read_bytes() for path in expected]
        with Image.open(expected[0]) as picture:
            assert table[0]["image"].size == picture.size
    listed = json.loads((packed / "pack.json").read_text())["files"]
    own = files_of(packed)
    assert listed.keys() == own.keys() - {"pack.json", "dataset_dict.json"}
    for name, file in listed.items():
        assert (file["bytes"], file["sha256"]) == (len(own[name]), hashlib.sha256(own[name]).hexdigest())
    hub = HubPairDataModule(packed, **ARGUMENTS)
    hub.setup("fit")
    assert len(hub._training) == 26


def test_each_index_is_the_same_image_as_in_the_folder(tmp_path: Path, lines: list[str]) -> None:  # noqa: F811
    folder, packed = write_photographs(tmp_path / "photos"), tmp_path / "packed"
    pack_images(folder, packed, shard_size=0.02)
    del lines[:]
    found = sources(packed)
    assert lines[0] == f"{str(packed)!r}: packed images, 26 in the train split, 9 in the val split, 6 in the test split"
    for split, source in sources(folder).items():
        other = found[split]
        assert isinstance(other, PackedImages)
        assert other.names.tolist() == source.names.tolist()
        assert (other.labels.tolist(), other.class_names) == (source.labels.tolist(), source.class_names)
        assert torch.equal(other.__getitems__(range(len(other)))[0], source.__getitems__(range(len(source)))[0])
        for index in range(0, len(other), 4):
            for size in (None, (8, 9)):
                assert other.picture(index, size).tobytes() == source.picture(index, size).tobytes()
    sent = pickle.dumps(found["train"])  # to a worker that is not forked: names of files, no images
    assert len(sent) < 30_000 < sum(file.stat().st_size for file in packed.glob("train/*.arrow"))
    again = pickle.loads(sent)
    assert torch.equal(again.__getitems__([7])[0], found["train"].__getitems__([7])[0])
    chosen = found["train"].subset(torch.tensor([20, 3]))
    assert torch.equal(chosen.__getitems__([1])[0], found["train"].__getitems__([3])[0])


def test_a_manifest_with_coarse_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "all", CLASSES, count=4)
    rows = [f"all/{name}/{number}.png,{name},{'val' if number == 3 else 'train'},{kind}" for number in range(4)
            for name, kind in zip(CLASSES, ("insect", "insect", "mammal"), strict=True)]  # fmt: skip
    Path("labels.csv").write_text("path,label,split,coarse\n" + "\n".join(rows))
    Path("uneven.csv").write_text("path,label,split,coarse\n" + "\n".join(rows).replace("insect", "", 1))
    for name in ("labels", "uneven"):
        pack_images(f"{name}.csv", name)
    assert datasets.load_from_disk("labels")["val"].features["coarse"].names == ["insect", "mammal"]
    made = []
    for words in ({"manifest": "labels.csv"}, {"data_dir": "labels"}):
        data = ImageFolderPairDataModule(**words, **{**ARGUMENTS, "classes_per_batch": 2}, coarse="manifest")
        data.setup()
        made.append((data._coarse, data.class_names, data._training.labels.tolist(), len(data._splits["val"])))  # type: ignore[arg-type]
    assert made[0] == made[1]
    assert made[0][0] == {"insect": ["ant", "bee"], "mammal": ["cow"]}
    with pytest.raises(ValueError, match=r"coarse must be one name for all images of class 'ant' in .*, got ''"):
        ImageFolderPairDataModule("uneven", **ARGUMENTS, coarse="manifest").setup()


def test_a_deeper_tree_with_an_unknown_split(tmp_path: Path) -> None:
    for kind, names in {"insect": ("ant", "bee"), "mammal": ("cow",)}.items():
        write_folder(tmp_path / "tree" / "train" / kind, names, count=4)
    write_folder(tmp_path / "tree" / "unknown", ("x", "y"), count=2)
    pack_images("tree", "packed", class_level=2)
    assert datasets.load_from_disk("packed")["train"].features["coarse"].names == ["insect", "mammal"]
    made = []
    for path, level in (("tree", 2), ("packed", None), ("packed", 2)):
        data = ImageFolderPairDataModule(path, **ARGUMENTS, class_level=level, coarse="folder")
        data.setup()
        unknown: Any = data._splits["unknown"]
        made.append((data._coarse, data.class_names, unknown.class_names, unknown.images.sum().item()))
    assert made[0] == made[1] == made[2]
    with pytest.raises(ValueError, match=r"class_level must be null or 2, with which .* was packed, got 1"):
        ImageFolderPairDataModule("packed", class_level=1).setup()
    Path("labels.csv").write_text("path,label\na.png,ant\n")
    with pytest.raises(ValueError, match="manifest must be null with the packed images of 'packed'"):
        ImageFolderPairDataModule("packed", manifest="labels.csv")


def test_broken_files_are_an_error_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_photographs(tmp_path / "photos")
    whole = (folder / "train" / "bee" / "3.jpg").read_bytes()
    (folder / "train" / "bee" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"bee/3\.jpg' does not decode as an image: .*set on_broken to 'skip'$"):
        pack_images(folder, "packed")
    with pytest.raises(SystemExit):
        main(["pack", str(folder), "packed", "--no_progress"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"simo pack: error: '{folder}/train/bee/3.jpg' does not decode as an image: ")
    shutil.rmtree("packed")
    (folder / "train" / "ant" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt' is not an image"):
        pack_images(folder, "packed")
    done = pack_images(folder, "packed", on_broken="skip")
    assert done.notes == ["train split: left out 1 *.txt", "left out 1 broken files ('bee/3.jpg')"]
    assert pack_images(folder, "packed", on_broken="skip").notes == done.notes  # all were there already
    found, expected = sources(tmp_path / "packed"), sources(folder, on_broken="skip")
    for split, source in expected.items():
        assert found[split].names.tolist() == source.names.tolist()


# ---- training


def fit_weights(path: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    import lightning.pytorch as pl

    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    module = SimOModule(encoder, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ImageFolderPairDataModule(path, **ARGUMENTS, **arguments))
    return module.state_dict()


@pytest.mark.parametrize(
    "arguments", [{}, {"augment": PhotoAugment(), "num_workers": 1, "max_memory_gib": 0}], ids=["memory", "files"]
)
def test_the_weights_are_those_of_a_fit_from_the_folder(tmp_path: Path, arguments: dict[str, Any]) -> None:
    folder = write_photographs(tmp_path / "photos", count=6)
    pack_images(folder, "packed", shard_size=0.02)
    one, other = fit_weights(folder, **arguments), fit_weights(tmp_path / "packed", **arguments)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    if not arguments:
        again = fit_weights(tmp_path / "packed")  # from the cache
        assert all(torch.equal(value, again[name]) for name, value in one.items())


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", CLASSES, count=8)
    pack_images("photos", "packed")

    def module() -> SimOModule:
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
        return SimOModule(encoder, optimizer=partial(torch.optim.SGD, lr=0.1))

    given = {**ARGUMENTS, "augment": PhotoAugment(), "num_workers": 1, "max_memory_gib": 0, "val_fraction": 0}
    check_resume(module, lambda: ImageFolderPairDataModule("packed", **given))
    few = SemiSupervisedImageFolderPairDataModule(data_dir="packed", **ARGUMENTS, label_fraction=0.5, views=2)
    few.setup("fit")
    assert int(few._labelled.sum()) == 12


class OfARank(ImageFolderPairDataModule):
    """The data module on one of two ranks."""

    rank, world_size = 0, 2  # type: ignore[assignment]


def test_two_ranks_with_workers_see_every_image_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", CLASSES, count=8)
    pack_images("photos", "packed", shard_size=0.001)
    seen = []
    for rank in range(2):
        data = OfARank("packed", **{**ARGUMENTS, "image_size": 8}, augment=None, num_workers=2, max_memory_gib=0,
                       val_fraction=0)  # fmt: skip
        data.rank = rank  # type: ignore[misc]
        data.setup("fit")
        loader = data.train_dataloader()
        seen += [image.permute(1, 2, 0).numpy().tobytes() for batch in loader for image in batch[0]]
    assert sorted(seen) == sorted(pixels(100 * label + number).tobytes() for label in range(3) for number in range(8))


# ---- stopped, changed, full


def pack_in_a_process(folder: Path, dest: Path, delay: float = 0.0) -> Any:
    """``pack_images`` in a process of its own, which waits before each image."""

    def work() -> None:
        os.setsid()
        from simo_lightning.data import arrow

        checked = arrow.checked_bytes
        arrow.checked_bytes = lambda path: (time.sleep(delay), checked(path))[1]  # type: ignore[assignment,func-returns-value]
        pack_images(folder, dest, shard_size=0.01, workers=2)

    process = mp.get_context("fork").Process(target=work)
    process.start()
    return process


def processes_of(group: int) -> list[str]:
    """Processes of a group that run, from Linux's /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if own == str(group) and state != "Z" else []
    return found


def test_a_killed_call_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder, whole, dest = write_photographs(tmp_path / "photos", count=20), tmp_path / "whole", tmp_path / "dest"
    pack_images(folder, whole, shard_size=0.01)
    process = pack_in_a_process(folder, dest, delay=0.02)
    while len(list(dest.glob("train/data-*.arrow"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(ValueError, match=r"dest '.*dest' is being written by another process"):
        pack_images(folder, dest, shard_size=0.01)
    os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
    process.join()
    kept = {path: path.stat().st_mtime_ns for path in dest.glob("train/data-*.arrow")}
    assert 3 <= len(kept) < len(list(whole.glob("*/*.arrow")))
    with pytest.raises(ValueError, match="is not packed completely: start the same simo pack again, which goes on"):
        ImageFolderPairDataModule(dest).setup()
    with pytest.raises(
        ValueError, match=r"was begun with shard_size 0\.01, not 0\.02: finish it with the same arguments"
    ):
        pack_images(folder, dest, shard_size=0.02)
    deadline = time.monotonic() + 20
    while running := processes_of(process.pid):
        assert time.monotonic() < deadline, running
        time.sleep(0.05)
    kept = {path: path.stat().st_mtime_ns for path in dest.glob("train/data-*.arrow")}
    pack_images(folder, dest, shard_size=0.01)
    assert files_of(dest) == files_of(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not written again
    assert pack_images(folder, dest, shard_size=0.01).written == 0
    os.utime(folder / "train" / "ant" / "0.jpg", ns=(1, 1))
    with pytest.raises(FileExistsError, match="was packed with other images: remove it, or give another name"):
        pack_images(folder, dest, shard_size=0.01)


def test_what_is_in_the_way_is_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"dest must be new, empty or packed before, but .* holds 'thesis.txt'"):
        pack_images(folder, "mine")
    with pytest.raises(FileExistsError, match="dest must be a folder, got the file"):
        pack_images(folder, "mine/thesis.txt")
    with pytest.raises(ValueError, match="dest must lie outside of the folder that is packed"):
        pack_images(folder, folder / "packed")
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"mine"}
    for arguments, message in (
        ({"format": "tar"}, "format must be one of arrow, got 'tar'"),
        ({"shard_size": 0}, "shard_size must be positive and finite, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"on_broken": "keep"}, "on_broken must be 'error' or 'skip', got 'keep'"),
        ({"data_dir": "x"}, "data_dir must be None unless a manifest is packed, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_images(folder, "new", **arguments)  # type: ignore[arg-type]
    os.rename(folder / "ant" / "0.png", os.fsencode(folder / "ant") + b"/\xff.png")
    with pytest.raises(ValueError, match=r"names of files must be UTF-8, got b'.*ant/\\xff.png'"):
        pack_images(folder, "new")


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    """A file system of 512 KiB."""
    return mounted("512k")


def test_a_full_disk_is_one_line_and_a_second_start_goes_on(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_photographs(tmp_path / "photos", count=20)
    (small_disk / "filler").write_bytes(bytes(384 * 2**10))
    dest = small_disk / "packed"
    words = ["pack", str(folder), str(dest), "--shard_size", "0.03", "--workers", "2", "--no_progress"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        f"simo pack: error: [Errno {errno.ENOSPC}] No space left on device; the same command goes on"
    )
    assert list(dest.glob("train/data-*.arrow"))
    assert not list(dest.glob("*/.*.part"))
    (small_disk / "filler").unlink()
    main(words)
    pack_images(folder, "whole", shard_size=0.03)
    assert files_of(dest) == files_of(tmp_path / "whole")


def test_a_limit_of_file_size_is_one_line(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photos", count=20)

    def work() -> None:
        logging.disable()  # the limit is that of the file that pytest captures into, too
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
        try:
            pack_images(folder, "packed", workers=1)
        except OSError as error:
            # of a split: both are too large, and either may be the first to be told
            ok = error.errno == errno.EFBIG and str(error.filename).endswith("/data-00000-of-00001.arrow")
            os._exit(7 if ok else 1)

    process = mp.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 7


def test_changed_files_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, packed = write_photographs(tmp_path / "photos"), tmp_path / "packed"
    main(["pack", str(folder), str(packed), "--shard_size", "0.03", "--verify", "--no_progress"])
    out = capsys.readouterr().out
    files = len(list(packed.glob("*/*.arrow")))
    assert f"41 images in {packed} ({files} files, " in out
    assert f"{files + 6} files of " in out
    main(["pack", str(packed), "--verify", "--no_progress"])
    shard = sorted(packed.glob("train/*.arrow"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 of \d+ files in .* are missing or have changed: 'train/{shard.name}'"):
        verify_packed(packed)
    shard.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=rf"{shard.name}' must have {len(content):,} bytes as it was packed, got"):
        ImageFolderPairDataModule(packed).setup()
    shard.unlink()
    with pytest.raises(SystemExit):
        main(["pack", str(packed), "--verify", "--no_progress"])
    assert "are missing or have changed" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=shard.name):
        ImageFolderPairDataModule(packed).setup()
    (packed / "pack.json").write_text("[]")
    with pytest.raises(ValueError, match=r"pack\.json' is not a file of simo pack"):
        ImageFolderPairDataModule(packed).setup()
    with pytest.raises(SystemExit):
        main(["pack", str(packed)])
    assert "dest must be given unless a packed folder is verified" in capsys.readouterr().err


def test_an_image_that_has_changed_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", CLASSES, count=4)
    pack_images("photos", "packed")
    (shard,) = Path("packed/train").glob("*.arrow")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(Path("photos/bee/1.png").read_bytes()[:30], bytes(30)))
    source = ImageFolderPairDataModule(
        "packed", **ARGUMENTS, max_memory_gib=0, mean=[0.5] * 3, std=[0.2] * 3, val_fraction=0
    )
    with pytest.raises(
        ValueError, match=r"packed/train/\w+/\d\.png' does not decode .*; simo pack .* --verify tells which"
    ):
        source.setup()


class Touches:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_opening_runs_nothing_that_a_file_holds(tmp_path: Path) -> None:
    """An Arrow file with a pickled extension type, which pyarrow loaded before 14.0.1."""
    write_folder(tmp_path / "photos", CLASSES, count=4)
    pack_images("photos", "packed")
    (shard,) = Path("packed/train").glob("*.arrow")
    with pa.memory_map(str(shard)) as file:
        table = pa.ipc.open_stream(file).read_all()
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Touches())}
    schema = table.schema.set(1, table.schema.field("path").with_metadata(metadata))
    with pa.OSFile("new", "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_table(table.cast(schema))
    os.replace("new", shard)
    info = json.loads(Path("packed/pack.json").read_text())
    info["files"][f"train/{shard.name}"]["bytes"] = shard.stat().st_size
    Path("packed/pack.json").write_text(json.dumps(info))
    data = ImageFolderPairDataModule("packed", **ARGUMENTS)
    data.setup()
    assert not Path("ran").exists()
