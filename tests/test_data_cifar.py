import hashlib
import io
import os
import pickle
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from simo_lightning.data import CIFAR10PairDataModule, load_cifar
from tests.test_data_sources import write_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_cifar(root, monkeypatch, name="cifar10"):
    """An archive of torchvision's layout with 10 images a batch, and a class that knows its checksums."""
    base = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    random = np.random.default_rng(0)
    files, truth = {}, {}
    for file, _ in base.train_list + base.test_list:
        data = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        truth[file] = data, random.integers(0, classes, 20).tolist()
        files[file] = pickle.dumps({"data": data, key: truth[file][1]})
    files[base.meta["filename"]] = pickle.dumps({base.meta["key"]: [f"class {label}" for label in range(classes)]})
    root.mkdir()
    with tarfile.open(root / base.filename, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{base.base_folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}

    class Made(base):
        tgz_md5 = hashlib.md5((root / base.filename).read_bytes()).hexdigest()
        url = "http://127.0.0.1:9/nothing"  # no network, whatever the machine has
        train_list = [[file, sums[file]] for file, _ in base.train_list]  # noqa: RUF012
        test_list = [[file, sums[file]] for file, _ in base.test_list]  # noqa: RUF012
        meta = {**base.meta, "md5": sums[base.meta["filename"]]}  # noqa: RUF012

    monkeypatch.setattr(torchvision.datasets, base.__name__, Made)
    return Made, truth


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("download", [True, False])
def test_cifar_from_torchvisions_archive(tmp_path, monkeypatch, name, download):
    made, truth = make_cifar(tmp_path / "data", monkeypatch, name)
    train, test = (load_cifar(tmp_path / "data", name, split, download) for split in ("train", "test"))
    assert load_cifar(tmp_path / "data", name, "val", download) is None
    for data, files in ((train, made.train_list), (test, made.test_list)):
        expected = np.concatenate([truth[file][0] for file, _ in files]).reshape(-1, 3, 32, 32)
        assert np.array_equal(data.images.numpy(), expected)
        assert data.images.is_contiguous()
        assert data.labels.tolist() == [label for file, _ in files for label in truth[file][1]]
        assert data.class_names[1] == "class 1"


@pytest.mark.parametrize("download", [True, False])
def test_missing_cifar_names_the_files_expected(tmp_path, monkeypatch, download):
    made, _ = make_cifar(tmp_path / "data", monkeypatch)
    tried = "the download failed" if download else "download is False"
    expected = rf"cifar10 is missing in data_dir '.*none' and {tried}.*Put cifar-10-python.tar.gz .*train/<class>/\*"
    with pytest.raises(FileNotFoundError, match=expected):
        load_cifar(tmp_path / "none", "cifar10", "train", download)
    archive = tmp_path / "data" / made.filename
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match="is damaged or incomplete"):
        load_cifar(tmp_path / "data", "cifar10", "train", download)
    archive.unlink()
    (tmp_path / "data" / made.base_folder).mkdir()
    (tmp_path / "data" / made.base_folder / "data_batch_1").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="is incomplete or damaged"):
        load_cifar(tmp_path / "data", "cifar10", "train", download)


def test_cifar_from_class_folders(tmp_path):
    write_folder(tmp_path / "train", ("cat", "dog"), 4, 32, ".jpg")
    write_folder(tmp_path / "test", ("cat", "dog"), 2, 32, ".jpg")
    train, test = (load_cifar(tmp_path, "cifar10", split, download=True) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 4)
    assert train.class_names == ["cat", "dog"]


def test_cifar_folders_go_by_their_usual_names(tmp_path, monkeypatch):
    for name, count in (("Training", 4), ("validation", 3), ("TEST", 2)):
        write_folder(tmp_path / "home" / name, ("cat", "dog"), count, 32, ".jpg")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = CIFAR10PairDataModule(data_dir="~", classes_per_batch=2, samples_per_class=2, download=False)
    data.setup("test")
    assert [len(data._splits[split]) for split in ("train", "val", "test")] == [8, 6, 4]


@pytest.mark.slow
def test_sixty_thousand_images(tmp_path):
    folder = os.environ.get("SIMO_CIFAR10_DIR")
    if not folder:
        pytest.skip("set SIMO_CIFAR10_DIR to CIFAR-10's class folders, train/<class>/* and test/<class>/*")
    for split in ("train", "test"):  # links, so that the cache is this test's own
        for name in sorted(os.listdir(Path(folder, split))):
            if not name.startswith("."):
                (tmp_path / split).mkdir(exist_ok=True)
                (tmp_path / split / name).symlink_to(Path(folder, split, name).absolute())
    start = time.perf_counter()
    train, test = (load_cifar(tmp_path, "cifar10", split, download=False) for split in ("train", "test"))
    first = time.perf_counter() - start
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_cifar(tmp_path, "cifar10", "train", download=False)
    assert torch.equal(again.images, train.images)
    assert time.perf_counter() - start < first / 2
    assert first < 60
