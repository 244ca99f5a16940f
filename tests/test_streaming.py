"""Streams of images: what is written, the order of batches, and an S3 server that fails in several ways."""

import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import lightning.pytorch as pl
import litdata
import numpy as np
import pytest
import torch
from PIL import Image

from simo_lightning import SimOModule
from simo_lightning.cli import main
from simo_lightning.data import ClassBalancedSampler, PhotoAugment
from simo_lightning.streaming import Record, StreamPairDataModule, StreamSampler, open_stream, store, write_stream
from tests.rank_processes import saved, start_ranks
from tests.s3_server import BUCKET, BreakingProxy, options, s3_server, upload

CLASSES = ["ant", "bee", "cow", "dog"]
PER_CLASS = 24
SMALL = {"bundle_size": 4, "chunk_bytes": 9000}


def write_images(folder: Path, per_class: int = PER_CLASS) -> list[Record]:
    """PNG files of noise, whose first pixel tells the number of the file, in class folders."""
    records = []
    for split, count in {"train": per_class, "val": 6}.items():
        for label, name in enumerate(CLASSES):
            for number in range(count):
                array = np.random.default_rng([label, number, count]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                array[0, 0] = label, number, 0
                path = Path(split, name, f"{number}.png")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / path)
                records.append(Record(path, label, split, "insect" if label < 2 else "mammal"))
    return records


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("images")
    return folder, write_images(folder)


