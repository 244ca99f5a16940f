"""The callbacks with a module and data loaders that know nothing of this package."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import (
    CollapseAlarm,
    EmbeddingPlots,
    GeometryMonitor,
    OnlineKNN,
    OnlineProbe,
)
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import class_moments
from tests.callback_parts import trainer


class Plain(pl.LightningModule):
    """Rows of six numbers to embeddings of four."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(24.0).view(4, 6).sin())
            self.layer.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        embeddings = self(batch[0])
        return {"loss": embeddings.square().mean(), "embeddings": embeddings, "labels": batch[1]}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"embeddings": self(batch[0]), "labels": batch[1]}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def rows(count: int, seed: int, classes: int = 3, first: int = 0) -> TensorDataset:
    """Noise around one point per class; labels sorted, so that each batch may bring new ones."""
    generator = torch.Generator().manual_seed(seed)
    labels = first + torch.arange(count) * classes // count
    points = torch.randn(6, classes, generator=torch.Generator().manual_seed(9)).T
    return TensorDataset(points[labels - first] + 0.7 * torch.randn(count, 6, generator=generator), labels)


def loader(dataset: TensorDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=8)


TRAIN, VAL = rows(60, 0), rows(30, 1)


def all_callbacks() -> list[pl.Callback]:
    return [GeometryMonitor(), OnlineKNN(k=5, bank=loader(TRAIN)), OnlineProbe(), CollapseAlarm(), EmbeddingPlots()]


def embedded(module: Plain, dataset: TensorDataset) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        return module(dataset.tensors[0]).double().numpy(), dataset.tensors[1].numpy()


def test_every_callback_evaluates_a_plain_module_with_plain_loaders(tmp_path: Path) -> None:
    module, callbacks = Plain(), all_callbacks()
    run = trainer(tmp_path, *callbacks, max_epochs=2)
    run.fit(module, loader(TRAIN), loader(VAL))
    logged = run.validate(module, loader(VAL), verbose=False)[0]
    theirs = KNeighborsClassifier(5, metric="cosine").fit(*embedded(module, TRAIN))
    assert logged["val/knn"] == pytest.approx(theirs.score(*embedded(module, VAL)))
    assert 1 / 3 < logged["val/probe"] <= 1
    assert logged["val/collapsed_classes"] in (0, 2, 3)
    found, labels = embedded(module, VAL)
    moments = class_moments(torch.from_numpy(found), torch.from_numpy(labels), 3)
    for name, metric in GEOMETRY.items():
        assert logged[f"val/{name}"] == pytest.approx(float(metric(moments)), rel=1e-4, nan_ok=True)
    assert {"similarity.png", "scatter.png", "norms.png", "spectrum.png"} <= {
        path.name for path in (tmp_path / "plots").iterdir()
    }
    tested = run.test(module, loader(VAL), verbose=False)[0]
    assert tested["test/knn"] == logged["val/knn"]


def test_the_number_of_classes_is_found_from_the_labels_or_given(tmp_path: Path) -> None:
    monitor = GeometryMonitor()
    trainer(tmp_path, monitor).validate(Plain(), loader(VAL), verbose=False)
    assert monitor.moments is not None
    assert monitor.moments.counts.tolist() == [10, 10, 10]
    monitor = GeometryMonitor(num_classes=5)
    trainer(tmp_path, monitor).validate(Plain(), loader(VAL), verbose=False)
    assert monitor.moments.counts.tolist() == [10, 10, 10, 0, 0]
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1 for num_classes=2, got 0\.\.2"):
        trainer(tmp_path, GeometryMonitor(num_classes=2)).validate(Plain(), loader(VAL), verbose=False)


def test_batches_of_any_form_are_embedded_by_a_function(tmp_path: Path) -> None:
    class Dictionaries(Plain):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {"embeddings": self(batch["rows"]), "labels": batch["label"]}

    def dictionaries(dataset: TensorDataset) -> DataLoader:
        pairs: Any = [{"rows": row, "label": label} for row, label in dataset]
        return DataLoader(pairs, batch_size=8)

    def embed(module: pl.LightningModule, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return module(batch["rows"]), batch["label"]

    knn = OnlineKNN(k=5, bank=dictionaries(TRAIN), embed=embed)
    logged = trainer(tmp_path, knn).validate(Dictionaries(), dictionaries(VAL), verbose=False)[0]
    expected = trainer(tmp_path, OnlineKNN(k=5, bank=loader(TRAIN))).validate(Plain(), loader(VAL), verbose=False)[0]
    assert logged == expected
    with pytest.raises(TypeError, match=r"a batch to embed must be \(images, labels\), got dict: pass embed=function"):
        trainer(tmp_path, OnlineKNN(k=5, bank=dictionaries(TRAIN))).validate(Dictionaries(), dictionaries(VAL))


def test_the_bank_goes_through_the_transfer_hooks_of_the_module(tmp_path: Path) -> None:
    class Scaled(Plain):
        def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] * 2, batch[1]]

    def hooked(dataset: TensorDataset) -> TensorDataset:
        return TensorDataset((dataset.tensors[0] + 1) * 2, dataset.tensors[1])

    logged = trainer(tmp_path, OnlineKNN(k=5, bank=loader(TRAIN))).validate(Scaled(), loader(VAL), verbose=False)[0]
    theirs = KNeighborsClassifier(5, metric="cosine").fit(*embedded(Plain(), hooked(TRAIN)))
    assert logged["val/knn"] == pytest.approx(theirs.score(*embedded(Plain(), hooked(VAL))))


