import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from simo_lightning.data import FolderImages, LabelledImages, load_digits, load_image_folder
from simo_lightning.data.sources import channel_statistics, stratified_split, stratified_subset
from simo_lightning.preprocessing import Preprocessing


def pixels(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folder(root, classes=("ant", "bee"), count=3, size=8, suffix=".png"):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels(100 * label + number, size, size)).save(root / name / f"{number}{suffix}")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# ---- labelled images and splits


def test_labelled_images_give_batches():
    data = LabelledImages(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.arange(6) % 2, ["a", "b"])
    images, labels = data.__getitems__([4, 1])
    assert (images.flatten().tolist(), labels.tolist()) == ([4, 1], [0, 1])
    assert [part.item() for part in data[3]] == [3, 1]
    assert data.subset(torch.tensor([5, 0])).images.flatten().tolist() == [5, 0]
    turned = LabelledImages(data.images.expand(6, 3, 1, 1), data.labels, ["a", "b"])
    assert turned.images.is_contiguous()


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "images must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), r"got torch.uint8 \(2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), r"labels must be int64 \(2,\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), r"lie in 0..1.*got 0..2"),
    ],
)
def test_labelled_images_errors(images, labels, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(images, labels, ["a", "b"])


def test_stratified_split():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])
    kept, held = stratified_split(labels, 0.2, seed=1)
    assert sorted(kept.tolist() + held.tolist()) == list(range(53))
    assert labels[held].bincount(minlength=4).tolist() == [8, 2, 1, 0]
    assert torch.equal(held, stratified_split(labels, 0.2, seed=1)[1])
    assert not torch.equal(held, stratified_split(labels, 0.2, seed=2)[1])
    assert len(stratified_split(labels, 0.0, seed=1)[1]) == 0
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1"):
        stratified_split(labels, 1, seed=0)


def test_stratified_subset():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    for limit in range(1, 100):
        subset = stratified_subset(labels, limit, seed=0)
        counts = labels[subset].bincount(minlength=3)
        assert len(subset.unique()) == limit
        assert ((counts - torch.tensor([0.6, 0.3, 0.1]) * limit).abs() < 1.01).all()
    assert stratified_subset(labels, 500, seed=0).tolist() == list(range(100))
    with pytest.raises(ValueError, match="limit must be at least 1 image, got 0"):
        stratified_subset(labels, 0, seed=0)


def test_channel_statistics_against_numpy(tmp_path):
    folder = load_image_folder(write_folder(tmp_path), 8)
    mean, std = channel_statistics(folder, seed=0)
    values = folder.images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-12)
    on_disk = load_image_folder(tmp_path, 8, max_memory=0)
    assert channel_statistics(on_disk, seed=0) == (mean, std)


def test_digits():
    train, test = load_digits(train=True), load_digits(train=False)
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape[1:] == (1, 8, 8)
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert train.class_names == list("0123456789")
    original = sklearn_digits()
    rows = {image.astype(np.float64).tobytes() for image in original.images}
    ours = torch.cat([train.images, test.images]).double().mul(16 / 255).round().numpy()
    assert {image.tobytes() for image in ours[:, 0]} == rows
    shares = test.labels.bincount() / torch.from_numpy(original.target).bincount()
    assert ((shares - 0.2).abs() < 0.01).all()


# ---- folders


def test_folder_is_read_as_pillow_reads_it(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "ant" / "deeper").mkdir()
    Image.fromarray(pixels(7)).save(tmp_path / "ant" / "deeper" / "x.JPEG", quality=90)
    Image.fromarray(pixels(8)).convert("RGBA").save(tmp_path / "bee" / "alpha.png")  # all of it opaque
    Image.fromarray(pixels(9)).convert("L").save(tmp_path / "bee" / "grey.png")
    for hidden in (".DS_Store", "bee/.DS_Store", "bee/Thumbs.db", "readme.txt"):
        (tmp_path / hidden).write_bytes(b"no image")
    (tmp_path / ".git").mkdir()
    data = load_image_folder(tmp_path, 8)
    names = ["ant/0.png", "ant/1.png", "ant/2.png", "ant/deeper/x.JPEG"]
    names += ["bee/0.png", "bee/1.png", "bee/2.png", "bee/alpha.png", "bee/grey.png"]
    assert data.class_names == ["ant", "bee"]
    assert data.labels.tolist() == [0] * 4 + [1] * 5
    for name, image in zip(names, data.images, strict=True):
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), expected), name


def test_other_sizes_are_resized_by_the_shorter_side_and_cropped(tmp_path):
    for name, (width, height) in {"a": (20, 10), "b": (7, 31), "c": (5, 5), "d": (10, 16)}.items():
        image = Image.fromarray(pixels(1, height, width))
        image.save(tmp_path / f"{name}.png")
        decoded = Preprocessing(10).read(tmp_path / f"{name}.png")[0]
        short = torchvision.transforms.Resize(10)(image)
        expected = np.asarray(torchvision.transforms.CenterCrop(10)(short)).transpose(2, 0, 1).astype(int)
        assert decoded.shape == (3, 10, 10)
        assert np.abs(decoded - expected).max() <= (
            60 if name == "b" else 0
        )  # theirs truncates 44.3 and rounds the crop


