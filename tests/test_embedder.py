"""Embedder against the module that was stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simo_lightning import Embedder, Preprocessing, SimOModule
from simo_lightning.checkpoints import TrainingClasses
from tests.trained import write_checkpoint, write_images


@pytest.fixture
def embedder(tmp_path: Path) -> Embedder:
    return Embedder.load(write_checkpoint(tmp_path / "last.ckpt"), device="cpu", batch_size=2)


def test_embeddings_are_those_of_the_module(embedder: Embedder, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    module = SimOModule.load_from_checkpoint(tmp_path / "last.ckpt").double().eval()
    with torch.no_grad():
        expected = module.encoder((images.double() / 255 - 0.5) / 0.25).numpy()
    assert embedder(images).dtype == np.float32
    np.testing.assert_allclose(embedder(images), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_files_pictures_and_pixels_give_the_same(embedder: Embedder, tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["a.png", "b.png", "c.png"])
    pixels = torch.from_numpy(np.stack([embedder.preprocessing.read(path)[0] for path in paths]))
    from_files = embedder(paths)
    np.testing.assert_array_equal(from_files, embedder(pixels))
    np.testing.assert_array_equal(from_files, embedder([Image.open(path) for path in paths]))
    np.testing.assert_allclose(embedder(paths[0]), from_files[:1], rtol=1e-5, atol=1e-6)
    assert embedder([]).shape == (0, 16)


def test_bfloat16_is_near_and_not_the_same(embedder: Embedder, tmp_path: Path) -> None:
    other = Embedder.load(tmp_path / "last.ckpt", device="cpu", precision="bf16")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    exact, rounded = embedder(images), other(images)
    assert rounded.dtype == np.float32
    assert not np.array_equal(exact, rounded)
    cosines = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosines.min() > 0.99


def test_scores_are_cosines_with_the_class_means(embedder: Embedder) -> None:
    embeddings = torch.randn(4, 16)
    assert embedder.classes is not None
    means = embedder.classes.means.double().numpy()
    found = embedder.scores(embeddings)
    for row, embedding in enumerate(embeddings.double().numpy()):
        for column in range(2):
            expected = embedding @ means[column] / np.linalg.norm(embedding) / np.linalg.norm(means[column])
            assert found[row, column] == pytest.approx(expected, abs=1e-6)
    assert (found[:, 2] == -torch.inf).all()


def test_shares_and_rest_sum_to_one(embedder: Embedder) -> None:
    shares, rest = embedder.shares(np.random.default_rng(0).normal(size=(4, 16)))
    assert shares.shape == (4, 3)
    assert (shares[:, 2] == 0).all()
    np.testing.assert_allclose(shares.sum(dim=1) + rest, 1, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"precision": "16"}, "precision must be '32' or 'bf16', got '16'"),
        ({"device": "gpu"}, "device must be one of this machine, got 'gpu'"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = write_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        Embedder.load(path, **options)


def test_a_model_without_means_has_no_scores() -> None:
    preprocessing = Preprocessing(32, mean=(0.5,) * 3, std=(0.25,) * 3)
    embedder = Embedder(torch.nn.Flatten(), preprocessing, TrainingClasses(["a", "b"]), device="cpu")
    with pytest.raises(ValueError, match="class means must be known"):
        embedder.scores(torch.randn(2, 3072))


def test_a_preprocessing_without_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="preprocessing must have mean and std"):
        Embedder(torch.nn.Flatten(), Preprocessing(32))
