"""A data module treats images as the model requires: small trainings on files, and what follows from them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from simo_lightning import ImageEncoder, ImageFolderPairDataModule, SimOModule
from simo_lightning.cli import main
from simo_lightning.data import LabelledImages, TensorPairDataModule
from simo_lightning.data.preprocessing import warn_of_stem
from simo_lightning.preprocessing import Preprocessing
from tests.bounds import assert_float32_error
from tests.callback_parts import trainer
from tests.checkpoint_parts import Flat

pytestmark = [  # of Lightning, where a checkpoint is used by another trainer
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
SIZE, CLASSES = 16, 4
TINY = [
    *("--model", "SimOModule", "--model.encoder", "ImageEncoder", "--model.encoder.feature_dim", str(3 * SIZE * SIZE)),
    *(
        "--model.encoder.backbone",
        '{"class_path": "torch.nn.Flatten"}',
        "--model.optimizer",
        "AdamW",
        "--model.optimizer.lr",
        "1e-3",
    ),
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.logger", "false", "--plots", "null"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--probe", "null"),
    *("--data", "ImageFolderPairDataModule", "--data.classes_per_batch", "4", "--data.samples_per_class", "5"),
]
FEW: dict[str, Any] = {"classes_per_batch": 4, "samples_per_class": 5}


def write(root: Path, darkest: int, contrast: int, count: dict[str, int]) -> Path:
    """Digits 0..3 as grey levels ``darkest + contrast * 0..16`` in files of 24 x 32 pixels, in three splits."""
    digits = load_digits()
    taken = dict.fromkeys(range(CLASSES), 0)
    for split, images in count.items():
        for label in range(CLASSES):
            folder = root / split / f"digit {label}"
            folder.mkdir(parents=True)
            start = taken[label]
            taken[label] += images
            for number, pixels in enumerate(digits.images[digits.target == label][start : start + images]):
                grey = (darkest + contrast * pixels).astype(np.uint8).repeat(3, 0).repeat(4, 1)
                Image.fromarray(grey).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bright"), 200, 2, {"train": 20, "val": 8, "test": 8})


@pytest.fixture(scope="module")
def dark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dark"), 0, 6, {"train": 6, "val": 2, "test": 4})


@pytest.fixture(scope="module")
def run(bright: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command on bright images, at 16 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "bright"
    words = ["--data.data_dir", str(bright), "--data.image_size", str(SIZE), "--run_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr(sys, "argv", ["simo"])
        main(["fit", *TINY, *words])
    return folder


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def files(split: Path) -> tuple[list[Path], list[int]]:
    paths = sorted(split.glob("*/*.png"))
    return paths, [int(path.parent.name[-1]) for path in paths]


def embedded(model: Any, split: Path) -> np.ndarray:
    """Vectors of the files as a user gets them from a loaded model."""
    images = torch.from_numpy(np.stack([model.preprocessing.read(path)[0] for path in files(split)[0]]))
    with torch.no_grad():
        vectors: np.ndarray = model.eval().embed(images).numpy()
    return vectors


def one_nearest(model: Any, root: Path) -> float:
    """Accuracy of the nearest neighbour by cosine, of the validation among the training images; by scikit-learn."""
    neighbours = KNeighborsClassifier(1, metric="cosine").fit(embedded(model, root / "train"), files(root / "train")[1])
    return float(neighbours.score(embedded(model, root / "val"), files(root / "val")[1]))


def test_a_checkpoint_holds_the_statistics_of_its_training_images(run: Path, bright: Path) -> None:
    preprocessing = SimOModule.load_from_checkpoint(last(run)).preprocessing
    assert preprocessing is not None
    assert preprocessing.mean is not None
    assert preprocessing.std is not None
    pixels = [preprocessing.read(path)[0] / 255 for path in files(bright / "train")[0]]
    values = np.stack(pixels).transpose(1, 0, 2, 3).reshape(3, -1)
    assert preprocessing == Preprocessing(SIZE, preprocessing.mean, preprocessing.std)
    np.testing.assert_allclose(preprocessing.mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(preprocessing.std, values.std(1), rtol=1e-9)


def test_a_loaded_model_finds_the_neighbours_that_validation_found(run: Path, bright: Path) -> None:
    model, data = SimOModule.load_from_checkpoint(last(run)), ImageFolderPairDataModule(bright, samples_per_class=5)
    rows = {}
    data.setup("validate")
    by_file = data.preprocessing  # no model is attached: the default size
    assert by_file.size == (224, 224)
    runner = trainer(run.parent)
    runner.validate(model, ImageFolderPairDataModule(bright, samples_per_class=5), verbose=False)
    data = runner.datamodule  # type: ignore[attr-defined]
    assert data.preprocessing == model.preprocessing
    with torch.no_grad():
        for name, loader in {"train": data.bank_dataloader(), "val": data.val_dataloader()}.items():
            batches = [data.prepare(batch, augment=False) for batch in loader]
            rows[name] = [torch.cat(part).numpy() for part in zip(*((model(x), y) for x, y in batches), strict=True)]
    neighbours = KNeighborsClassifier(1, metric="cosine").fit(*rows["train"])
    found = one_nearest(model, bright)
    assert found == neighbours.score(*rows["val"])
    assert found > 0.8  # chance is 0.25
    with pytest.raises(ValueError, match="float images must be normalised"):  # raw pixels, as they were once embedded
        model.embed(torch.full((1, 3, SIZE, SIZE), 210.0))


def test_predict_on_another_folder_gives_the_vectors_of_the_loaded_model(run: Path, dark: Path, tmp_path: Path) -> None:
    words = ["--data.data_dir", str(dark), "--ckpt_path", str(last(run)), "--run_dir", str(tmp_path / "out")]
    main(["predict", *TINY, *words])
    with np.load(tmp_path / "out" / "predictions" / "embeddings.npz") as file:
        written = dict(file)
    model = SimOModule.load_from_checkpoint(last(run))
    assert written["labels"].tolist() == files(dark / "test")[1]
    plain, exact = embedded(model, dark / "test"), embedded(model.double(), dark / "test")
    assert_float32_error(*(torch.from_numpy(rows) for rows in (written["embeddings"], plain, exact)))
    assert [path.name for path in dark.rglob(".simo*.pt")] == [f".simo_lightning_{SIZE}.pt"] * 3  # never read at 224
    other = ImageFolderPairDataModule(dark, image_size=SIZE, samples_per_class=5)
    other.setup("fit")
    assert other.mean[0] < 0.3 < 0.7 < model.preprocessing.mean[0]  # type: ignore[index,union-attr]


def test_a_run_goes_on_with_the_preprocessing_that_it_began_with(run: Path, dark: Path, tmp_path: Path) -> None:
    model, data = tiny(), ImageFolderPairDataModule(dark, image_size=SIZE, **FEW)
    trainer(tmp_path, max_epochs=2).fit(model, data, ckpt_path=last(run))
    assert model.preprocessing == data.preprocessing == SimOModule.load_from_checkpoint(last(run)).preprocessing
    assert data.mean == list(model.preprocessing.mean)  # type: ignore[union-attr,arg-type]


def tiny(**arguments: Any) -> SimOModule:
    return SimOModule(ImageEncoder(nn.Flatten(), feature_dim=3 * SIZE * SIZE), **arguments)


def test_images_are_read_again_if_the_checkpoint_has_another_size(run: Path, dark: Path, tmp_path: Path) -> None:
    """A trainer that is given a path loads it after ``setup``."""
    data, model = ImageFolderPairDataModule(dark, **FEW), tiny()
    trainer(tmp_path).test(model, data, ckpt_path=last(run), verbose=False)
    assert data.preprocessing == model.preprocessing
    assert data.preprocessing.size == data._splits["test"].__getitems__([0])[0].shape[2:] == (SIZE, SIZE)  # type: ignore[union-attr]


def test_an_argument_that_contradicts_the_checkpoint_is_refused(
    run: Path, dark: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = (
        "image_size of ImageFolderPairDataModule must be that of the model's preprocessing, 16, got 32: leave it out"
    )
    for path in (last(run), None):  # loaded by the trainer, or before it
        model = tiny() if path else SimOModule.load_from_checkpoint(last(run))
        data = ImageFolderPairDataModule(dark, image_size=32, **FEW)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).validate(model, data, ckpt_path=path, verbose=False)
    data = ImageFolderPairDataModule(dark, mean=[0.5] * 3, std=[0.5] * 3, **FEW)
    with pytest.raises(ValueError, match=r"mean of \S+ must be that of the model's .*, got \[0\.5, 0\.5, 0\.5\]"):
        trainer(tmp_path).validate(SimOModule.load_from_checkpoint(last(run)), data, verbose=False)
    words = ["--data.data_dir", str(dark), "--data.image_size", "32", "--ckpt_path", str(last(run))]
    with pytest.raises(SystemExit):
        main(["test", *TINY, *words, "--run_dir", str(tmp_path / "out")])
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"simo: error: {message}")


def test_the_runs_own_config_agrees_with_its_checkpoint(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["image_size"] == SIZE
    main(
        [
            "test",
            "--config",
            str(run / "config.yaml"),
            "--run_dir",
            str(tmp_path / "out"),
            "--ckpt_path",
            str(last(run)),
        ]
    )


def test_a_cache_serves_every_mean_and_std(dark: Path, tmp_path: Path) -> None:
    root = write(tmp_path, 10, 5, {"train": 3})
    first = ImageFolderPairDataModule(root, image_size=8)
    first.load("train")
    (cache,) = root.rglob(".simo*.pt")
    written = cache.stat().st_mtime_ns
    second = ImageFolderPairDataModule(root, image_size=8, mean=[0.1] * 3, std=[0.2] * 3)
    assert second.preprocessing.mean is not None
    second.load("train")
    assert cache.stat().st_mtime_ns == written


def noise(size: int = 8, channels: int = 1, count: int = 40) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(count) % 4, list("abcd"))


def in_memory(source: LabelledImages, **arguments: Any) -> TensorPairDataModule:
    return TensorPairDataModule(source, classes_per_batch=4, samples_per_class=2, augment=None, **arguments)


def test_images_in_memory_keep_their_size_and_are_resized_for_a_model_of_another_one(tmp_path: Path) -> None:
    model, data = SimOModule(Flat()), in_memory(noise())
    trainer(tmp_path, max_epochs=1).fit(model, data)
    assert model.preprocessing == Preprocessing(8, tuple(data.mean), tuple(data.std), channels=1)
    larger = in_memory(noise(12))
    trainer(tmp_path).validate(model, larger, verbose=False)
    assert larger.preprocessing == model.preprocessing
    batch = next(iter(larger.val_dataloader()))
    assert torch.equal(larger.prepare(batch, augment=False)[0], model.preprocessing(batch[0]))
    with pytest.raises(ValueError, match="the images must have the 1 channels that the model takes, got 3"):
        trainer(tmp_path).validate(model, in_memory(noise(8, 3)), verbose=False)
    model.preprocessing = None  # the way to begin anew
    trainer(tmp_path, max_epochs=1).fit(model, in_memory(noise(), mean=[0.25], std=[0.5]))
    assert model.preprocessing == Preprocessing(8, (0.25,), (0.5,), channels=1)


@pytest.mark.parametrize(
    ("default", "given", "arguments", "wanted"),
    [
        (None, Preprocessing(12, channels=1), {}, Preprocessing(12, None, None, 1)),
        (None, Preprocessing(12, channels=1), {"mean": [0.1], "std": [0.2]}, Preprocessing(12, (0.1,), (0.2,), 1)),
        (Preprocessing(12, (0.3,), (0.4,), 1, "squash"), None, {}, Preprocessing(12, (0.3,), (0.4,), 1, "squash")),
        (Preprocessing(9, (0.3,), (0.4,), 1), None, {"mean": [0.1], "std": [0.2]}, Preprocessing(9, (0.1,), (0.2,), 1)),
        (Preprocessing(12, None, None, 1), None, {}, Preprocessing(12, None, None, 1)),
        (Preprocessing(9, (0.3,), (0.4,), 1), Preprocessing(12, channels=1), {}, Preprocessing(12, (0.3,), (0.4,), 1)),
    ],
    ids=["module", "module and data", "encoder", "encoder and data", "size of the encoder", "module and encoder"],
)  # fmt: skip
def test_module_then_arguments_then_encoder_then_images(
    default: Preprocessing | None,
    given: Preprocessing | None,
    arguments: dict[str, Any],
    wanted: Preprocessing,
    tmp_path: Path,
) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(wanted.size[0] ** 2, 4))
    if default is not None:
        encoder.preprocessing = default  # type: ignore[assignment]
    model, data = SimOModule(encoder, preprocessing=given), in_memory(noise(), **arguments)
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, data)
    if wanted.mean is None:
        kept = data.bank_dataloader()
        images = torch.cat([images for images, _ in kept]).double() / 255
        assert data.mean == pytest.approx([float(images.mean())], rel=1e-12)
        wanted = replace(wanted, mean=tuple(data.mean), std=tuple(data.std))  # type: ignore[arg-type]
    assert data.preprocessing == model.preprocessing == wanted


def test_evaluation_does_not_bind_a_module_and_a_data_module_serves_several(dark: Path, tmp_path: Path) -> None:
    model, data = SimOModule(Flat()), in_memory(noise())
    trainer(tmp_path).validate(model, data, verbose=False)
    assert model.preprocessing is None
    files = ImageFolderPairDataModule(dark, **FEW)
    for size in (8, 12):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 4))
        other = SimOModule(encoder, preprocessing=Preprocessing(size, (0.5,) * 3, (0.5,) * 3))
        trainer(tmp_path).validate(other, files, verbose=False)
        assert next(iter(files.val_dataloader()))[0].shape[2:] == (size, size)


def test_a_checkpoint_of_an_older_version_is_evaluated_with_a_warning(run: Path, bright: Path, tmp_path: Path) -> None:
    content = torch.load(last(run), weights_only=True)
    del content["simo_module"]["init_args"]["preprocessing"]
    torch.save(content, tmp_path / "old.ckpt")
    data = ImageFolderPairDataModule(bright, image_size=SIZE, **FEW)
    with pytest.warns(UserWarning, match=r"old\.ckpt does not hold the preprocessing of its images, because an older"):
        trainer(tmp_path).validate(tiny(), data, ckpt_path=tmp_path / "old.ckpt", verbose=False)


class Other(pl.LightningModule):
    """A module with an attribute of that name and another meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = nn.Flatten()
        self.layer = nn.Linear(64, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(self.preprocessing(batch[0])).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_of_its_own_keeps_an_attribute_of_that_name(tmp_path: Path) -> None:
    model = Other()
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, in_memory(noise()))
    assert isinstance(model.preprocessing, nn.Flatten)


