"""TensorBoard's projector: the files that are written, read back, and what a real TensorBoard serves of them."""

import csv
import json
import math
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import EmbeddingProjector
from simo_lightning.callbacks.projector import _square
from tests.callback_parts import Encoder, Pictures, Returned, trainer
from tests.digits_run import fit
from tests.rank_processes import start_ranks


def logger(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name="", version="")


def read(folder: Path) -> tuple[np.ndarray, list[list[str]]]:
    rows = np.loadtxt(folder / "tensors.tsv", delimiter="\t", ndmin=2)
    with (folder / "metadata.tsv").open(newline="", encoding="utf-8") as file:
        header, *metadata = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == ["class", "index"]
    return rows, metadata


def cells(folder: Path, count: int, side: int) -> np.ndarray:
    """The thumbnails (count, side, side, 3) of a sprite, row by row."""
    sprite = np.asarray(Image.open(folder / "sprite.png"))
    columns = math.ceil(math.sqrt(count))
    assert sprite.shape == (columns * side, columns * side, 3)
    grid = sprite.reshape(columns, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    assert not grid[count:].any()
    return grid[:count]


def config(folder: Path) -> ProjectorConfig:
    return text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())


class Named(Pictures):
    class_names = ("cat\tand\nkitten", "dog", "Schäfer")
    mean, std = (0.5,), (1.0,)  # as prepare normalises


def expected_cells(images: Tensor, side: int) -> np.ndarray:
    """2 x 4 grey pixels, enlarged to the width and centred on black."""
    factor = side // 4
    enlarged = np.kron(images.numpy()[:, 0], np.ones((factor, factor), np.uint8))
    black = np.zeros((len(images), side, side), np.uint8)
    black[:, side // 4 : 3 * side // 4] = enlarged
    return np.repeat(black[..., None], 3, axis=3)


def test_the_files_hold_the_embeddings_names_and_pixels(tmp_path, caplog):
    returned = Returned()
    run = trainer(tmp_path, EmbeddingProjector(thumbnail=8), returned, logger=logger(tmp_path / "log"))
    run.validate(Encoder(), Named(), verbose=False)
    folder = tmp_path / "log" / "00000" / "val"
    rows, metadata = read(folder)
    assert np.array_equal(rows, returned.rows)
    labels = Named.val.tensors[1].tolist()
    names = ["cat and kitten", "dog", "Schäfer"]
    assert metadata == [[names[label], str(label)] for label in labels]
    assert np.array_equal(cells(folder, 40, 8), expected_cells(Named.val.tensors[0], 8))
    (info,) = config(tmp_path / "log").embeddings
    assert info.tensor_name == "val:00000"
    for path in (info.tensor_path, info.metadata_path, info.sprite.image_path):
        assert (tmp_path / "log" / path).is_file()
    assert list(info.sprite.single_image_dim) == [8, 8]
    assert f"EmbeddingProjector: 40 validation embeddings for TensorBoard's projector are in {folder}" in caplog.text
    run.test(Encoder(), Named(), verbose=False)
    assert len(read(tmp_path / "log" / "00000" / "test")[0]) == 60
    assert [each.tensor_name for each in config(tmp_path / "log").embeddings] == ["val:00000", "test:00000"]


def test_of_more_images_every_nth_is_written(tmp_path, caplog):
    returned = Returned()
    run = trainer(tmp_path, EmbeddingProjector(max_points=12, thumbnail=8), returned, logger=logger(tmp_path))
    run.validate(Encoder(), Named(), verbose=False)
    rows, metadata = read(tmp_path / "00000" / "val")
    assert np.array_equal(rows, returned.rows[::4])
    assert [int(index) for _, index in metadata] == Named.val.tensors[1][::4].tolist()
    assert np.array_equal(cells(tmp_path / "00000" / "val", 10, 8), expected_cells(Named.val.tensors[0][::4], 8))
    assert "10 of 40 validation embeddings" in caplog.text


def test_training_writes_its_last_validation_once(tmp_path):
    returned, run_logger = Returned(), logger(tmp_path)
    run = trainer(tmp_path, EmbeddingProjector(), returned, logger=run_logger, max_epochs=3, log_every_n_steps=1)
    run.fit(Encoder(), Named())
    (folder,) = tmp_path.glob("*/val")
    assert folder.parent.name == "00012"
    assert np.array_equal(read(folder)[0], returned.rows)


def test_nothing_is_written_without_tensorboard(tmp_path):
    projector = EmbeddingProjector()
    run = trainer(tmp_path, projector, logger=CSVLogger(tmp_path), max_epochs=1, log_every_n_steps=1)
    run.fit(Encoder(), Named())
    assert not list(tmp_path.rglob("*.tsv"))


def test_rows_that_are_no_images_have_no_sprite(tmp_path):
    rows = [((image / 255 - 0.5).flatten(1), label) for image, label in (Named.val.tensors,)]
    loader = DataLoader(TensorDataset(*rows[0]), batch_size=16)
    trainer(tmp_path, EmbeddingProjector(), logger=logger(tmp_path)).validate(Encoder(), loader, verbose=False)
    folder = tmp_path / "00000" / "val"
    assert read(folder)[1][0] == ["0", "0"]  # no names are known
    assert not (folder / "sprite.png").exists()
    assert not config(tmp_path).embeddings[0].HasField("sprite")


def ranks(folder: Path) -> None:
    run = trainer(folder, EmbeddingProjector(thumbnail=8), logger=logger(folder), strategy="ddp", devices=2)
    run.validate(Encoder(), Named(), verbose=False)


def test_two_processes_write_the_rows_of_both(tmp_path):
    returned = Returned()
    trainer(tmp_path, returned).validate(Encoder(), Named(), verbose=False)
    assert start_ranks(2, ranks, tmp_path) == [0, 0]
    rows, metadata = read(tmp_path / "00000" / "val")  # the first process has the first two thirds
    np.testing.assert_allclose(rows, returned.rows, rtol=1e-5, atol=1e-6)
    assert [int(index) for _, index in metadata] == returned.labels.tolist()
    assert np.array_equal(cells(tmp_path / "00000" / "val", 40, 8), expected_cells(Named.val.tensors[0], 8))


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "val").write_text("")
    run = trainer(tmp_path, EmbeddingProjector(), logger=logger(tmp_path))
    with pytest.warns(UserWarning, match="EmbeddingProjector cannot write .*val: "):
        run.validate(Encoder(), Named(), verbose=False)


