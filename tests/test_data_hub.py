"""Data sets of Hugging Face's library, from Parquet files that the tests write."""

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simo_lightning import SimOModule
from simo_lightning.cli import main
from simo_lightning.data import ClassBalancedSampler, HubPairDataModule, SemiSupervisedHubPairDataModule
from simo_lightning.data.hub import open_splits, read_labels
from simo_lightning.testing import check_resume
from tests.hub_offline import open_without_network
from tests.rank_processes import start_ranks

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the library in the test's own folder, also in processes that it starts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True, scope="module")
def _no_bars() -> None:
    datasets.disable_progress_bars()


def pixels(number: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """An image whose mean tells its number."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def write_parquet(path: Path, numbers: list[int], labels: list[Any] | None = None, feature: Any = None) -> Path:
    """A file as the Hub holds it: a column ``image`` of bytes and paths with the feature Image, and labels."""
    images = [{"bytes": encoded(pixels(number)), "path": None} for number in numbers]
    labels = [number % 3 for number in numbers] if labels is None else labels
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=CLASSES)})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
    return path


def write_shards(folder: Path) -> Path:
    """Training images 0..59 in three shards, validation images 60..71, test images 72..80."""
    for shard in range(3):
        write_parquet(folder / f"train-0000{shard}-of-00003.parquet", [*range(20 * shard, 20 * shard + 20)])
    write_parquet(folder / "validation-00000-of-00001.parquet", [*range(60, 72)])
    write_parquet(folder / "test-00000-of-00001.parquet", [*range(72, 81)])
    return folder


def module(path: Any, **arguments: Any) -> HubPairDataModule:
    return HubPairDataModule(
        path, **{"image_size": 8, "classes_per_batch": 3, "samples_per_class": 4, "augment": None, **arguments}
    )


def rows(source: Any) -> list[np.ndarray]:
    return [image.permute(1, 2, 0).numpy() for image in source.__getitems__(range(len(source)))[0]]


@pytest.mark.parametrize("form", ["folder", "pattern", "files", "saved"])
def test_splits_are_read_bit_for_bit(form: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    path: Any = {
        "folder": folder,
        "pattern": str(folder / "*.parquet"),
        "files": sorted(map(str, folder.iterdir())),
        "saved": tmp_path / "saved",
    }[form]
    if form == "saved":
        datasets.load_dataset(str(folder)).save_to_disk(path)
    data = module(path)
    data.setup()
    assert data.class_names == CLASSES
    for split, numbers in {"train": range(60), "val": range(60, 72), "test": range(72, 81)}.items():
        source: Any = data._splits[split]  # type: ignore[index]
        for number, image in zip(numbers, rows(source), strict=True):
            assert np.array_equal(image, pixels(number))
        assert source.labels.tolist() == [number % 3 for number in numbers]


def test_an_epoch_is_balanced_and_visits_every_image_once(tmp_path: Path) -> None:
    data = module(write_shards(tmp_path / "data"), num_workers=2, seed=3)
    data.setup("fit")
    known = {pixels(number).tobytes(): number for number in range(60)}
    loader = data.train_dataloader()
    expected = ClassBalancedSampler(torch.arange(60) % 3, 3, 4, seed=3)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = [[known[image.permute(1, 2, 0).numpy().tobytes()] for image in batch[0]] for batch in loader]
        assert sorted(number for batch in batches for number in batch) == [*range(60)]
        assert batches == expected.epoch_blocks(epoch).tolist()


def test_pictures_are_whole_and_decoded_by_our_own_decoder(tmp_path: Path) -> None:
    """Upright by EXIF, grey of 16 bits and transparency as for files in folders; a JPEG at a fraction of its size."""
    wide = Image.fromarray(pixels(0, (40, 80)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    wide.save(turned, "PNG", exif=exif)
    deep = Image.fromarray(np.full((8, 8), 512, dtype=np.uint16))
    grey = io.BytesIO()
    deep.save(grey, "PNG")
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "PNG")
    files = [turned.getvalue(), grey.getvalue(), clear.getvalue(), encoded(pixels(1, (64, 96)), "JPEG")]
    table = pa.table({"image": pa.array(files * 2, pa.binary()), "kind": ["a"] * 4 + ["b"] * 4})
    pq.write_table(table, tmp_path / "x.parquet")
    data = module(tmp_path / "x.parquet", label_column="kind", background="red", samples_per_class=2, val_fraction=0)
    data.setup("fit")
    source: Any = data._training
    picture = source.picture(0)
    assert np.array_equal(np.asarray(picture), np.asarray(wide.transpose(Image.Transpose.ROTATE_270)))
    assert np.asarray(source.picture(1)).max() == 2
    assert np.asarray(source.picture(2))[0, 0].tolist() == [255, 0, 0]
    assert (source.picture(3).size, source.picture(3, (20, 10)).size) == ((96, 64), (24, 16))
    again = source.subset(torch.tensor([3, 0]))
    assert again.picture(1).tobytes() == picture.tobytes()
    assert again.labels.tolist() == [0, 0]
    assert torch.equal(again.__getitems__([0])[0], source.__getitems__([3])[0])


def test_labels_of_every_kind(tmp_path: Path) -> None:
    strings = write_parquet(tmp_path / "s.parquet", [*range(4)], ["dog", "cat", "dog", "ant"], datasets.Value("string"))
    numbers = write_parquet(tmp_path / "n.parquet", [*range(4)], [10, 2, 10, 7], datasets.Value("int64"))
    classes = write_parquet(tmp_path / "c.parquet", [*range(4)], [2, 0, 2, 0])
    for file, labels, names in (
        (strings, [2, 1, 2, 0], ["ant", "cat", "dog"]),
        (numbers, [2, 0, 2, 1], ["2", "7", "10"]),
        (classes, [1, 0, 1, 0], ["ant", "cow"]),  # "bee" has no image
    ):
        found, known = read_labels(open_splits(file)["train"], "label", "x")
        assert (found.tolist(), known) == (labels, names)  # type: ignore[union-attr]


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    """The validation split counts its classes in another order and lacks one."""
    write_parquet(tmp_path / "d" / "train.parquet", [*range(30)])
    other = datasets.ClassLabel(names=["cow", "ant"])
    write_parquet(tmp_path / "d" / "valid.parquet", [30, 31, 32], [0, 1, 0], other)
    data = module(tmp_path / "d")
    data.setup("fit")
    val: Any = data._splits["val"]
    assert data.class_names == CLASSES
    write_parquet(tmp_path / "d" / "valid-2.parquet", [33])
    with pytest.raises(ValueError, match=r"of a split must have the same features, those of '.*valid.*' differ"):
        module(tmp_path / "d").setup("fit")
    assert [data.class_names[label] for label in val.labels] == ["cow", "ant", "cow"]


def test_splits_by_name_and_a_single_split(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_parquet(tmp_path / "d" / f"{name}.parquet", [*range(30)])
    table = {name: datasets.Dataset.from_parquet(str(tmp_path / "d" / f"{name}.parquet")) for name in ("one", "two")}
    datasets.DatasetDict(table).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"splits must give one split of .* as train: it has one, two"):
        module(tmp_path / "saved").setup("fit")
    with pytest.raises(ValueError, match=r"must name splits of .*, which has one, two, got val: three"):
        module(tmp_path / "saved", splits={"train": "one", "val": "three"}).setup("fit")
    with pytest.raises(ValueError, match=r"splits must have keys among train, val, test, query.*, got valid"):
        module(tmp_path / "saved", splits={"valid": "one"})
    data = module(tmp_path / "saved", splits={"train": "two", "val": "one", "test": None})
    data.setup()
    assert (len(data._training), len(data._splits["val"]), data._splits["test"]) == (30, 30, None)  # type: ignore[arg-type]
    single = module(tmp_path / "d" / "one.parquet", val_fraction=0.2)
    single.setup("fit")
    assert (len(single._training), len(single._splits["val"])) == (24, 6)  # type: ignore[arg-type]


def test_coarse_classes_of_a_column(tmp_path: Path) -> None:
    images = [encoded(pixels(number)) for number in range(24)]
    names = [CLASSES[number % 3] for number in range(24)]
    coarse = ["insect" if name != "cow" else "mammal" for name in names]
    pq.write_table(pa.table({"image": images, "label": names, "kind": coarse}), tmp_path / "x.parquet")
    data = module(tmp_path / "x.parquet", coarse_column="kind", classes_per_batch=2, val_fraction=0)
    data.setup("fit")
    assert data.train_class_names == ["insect", "mammal"]
    assert data.class_names == CLASSES
    pq.write_table(pa.table({"image": images, "label": names, "kind": ["a", "b"] * 12}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="'kind' must hold one coarse class for each class, got 'a', 'b' for 'ant'"):
        module(tmp_path / "y.parquet", coarse_column="kind").setup("fit")


def test_errors_name_what_is_there(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", [*range(12)])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_column": "images"}, "image_column must be one of image, label, got 'images'; did you mean 'image'?"),
        ({"label_column": "y"}, "label_column must be one of image, label, got 'y'$"),
        ({"label_column": "image"}, "label_column 'image' must hold class labels .*, got struct"),
        ({"image_column": "label"}, "image_column 'label' must hold images or the bytes of image files, got int64"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            module(file, **arguments).setup("fit")
    gaps = write_parquet(tmp_path / "gaps.parquet", [*range(4)], [0, -1, 1, -1])
    with pytest.raises(
        ValueError, match=r"a label in each row of split train of .*, got none in 2 rows, the first in row 1"
    ):
        module(gaps).setup("fit")
    pq.write_table(pa.table({"image": [b"no image"] * 12, "label": [0, 1, 2] * 4}), tmp_path / "bad.parquet")
    data = module(tmp_path / "bad.parquet", val_fraction=0, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match=r"'row 0 of split train of .*bad\.parquet' does not decode as an image"):
        data.setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="cannot be read as a data set: ") as raised:
        module(tmp_path / "empty").setup("fit")
    assert len(str(raised.value).splitlines()) == 1
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    for path, message in (
        (tmp_path / "text.csv", r"path must be a Hub name, a folder or Parquet files, got '.*text\.csv'"),
        (tmp_path / "nothing.parquet", r"no file found at \['.*nothing\.parquet'\]"),
        (tmp_path / "nothing" / "*.parquet", "no file found at"),
        (tmp_path / "nothing", "nothing found at '.*nothing'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            module(path).setup("fit")
    write_parquet(tmp_path / "mixed" / "train.parquet", [0])
    write_parquet(tmp_path / "mixed" / "more.parquet", [0])
    with pytest.raises(ValueError, match=r"must follow from its name, .*got '.*more\.parquet' beside files of 'train'"):
        module(str(tmp_path / "mixed" / "*.parquet")).setup("fit")


def test_a_test_split_without_labels_is_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "train.parquet", [*range(30)])
    write_parquet(tmp_path / "d" / "test.parquet", [*range(30, 36)], [-1] * 6)
    data = module(tmp_path / "d")
    data.setup()
    assert data._splits["test"] is None


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "datasets.config", None)
    with pytest.raises(ImportError, match=r"datasets is missing: pip install 'simo_lightning\[hub\]'"):
        module(tmp_path).setup("fit")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_network_one_line_comes_soon(offline: str, tmp_path: Path) -> None:
    assert start_ranks(1, open_without_network, offline, tmp_path, tmp_path / "report") == [0]
    (line,) = (tmp_path / "report").read_text().splitlines()
    assert float(line.split()[0]) < 15  # 3 s on an idle machine; the library alone waits for 23 s
    assert "'uoft-cs/cifar10' is no folder or file here, is not in the cache" in line
    assert ("HF_HUB_OFFLINE is set" if offline == "1" else "https://huggingface.co does not answer") in line
    assert "run `hf download uoft-cs/cifar10 --repo-type dataset --local-dir DIR`" in line


# ---- training


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))


def test_resume_is_exact_with_workers(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    check_resume(
        lambda: SimOModule(encoder(), optimizer=partial(torch.optim.SGD, lr=0.1)),
        lambda: module(folder, num_workers=1),
    )


class Model(pl.LightningModule):
    """Remembers the training images that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(192, 2)
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch[0].mean(dim=(1, 2, 3)) * 192).round(decimals=3).tolist())
        loss: torch.Tensor = self.layer(batch[0].flatten(1)).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit_two_ranks(folder: Path) -> None:
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    data = module(folder / "data", mean=[0.0] * 3, std=[1.0] * 3, samples_per_class=2)
    trainer.fit(model, data)
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(model.seen))