@pytest.mark.parametrize(
    ("stem", "size", "message"),
    [
        ("small", (224, 224), "'small' suits images of about 32 px, not of 224 px: each image costs 16 times the work"),
        ("imagenet", (32, 48), "'imagenet' suits images of about 224 px, not of 32 px: .* have 1 x 1 pixels"),
        ("imagenet", (48, 48), "have 2 x 2 pixels"),
    ],
)
def test_a_stem_that_does_not_suit_the_images_is_a_warning(stem: str, size: tuple[int, int], message: str) -> None:
    encoder = nn.Flatten()
    encoder.stem = stem  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=message):
        warn_of_stem(encoder, size)


def test_a_fit_says_so_at_its_start(dark: Path, tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    encoder.stem = "small"  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="of 96 px: each image costs 16 times"):
        trainer(tmp_path, fast_dev_run=True).fit(
            SimOModule(encoder), ImageFolderPairDataModule(dark, image_size=96, **FEW)
        )


@pytest.mark.parametrize(("stem", "size"), [("small", 64), ("imagenet", 64), ("small_stride2", 224), (None, 224)])
def test_a_stem_that_suits_or_is_not_known_is_no_warning(stem: str | None, size: int) -> None:
    encoder = nn.Flatten()
    encoder.stem = stem  # type: ignore[assignment]
    warn_of_stem(encoder, (size, size))
    warn_of_stem(None, (size, size))