def test_large_folders_stay_on_disk(tmp_path):
    write_folder(tmp_path)
    there = load_image_folder(tmp_path, 8)
    disk = load_image_folder(tmp_path, 8, max_memory=6 * 3 * 64 - 1)
    assert isinstance(disk, FolderImages)
    for part in (disk, disk.subset(torch.tensor([5, 0, 3]))):
        images, labels = part.__getitems__([2, 0])
        rows = [2, 0] if part is disk else [3, 5]
        assert torch.equal(images, there.images[rows])
        assert torch.equal(labels, there.labels[rows])
    assert torch.equal(disk[4][0], there.images[4])


def test_processes_decode_the_same(tmp_path):
    write_folder(tmp_path, count=700, size=2)
    one, two = (load_image_folder(tmp_path, 2, workers=workers) for workers in (1, 2))
    for cache in tmp_path.glob(".simo*"):
        cache.unlink()
    two = load_image_folder(tmp_path, 2, workers=2)
    assert torch.equal(one.images, two.images)
    (tmp_path / "bee" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png' does not decode"):
        load_image_folder(tmp_path, 2, workers=2)


@pytest.mark.parametrize(
    "break_it, error, message",
    [
        (lambda root: (root / "bee" / "notes.txt").touch(), ValueError, r"notes\.txt' is not an image"),
        (lambda root: (root / "bee" / "9.jpg").write_bytes(b"text"), ValueError, r"9\.jpg' does not decode"),
        (lambda root: cut(root / "bee" / "1.png"), ValueError, r"1\.png' does not decode"),
        (
            lambda root: (root / "bee").rename(root / ".bee"),
            ValueError,
            r"at least 2 classes of readable.*found 1: \['ant'",
        ),
        (lambda root: [each.unlink() for each in root.glob("bee/*")], ValueError, r"found 1: \['ant'\]; without an im"),
        (
            lambda root: [each.unlink() for each in root.glob("*/*")],
            FileNotFoundError,
            "found no image in 'ant', 'bee'",
        ),
        (lambda root: root.rename(root.parent / "moved"), FileNotFoundError, "is not a folder"),
    ],
)
def test_folder_errors(tmp_path, break_it, error, message):
    root = write_folder(tmp_path / "data", size=16)
    break_it(root)
    with pytest.raises(error, match=message):
        load_image_folder(root, 16)


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def test_image_size_is_positive(tmp_path):
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        load_image_folder(tmp_path, 0)


# ---- the cache


def caches(root):
    return sorted(root.glob(".simo_lightning*"))


def test_cache_is_used_and_follows_the_files(tmp_path):
    write_folder(tmp_path)
    first = load_image_folder(tmp_path, 8)
    (cache,) = caches(tmp_path)
    content = torch.load(cache, weights_only=True)
    assert torch.equal(content["images"], first.images)
    written = cache.stat().st_mtime_ns
    assert torch.equal(load_image_folder(tmp_path, 8).images, first.images)
    assert cache.stat().st_mtime_ns == written
    Image.fromarray(pixels(77)).save(tmp_path / "ant" / "0.png")
    os.utime(tmp_path / "ant" / "0.png", (1, 1))
    changed = load_image_folder(tmp_path, 8)
    assert not torch.equal(changed.images[0], first.images[0])
    (tmp_path / "ant" / "1.png").unlink()
    assert len(load_image_folder(tmp_path, 8)) == 5
    load_image_folder(tmp_path, 4)
    assert len(caches(tmp_path)) == 2  # one for each size, and no temporary file


@pytest.mark.parametrize("damage", ["half", "text", "flipped", "empty"])
def test_damaged_cache_is_built_again_with_a_warning(tmp_path, damage):
    write_folder(tmp_path, size=32)
    first = load_image_folder(tmp_path, 32)
    (cache,) = caches(tmp_path)
    whole = bytearray(cache.read_bytes())
    place = whole.index(first.images[1, 0].numpy().tobytes())
    whole[place] ^= 1
    cache.write_bytes({"half": whole[: len(whole) // 2], "text": b"text", "flipped": whole, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="cannot be read and is built again"):
        again = load_image_folder(tmp_path, 32)
    assert torch.equal(again.images, first.images)
    assert torch.equal(load_image_folder(tmp_path, 32).images, first.images)


def test_read_only_data_are_cached_for_the_user(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data")
    (root / ".simo_lightning_8.pt").mkdir()  # a place that cannot be written, also by root
    first = load_image_folder(root, 8)
    (cache,) = (Path(os.environ["XDG_CACHE_HOME"]) / "simo_lightning").iterdir()
    assert cache.name.startswith("data_")
    for image in root.glob("*/*.png"):
        os.utime(image, ns=(image.stat().st_mtime_ns,) * 2)
    assert torch.equal(load_image_folder(root, 8).images, first.images)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "ant" / "0.png"))  # nor can this
    with pytest.warns(UserWarning, match="could not be cached"):
        load_image_folder(root, 8)


def test_several_writers_at_once(tmp_path):
    write_folder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: load_image_folder(tmp_path, 8).images, range(16)))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(caches(tmp_path)) == 1


def test_a_cache_is_readable_by_others(tmp_path):
    load_image_folder(write_folder(tmp_path), 8)
    (cache,) = caches(tmp_path)
    (tmp_path / "plain").touch()
    assert cache.stat().st_mode == (tmp_path / "plain").stat().st_mode