def test_large_images_are_reduced_to_means_of_their_pixels():
    images = torch.arange(2 * 3 * 8 * 4, dtype=torch.uint8).view(2, 3, 8, 4)
    found = _square(images, 4)
    assert found.shape == (2, 3, 4, 4)
    means = images.double().view(2, 3, 4, 2, 2, 2).mean(dim=(3, 5))
    assert (found[..., 1:3].double() - means).abs().max() <= 0.5
    assert not found[..., 0].any()
    assert not found[..., 3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_points": 0}, "max_points must be at least 1, got 0"),
        ({"thumbnail": 0}, "thumbnail must be at least 1, got 0"),
        (
            {"max_points": 30_000},
            "max_points=30000 thumbnails of 48 pixels must fit in a square of 8192 pixels, got 8352",
        ),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingProjector(**options)


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """A real TensorBoard, which answers when this begins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    with (folder.parent / "tensorboard.log").open("w") as log:
        process = subprocess.Popen([*words, "--host", "127.0.0.1"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end:
            with suppress(URLError, ConnectionError):
                urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=5).close()
                break
            assert process.poll() is None, (folder.parent / "tensorboard.log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/data"
    finally:
        process.terminate()
        process.wait(timeout=30)


def get(url: str, **query: str | int) -> bytes:
    with urlopen(f"{url}?{urlencode(query)}" if query else url, timeout=30) as answer:
        return answer.read()


@pytest.mark.slow
def test_tensorboard_serves_embeddings_scalars_and_images_of_a_run(tmp_path):
    fit("--run_dir", "run", "--plots.every_n_epochs", "1")
    with tensorboard(Path("run").absolute()) as url:
        end = time.monotonic() + 60
        while not json.loads(get(f"{url}/plugin/scalars/tags")) and time.monotonic() < end:
            time.sleep(0.5)  # it reads the events in the background
        projector = f"{url}/plugin/projector"
        assert json.loads(get(f"{projector}/runs")) == ["."]
        (info,) = json.loads(get(f"{projector}/info", run="."))["embeddings"]
        name = info["tensorName"]
        assert (name, info["tensorShape"]) == ("val:00012", [143, 16])
        assert info["sprite"]["singleImageDim"] == [48, 48]
        served = np.frombuffer(get(f"{projector}/tensor", run=".", name=name), np.float32).reshape(-1, 16)
        rows, _ = read(Path("run/00012/val"))
        assert np.array_equal(served, rows.astype(np.float32))
        lines = get(f"{projector}/metadata", run=".", name=name).decode().splitlines()
        assert lines[0] == "class\tindex"
        assert {tuple(line.split("\t")) for line in lines[1:]} == {(str(label), str(label)) for label in range(10)}
        assert len(lines) == 1 + 143
        sprite = Image.open(BytesIO(get(f"{projector}/sprite_image", run=".", name=name)))
        assert sprite.size == (12 * 48, 12 * 48)
        logged = {}
        with Path("run/metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                logged |= {(key, int(row["step"])): float(value) for key, value in row.items() if value}
        tags = json.loads(get(f"{url}/plugin/scalars/tags"))["."]
        assert {"train/loss", "val/knn", "val/class_cosine"} <= set(tags)
        for tag in ("val/knn", "val/class_cosine"):
            ((_, step, value),) = json.loads(get(f"{url}/plugin/scalars/scalars", run=".", tag=tag))
            assert value == pytest.approx(logged[tag, step], rel=1e-6)
        images = json.loads(get(f"{url}/plugin/images/tags"))["."]
        assert set(images) == {f"val/{each}" for each in ("scatter", "similarity", "spectrum", "norms")}
        (image,) = json.loads(get(f"{url}/plugin/images/images", run=".", tag="val/scatter", sample=0))
        picture = Image.open(BytesIO(get(f"{url}/plugin/images/individualImage?{image['query']}")))
        drawn = np.asarray(Image.open("run/plots/scatter.png").convert("RGB")).astype(int)
        shown = np.asarray(picture.convert("RGB")).astype(int)
        assert shown.shape == drawn.shape
        assert np.abs(shown - drawn).mean() < 1
        assert re.fullmatch(r"\d+", str(image["step"]))