@pytest.fixture(scope="module")
def stream(images: tuple[Path, list[Record]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, records = images
    folder = tmp_path_factory.mktemp("stream")
    write_stream(records, CLASSES, folder, root, **SMALL, workers=1)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


def module(data_dir: Any, tmp_path: Path, **arguments: Any) -> StreamPairDataModule:
    given = {"classes_per_batch": 3, "samples_per_class": 4, "image_size": 16, "num_workers": 0, "window": 3}
    given |= {"cache_dir": tmp_path / "cache", "augment": None, "mean": [0.5] * 3, "std": [0.25] * 3}
    return StreamPairDataModule(data_dir, **given | arguments)


# ---- what is written


def test_litdata_reads_the_same_bytes(images: tuple[Path, list[Record]], stream: Path) -> None:
    root, records = images
    for split in ("train", "val"):
        found = {
            bytes(path).decode(): (bytes(image), label)
            for image, label, path in litdata.StreamingDataset(str(stream / split))
        }
        expected = {str(r.path): ((root / r.path).read_bytes(), r.label) for r in records if r.split == split}
        assert found == expected
        labels = [label for _, label, _ in litdata.StreamingDataset(str(stream / split))]
        assert labels == np.load(stream / split / "labels.npy").tolist()


def test_simo_pack_writes_and_verifies_a_stream(images: tuple[Path, list[Record]], tmp_path: Path) -> None:
    (root, records), dest = images, str(tmp_path / "stream")
    main(["pack", str(root), dest, "--format", "litdata", "--workers", "1", "--no_progress"])
    found = {}
    for split in ("train", "val"):
        for content, label, path in litdata.StreamingDataset(str(Path(dest, split))):
            found[bytes(path).decode()] = (CLASSES[label], bytes(content))
    assert found == {str(one.path): (CLASSES[one.label], (root / one.path).read_bytes()) for one in records}
    main(["pack", dest, "--verify", "--no_progress"])
    chunk = Path(dest, "train", "chunk-0-0.bin")
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit, match="1"):
        main(["pack", dest, "--verify", "--no_progress"])


def test_an_image_that_does_not_decode_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", per_class=2)
    (tmp_path / "images/train/ant/0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="1"):
        main(["pack", str(tmp_path / "images"), str(tmp_path / "stream"), "--format", "litdata", "--no_progress"])
    assert "ant/0.png' does not decode as an image: its format is unknown; remove it (" in capsys.readouterr().err
    assert not (tmp_path / "stream" / "stream.json").exists()


def test_files_depend_on_the_seed_alone(images: tuple[Path, list[Record]], stream: Path, tmp_path: Path) -> None:
    root, records = images
    for seed, workers in ((0, 2), (1, 1)):
        write_stream(records, CLASSES, tmp_path / str(seed), root, **SMALL, seed=seed, workers=workers)
    files = {path.relative_to(stream): path.read_bytes() for path in stream.rglob("*") if path.is_file()}
    again = {
        path.relative_to(tmp_path / "0"): path.read_bytes() for path in (tmp_path / "0").rglob("*") if path.is_file()
    }
    assert again == files
    assert not np.array_equal(np.load(tmp_path / "1/train/labels.npy"), np.load(stream / "train/labels.npy"))


def test_classes_come_in_bundles_that_are_spread_evenly(stream: Path) -> None:
    labels = np.load(stream / "train" / "labels.npy")
    runs = np.split(labels, np.flatnonzero(np.diff(labels)) + 1)
    assert all(len(run) % 4 == 0 for run in runs)
    for third in np.split(labels, 3):  # each bundle may move by its sixth of the whole
        assert np.bincount(third, minlength=4).min() >= 4
    sizes = [path.stat().st_size for path in (stream / "train").glob("*.bin")]
    assert len(sizes) > 4
    assert max(sizes) <= 9000
    assert json.loads((stream / "stream.json").read_text())["coarse"] == {"insect": CLASSES[:2], "mammal": CLASSES[2:]}


def test_what_cannot_be_written_is_refused(images: tuple[Path, list[Record]], stream: Path, tmp_path: Path) -> None:
    root, records = images
    with pytest.raises(FileExistsError, match="destination must be a new or empty folder"):
        write_stream(records, CLASSES, stream, root)
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.0, an index into class_names, got 1"):
        write_stream(records, ["ant"], tmp_path / "a", root)
    with pytest.raises(ValueError, match="records must hold at least one image"):
        write_stream([], CLASSES, tmp_path / "a", root)
    with pytest.raises(ValueError, match="coarse must be the same for all images of a class"):
        write_stream([*records, Record("x", 0, "train", "fish")], CLASSES, tmp_path / "a", root)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write_stream([*records, Record("missing.png", 0, "train", "insect")], CLASSES, tmp_path / "b", root)
    with pytest.raises(FileNotFoundError, match=r"found no stream\.json"):  # it was not written to its end
        open_stream(tmp_path / "b")


# ---- the order


def bundled(counts: list[int], bundle: int, per_chunk: int) -> tuple[torch.Tensor, np.ndarray]:
    """Labels in the order of a stream, and their chunks of whole bundles."""
    from simo_lightning.streaming.write import arrange

    labels = np.repeat(np.arange(len(counts)), counts)
    order, _ = arrange(labels, bundle, np.random.default_rng(0))
    return torch.from_numpy(labels[order]), np.arange(len(labels)) // per_chunk


def most_batches(groups: list[int], per_batch: int) -> int:
    """By trying: take the classes with the most groups left, until there are too few."""
    left, batches = list(groups), 0
    while sum(count > 0 for count in left) >= per_batch:
        for label in sorted(range(len(left)), key=lambda label: -left[label])[:per_batch]:
            left[label] -= 1
        batches += 1
    return batches


@pytest.mark.parametrize(
    ("counts", "small_classes"),
    [
        ([64] * 12, "error"),
        ([8 * n for n in range(1, 25)], "error"),
        ([3, 5, 400, 31, 90, 7, 70, 64, 50, 41], "repeat"),
    ],
    ids=["equal", "unequal", "long tail"],
)
def test_batches_are_balanced_and_as_many_as_possible(counts: list[int], small_classes: Any) -> None:
    labels, chunks = bundled(counts, 8, 64)
    sampler = StreamSampler(labels, chunks, 2, 5, 4, seed=3, small_classes=small_classes)
    groups = [max(count // 4, 1) for count in counts]
    for epoch in range(3):
        blocks = sampler.epoch_blocks(epoch)
        assert len(blocks) == sampler.batches == most_batches(groups, 5)
        assert sampler.batches == ClassBalancedSampler(labels, 5, 4, small_classes=small_classes).batches
        for block in blocks:
            assert sorted(np.bincount(labels.numpy()[block], minlength=len(counts)))[-5:] == [4] * 5
        used = np.bincount(blocks.ravel(), minlength=len(labels))
        assert used[np.isin(labels, np.flatnonzero(np.array(counts) >= 4))].max() == 1
        if counts == [64] * 12:
            assert used.sum() == 12 * 64 // 20 * 20


def test_an_epoch_is_a_function_of_seed_and_epoch_and_is_shared_by_the_ranks() -> None:
    labels, chunks = bundled([64] * 12, 8, 64)
    make = partial(StreamSampler, labels, chunks, 2, 4, 4)
    whole = make(seed=1).epoch_blocks(5)
    assert np.array_equal(make(seed=1).epoch_blocks(5), whole)
    for other in (make(seed=2).epoch_blocks(5), make(seed=1).epoch_blocks(6)):
        groups = {frozenset(group) for group in whole.reshape(-1, 4).tolist()}
        again = {frozenset(group) for group in other.reshape(-1, 4).tolist()}
        assert len(groups & again) < len(groups) / 20
    for world in (1, 2, 3, 4):
        seen = []
        for rank in range(world):
            sampler = make(seed=1, rank=rank, world_size=world)
            sampler.set_epoch(5)
            seen += list(sampler)
        assert seen == whole[: 48 // world * world].ravel().tolist()
        assert sorted(seen) == list(range(len(labels)))
    sampler.start_batch = 3
    assert list(sampler) == seen[-12 * 16 :][3 * 16 :]


def test_few_chunks_are_open_at_a_time() -> None:
    labels, chunks = bundled([320] * 40, 32, 640)  # 20 chunks of 20 bundles
    sampler = StreamSampler(labels, chunks, 4, 10, 8)
    of_batch = chunks[sampler.epoch_blocks(0)]  # (160, 80)
    first = np.array([np.flatnonzero((of_batch == chunk).any(1))[0] for chunk in range(20)])
    last = np.array([np.flatnonzero((of_batch == chunk).any(1))[-1] for chunk in range(20)])
    at_once = [int(((first <= batch) & (batch <= last)).sum()) for batch in range(len(of_batch))]
    assert max(at_once) <= 4 + 3
    halves = [StreamSampler(labels, chunks, 4, 10, 8, rank=rank, world_size=2).rank_blocks() for rank in (0, 1)]
    assert all(len(np.unique(chunks[half])) <= 10 + 4 + 2 for half in halves)


# ---- the data module


def test_an_epoch_shows_every_image_once(stream: Path, tmp_path: Path) -> None:
    data = module(stream, tmp_path)
    data.setup("fit")
    seen = [tuple(image[:, 0, 0].tolist()) for batch in data.train_dataloader() for image in batch.images]
    assert sorted(seen) == sorted((label, number, 0) for label in range(4) for number in range(PER_CLASS))
    assert data.class_names == CLASSES
    (batch,) = data.val_dataloader()
    assert batch[1].tolist() == np.load(stream / "val" / "labels.npy").tolist()
    assert batch[0][:, 0, 0, 0].tolist() == batch[1].tolist()
    bank = [label for _, labels in data.bank_dataloader(12) for label in labels.tolist()]
    assert np.bincount(bank).tolist() == [3] * 4
    coarse = module(stream, tmp_path, coarse="stream", classes_per_batch=2)
    coarse.setup("fit")
    assert coarse.train_class_names == ["insect", "mammal"]
    assert sorted(next(iter(coarse.train_dataloader())).labels.bincount().tolist()) == [4, 4]


def test_what_cannot_be_followed_is_refused(stream: Path, tmp_path: Path, server: int) -> None:
    with pytest.raises(ValueError, match="window must be at least 1 chunk, got 0"):
        module(stream, tmp_path, window=0)
    with pytest.raises(ValueError, match="class_sampling must be 'natural' for a stream"):
        module(stream, tmp_path, class_sampling="sqrt")
    with pytest.raises(ValueError, match=r"data_dir must be a local folder or s3://BUCKET/PREFIX, got 'gs://b/c'"):
        module("gs://b/c", tmp_path)
    with pytest.raises(ValueError, match="max_cache_size must be a size such as '100GB'"):
        module(stream, tmp_path, max_cache_size="much")
    with pytest.raises(FileNotFoundError, match=r"found no stream\.json in"):
        module(tmp_path, tmp_path).setup("fit")
    url = upload(stream, "refused", server)
    data = module(url, tmp_path, storage_options=options(server), max_cache_size="20KB")
    data.setup("fit")
    with pytest.raises(ValueError, match=r"max_cache_size must hold window \+ 2 = 5 chunks of .* got '20KB'"):
        data.train_dataloader()
    with pytest.raises(FileNotFoundError, match=rf"found no stream\.json in 's3://{BUCKET}/elsewhere'"):
        module(f"s3://{BUCKET}/elsewhere", tmp_path, storage_options=options(server)).setup("fit")


def test_a_checkpoint_from_within_an_epoch_needs_the_same_order(stream: Path, tmp_path: Path) -> None:
    data = module(stream, tmp_path)
    data.setup("fit")
    loader = data.train_dataloader()
    next(iter(loader))
    other = module(stream, tmp_path, window=2)
    other.setup("fit")
    with pytest.raises(ValueError, match=r"saved after batch 1 with .*'window': 3.* this run has .*'window': 2"):
        other.train_dataloader().load_state_dict(loader.state_dict())


# ---- an object store


def batches(data: StreamPairDataModule) -> list[torch.Tensor]:
    data.setup("fit")
    return [batch.images for batch in data.train_dataloader()]


def test_a_bucket_gives_the_batches_of_the_folder(stream: Path, tmp_path: Path, server: int) -> None:
    url = upload(stream, "same", server)
    size = 7 * 9000
    for workers in (0, 2):
        data = module(url, tmp_path, storage_options=options(server), max_cache_size=size, num_workers=workers)
        for ours, local in zip(batches(data), batches(module(stream, tmp_path)), strict=True):
            assert torch.equal(ours, local)
        copies = [path.stat().st_size for path in (tmp_path / "cache").glob("*.bin")]
        assert sum(copies) <= size
        assert len(copies) < len(list((stream / "train").glob("*.bin")))


def test_pictures_are_augmented_from_a_bucket_as_from_the_folder(stream: Path, tmp_path: Path, server: int) -> None:
    url, words = upload(stream, "photos", server), {"augment": PhotoAugment(), "views": 2, "coarse": "stream"}
    words |= {"classes_per_batch": 2, "unseen_classes": ["cow"], "mean": None, "std": None}
    bucket = module(url, tmp_path, storage_options=options(server), num_workers=1, **words)
    local = module(stream, tmp_path, **words)
    for ours, other in zip(batches(bucket), batches(local), strict=True):
        assert ours.shape == (8, 2, 3, 16, 16)
        assert torch.equal(ours, other)
    assert bucket.mean == local.mean
    assert bucket.unseen_class_names == ["cow"]


@pytest.mark.parametrize("change", ["longer", "same size", "removed"])
def test_an_object_that_changes_ends_the_run(change: str, stream: Path, tmp_path: Path, server: int) -> None:
    url, client = upload(stream, change.replace(" ", "_"), server), boto3.client("s3", **options(server))
    data = module(url, tmp_path, storage_options=options(server), num_workers=1)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    for path in (stream / "train").glob("*.bin"):
        key, content = f"{change.replace(' ', '_')}/train/{path.name}", path.read_bytes()
        if change == "removed":
            client.delete_object(Bucket=BUCKET, Key=key)
        else:
            changed = content + b"x" if change == "longer" else content[:-1] + b"x"
            client.put_object(Bucket=BUCKET, Key=key, Body=changed)
    expected = {"longer": r"it has [\d,]+ bytes: it has changed", "same size": "its SHA-256 differs: it has changed"}
    name = rf"'s3://{BUCKET}/\w+/train/chunk-0-\d+\.bin'"
    if change == "removed":
        with pytest.raises(FileNotFoundError, match=f"there is no such object: {name}"):
            list(loader)
    else:
        with pytest.raises(ValueError, match=rf"{name} is not the file of [\d,]+ bytes .*, {expected[change]}"):
            list(loader)


def test_a_local_file_that_changes_ends_the_run(images: tuple[Path, list[Record]], tmp_path: Path) -> None:
    root, records = images
    write_stream(records, CLASSES, tmp_path / "stream", root, bundle_size=4, chunk_bytes=10**6, workers=1)
    data = module(tmp_path / "stream", tmp_path)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    next(loader)
    (chunk,) = (tmp_path / "stream" / "train").glob("*.bin")
    with open(chunk, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(ValueError, match=r"train/chunk-0-0\.bin' is not the file of .* its SHA-256 differs"):
        list(loader)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAUSE", 0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_connection_is_tried_again(
    quick: None, workers: int, stream: Path, tmp_path: Path, server: int
) -> None:
    url = upload(stream, "broken", server)
    proxy = BreakingProxy(server, "chunk-0-", times=3)
    try:
        data = module(url, tmp_path, storage_options=options(proxy.port), num_workers=workers)
        for ours, local in zip(batches(data), batches(module(stream, tmp_path)), strict=True):
            assert torch.equal(ours, local)
        assert proxy.broken == 3
    finally:
        proxy.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_connection_that_stays_broken_is_one_line(
    quick: None, workers: int, stream: Path, tmp_path: Path, server: int
) -> None:
    url = upload(stream, "gone", server)
    proxy = BreakingProxy(server, "chunk-0-", times=0)
    try:
        data = module(url, tmp_path, storage_options=options(proxy.port), num_workers=workers)
        data.setup("fit")
        proxy.times = 10**6
        with pytest.raises(
            OSError, match=rf"'s3://{BUCKET}/gone/train/chunk-0-\d+\.bin' cannot be read after 5 tries: "
        ):
            list(data.train_dataloader())
        assert proxy.broken >= 5
        assert workers or not list((tmp_path / "cache").glob("*.part"))  # a worker may be in the midst of another one
    finally:
        proxy.close()


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    """A file system of 16 KiB."""
    return mounted("16k")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_cache_is_one_line(small_disk: Path, workers: int, stream: Path, tmp_path: Path, server: int) -> None:
    url = upload(stream, "full", server)
    data = module(url, tmp_path, storage_options=options(server), cache_dir=small_disk, num_workers=workers)
    data.setup("fit")
    reason = os.strerror(errno.ENOSPC)
    with pytest.raises(
        OSError, match=rf"cache_dir '{small_disk}' cannot take 's3://.*\.bin' of .* MiB: {reason}; free"
    ):
        list(data.train_dataloader())
    assert workers or not list(small_disk.glob("*.part"))


# ---- training


class StopAfter(pl.Callback):
    """Saves a checkpoint after a step and ends the fit."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.max_steps = self.step


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(768, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 4)
    )


def fit(folder: Path, url: str, port: int, name: str, stop: int | None = None, checkpoint: Path | None = None) -> None:
    """Two epochs from the bucket; steps and weights go to ``folder/name.<rank>.pt``."""
    pl.seed_everything(0)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    data = module(
        url, folder, classes_per_batch=2, window=2, storage_options=options(port), num_workers=1, augment="auto",
        cache_dir=folder / f"cache_{name}",
    )  # fmt: skip
    model = SimOModule(encoder(), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    model.default_callbacks = False
    arguments: dict[str, Any] = {"strategy": "ddp"} if "WORLD_SIZE" in os.environ else {}
    callbacks = [StopAfter(stop, folder / "stopped.ckpt")] if stop else []
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, devices=int(os.environ.get("WORLD_SIZE", "1")), limit_val_batches=0,
        callbacks=callbacks, **arguments,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=False)
    torch.save((trainer.global_step, model.state_dict()), folder / f"{name}.{rank}.pt")


def fit_three_times(folder: Path, url: str, port: int) -> None:
    warnings.simplefilter("ignore")
    given = dict(os.environ)
    for name, words in {
        "whole": {},
        "stopped": {"stop": 8},
        "resumed": {"checkpoint": folder / "stopped.ckpt"},
    }.items():
        os.environ |= given  # the trainer removes WORLD_SIZE at its end
        fit(folder, url, port, name, **words)


@pytest.mark.slow
def test_two_ranks_resume_within_an_epoch_bit_for_bit(stream: Path, tmp_path: Path, server: int) -> None:
    url = upload(stream, "ranks", server)
    assert start_ranks(2, fit_three_times, tmp_path, url, server) == [0, 0]
    for rank in range(2):
        whole, stopped, resumed = (saved(tmp_path, name, 2)[rank] for name in ("whole", "stopped", "resumed"))
        assert (whole[0], stopped[0], resumed[0]) == (12, 8, 12)  # 6 batches an epoch
        for name, value in whole[1].items():
            assert torch.equal(resumed[1][name], value)
        assert not all(torch.equal(stopped[1][name], value) for name, value in whole[1].items())
