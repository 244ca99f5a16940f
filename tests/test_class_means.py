"""Checkpoints hold the names of the classes, and their mean embeddings if these are of their weights."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.optim import SGD

from simo_lightning import DigitsPairDataModule, Embedder, ImageEncoder, Preprocessing, SimOModule
from simo_lightning.callbacks import OnlineKNN
from simo_lightning.checkpoints import TrainingClasses, load_encoder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimOModule, DigitsPairDataModule]:
    folder = tmp_path_factory.mktemp("fitted")
    pl.seed_everything(0)
    module = SimOModule(ImageEncoder("resnet10", width=0.125, image_size=8, stem="small", in_channels=1))
    data = DigitsPairDataModule()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=2,
        callbacks=[OnlineKNN(bank_size=None)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", module, data


def test_means_are_those_of_the_training_images(fitted: tuple[Path, SimOModule, DigitsPairDataModule]) -> None:
    path, _, data = fitted
    classes = load_encoder(path).classes
    assert isinstance(classes, TrainingClasses)
    assert classes.names == data.class_names
    # float64, one image after the other
    encoder = load_encoder(path).double().eval()
    rows: dict[int, list[np.ndarray]] = {}
    for images, labels in data.bank_dataloader():
        with torch.no_grad():
            embeddings = encoder(data.preprocessing(images).double()).numpy()
        for row, label in zip(embeddings, labels.tolist(), strict=True):
            rows.setdefault(label, []).append(row / np.linalg.norm(row))
    expected = np.array([np.mean(rows[label], axis=0) for label in sorted(rows)])
    single = encoder.float()
    images, _ = next(iter(data.bank_dataloader()))
    with torch.no_grad():
        inputs = data.preprocessing(images[:64])
        low = torch.nn.functional.normalize(single(inputs)).double()
        high = torch.nn.functional.normalize(encoder.double()(inputs.double()))
    error = float((low - high).abs().max())
    assert classes.means is not None
    assert np.abs(classes.means.double().numpy() - expected).max() < 10 * error + 1e-7


def test_the_module_has_them_again(fitted: tuple[Path, SimOModule, DigitsPairDataModule], tmp_path: Path) -> None:
    path, module, _ = fitted
    again = SimOModule.load_from_checkpoint(path)
    assert again.classes.names == module.classes.names
    assert torch.equal(again.classes.means, module.classes.means)


def test_means_of_other_weights_are_left_out(tmp_path: Path) -> None:
    module = SimOModule(
        ImageEncoder("resnet10", width=0.125, image_size=8, stem="small", in_channels=1),
        optimizer=lambda p: SGD(p, 0.1),
    )
    trainer = pl.Trainer(
        max_epochs=2,
        limit_train_batches=1,
        limit_val_batches=1,
        check_val_every_n_epoch=3,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=OnlineKNN(),
    )
    data = DigitsPairDataModule()
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    assert load_encoder(tmp_path / "now.ckpt").classes.means is not None
    trainer.fit_loop.max_epochs = 3
    trainer.limit_val_batches = 0
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    classes = load_encoder(tmp_path / "later.ckpt").classes
    assert classes.names == [str(digit) for digit in range(10)]
    assert classes.means is None


def test_a_class_without_images_has_no_mean() -> None:
    module = SimOModule(ImageEncoder("resnet10", width=0.125, image_size=8, stem="small"))
    module.classes = TrainingClasses(["a", "b", "c"])
    module.set_class_means(torch.tensor([[1.0, 0.0], [torch.nan, torch.nan]]))
    assert module.classes.names == ["a", "b", "c"]
    assert module.classes.means[0].tolist() == [1.0, 0.0]
    assert module.classes.means[1:].isnan().all()
    embedder = Embedder(module.encoder, Preprocessing(8, mean=(0.5,) * 3, std=(0.2,) * 3), module.classes)
    assert embedder.scores([[2.0, 0.0]]).tolist() == [[1.0, float("-inf"), float("-inf")]]