def test_what_is_missing_is_named_before_the_first_batch(tmp_path: Path) -> None:
    class Untouched(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            raise AssertionError("a batch was evaluated")

        training_step = validation_step

    line = r"OnlineKNN requires a bank to compare with: OnlineKNN\(bank=loader\), or a data module with bank_dataloader"
    with pytest.raises(ValueError, match=line):
        trainer(tmp_path, OnlineKNN(), max_epochs=1, num_sanity_val_steps=0).fit(
            Untouched(), loader(TRAIN), loader(VAL)
        )
    with pytest.raises(ValueError, match=line):
        trainer(tmp_path, OnlineKNN()).validate(Untouched(), loader(VAL))
    with pytest.raises(ValueError, match="bank_size must be None with a bank"):
        OnlineKNN(bank=loader(TRAIN), bank_size=50)


def test_a_callback_that_nobody_asked_for_is_left_out_with_one_line(tmp_path: Path, caplog: Any) -> None:
    knn, monitor = OnlineKNN(), GeometryMonitor(num_classes=10**7)
    knn.required = monitor.required = False

    class Wide(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return {"embeddings": self(batch[0]).repeat(1, 200), "labels": batch[1]}

    with caplog.at_level("INFO"):
        run = trainer(tmp_path, knn, monitor)
        assert run.validate(Wide(), loader(VAL), verbose=False) == [{}]
    left_out = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert len(left_out) == 2
    assert left_out[0].startswith("OnlineKNN is left out: it requires a bank")
    assert left_out[1].startswith(
        "GeometryMonitor is left out: (num_classes + embedding_dim) * embedding_dim must fit in 4 GiB"
    )


def test_steps_without_embeddings_are_named(tmp_path: Path) -> None:
    class LossAlone(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            return None

    run = trainer(tmp_path, OnlineProbe(), max_epochs=1)
    with pytest.raises(ValueError, match=r"OnlineProbe requires that LossAlone.training_step returns .* with loss$"):
        run.fit(LossAlone(), loader(TRAIN), loader(VAL))
    run = trainer(tmp_path, GeometryMonitor(every_n_steps=2), max_epochs=1)
    with pytest.raises(ValueError, match=r"GeometryMonitor\(every_n_steps=2\) requires that LossAlone.training_step"):
        run.fit(LossAlone(), loader(TRAIN), loader(VAL))
    with pytest.warns(UserWarning, match=r"GeometryMonitor requires that LossAlone.test_step .* got nothing"):
        assert trainer(tmp_path, GeometryMonitor()).test(LossAlone(), loader(VAL), verbose=False) == [{}]


def test_a_split_that_lacks_classes_and_has_further_ones_is_drawn(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        class_names = ("a", "b", "c", "d", "e")
        num_classes, num_train_classes = 5, 3

        def train_dataloader(self) -> DataLoader:
            return loader(TRAIN)

        def bank_dataloader(self, limit: int | None = None) -> DataLoader:
            return loader(TRAIN)

        def val_dataloader(self) -> DataLoader:
            data, labels = VAL.tensors
            return loader(TensorDataset(data, torch.tensor([0, 2, 4])[labels]))

    monitor, alarm = GeometryMonitor(), CollapseAlarm()
    run = trainer(tmp_path, monitor, alarm, EmbeddingPlots(), OnlineProbe(), OnlineKNN(k=5), max_epochs=1)
    run.fit(Plain(), datamodule=Data())  # a picture that cannot be drawn is a warning, which is an error here
    assert monitor.moments is not None
    assert monitor.moments.counts.tolist() == [10, 0, 10, 0, 10]
    assert len(list((tmp_path / "plots").glob("*.png"))) == 8
    assert {"val/probe", "val/probe_macro", "val/knn", "val/class_cosine"} <= run.callback_metrics.keys()