def test_two_ranks_see_every_image_once(tmp_path: Path) -> None:
    write_shards(tmp_path / "data")
    assert start_ranks(2, fit_two_ranks, tmp_path) == [0, 0]
    seen = [
        value for rank in range(2) for batch in json.loads((tmp_path / f"{rank}.json").read_text()) for value in batch
    ]
    expected = [round(float(pixels(number).mean() / 255 * 192), 3) for number in range(60)]
    assert sorted(seen) == pytest.approx(sorted(expected), abs=2e-3)


def test_semi_supervised_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "data")
    few = SemiSupervisedHubPairDataModule(
        path=folder, image_size=8, classes_per_batch=3, samples_per_class=4, views=2, label_fraction=0.5
    )
    few.setup("fit")
    assert int(few._labelled.sum()) == 30
    config = {
        "model": {
            "class_path": "SimOModule",
            "init_args": {
                "encoder": {
                    "class_path": "ImageEncoder",
                    "init_args": {"backbone": "resnet10", "width": 0.125, "stem": "small"},
                }
            },
        },
        "data": {"class_path": "HubPairDataModule", "init_args": {"image_size": 16, "classes_per_batch": 3}},
    }
    Path("c.yaml").write_text(json.dumps(config))
    words = ["--config", "c.yaml", "--plots", "null", "--probe", "null", "--trainer.enable_progress_bar", "false"]
    words += ["--data.samples_per_class", "4", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    main(["fit", *words, "--run_dir", "run", "--data.path", str(folder)])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    with pytest.raises(SystemExit):
        main(["fit", *words, "--run_dir", "other", "--data.path", str(folder), "--data.label_column", "labels"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("simo: error: label_column must be one of image, label, got 'labels'; did you mean 'label'?")


def test_nothing_of_a_data_set_is_run(tmp_path: Path) -> None:
    """A folder with a loading script, as the library ran them before 4.0."""
    folder = write_shards(tmp_path / "data")
    (folder / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    module(folder).setup("fit")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for path in (folder, folder / "data.py"):
        with pytest.raises(ValueError, match=r"scripts are no longer supported|got '.*data\.py'"):
            module(path).setup("fit")
    assert not (tmp_path / "ran").exists()
