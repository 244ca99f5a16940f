"""Arguments that are auto keep validation short, whatever the size of the data, and checkpoints see their values."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import BestCheckpoint, LastCheckpoint, OnlineKNN, RetrievalMonitor
from simo_lightning.callbacks.budget import choose
from tests.callback_parts import History, trainer


class Many(pl.LightningDataModule):
    """Many tiny images of 200 classes, so that the least bank takes far more than a tenth of an epoch."""

    num_classes = 200

    def __init__(self, train: int = 8000, val: int = 300) -> None:
        super().__init__()
        self.train, self.val, self.limits = draw(train, 0), draw(val, 1), []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=500)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=500)

    def bank_dataloader(self, limit: int | None = None) -> DataLoader:
        self.limits.append(limit)
        return DataLoader(TensorDataset(*self.train[:limit]), batch_size=500)


def draw(count: int, seed: int) -> TensorDataset:
    images = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images, torch.arange(count) % 200)


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"embeddings": self(batch[0]), "labels": batch[1]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def monitors(folder) -> list[pl.Callback]:
    best = ModelCheckpoint(folder / "theirs", monitor="val/knn", mode="max")
    return [BestCheckpoint(), LastCheckpoint(), best, EarlyStopping("val/knn", mode="max", patience=50)]


def test_a_fit_evaluates_first_and_last_and_in_between_as_the_budget_allows(tmp_path, caplog):
    data, history, knn = Many(), History(), OnlineKNN()
    options = {"max_epochs": 7, "enable_checkpointing": True}
    trainer(tmp_path, *monitors(tmp_path), knn, history, **options).fit(Linear(), data)
    # 3 passes of 8,000 images train; 1,920 less 300 of validation buy a bank of 20 * 200 images every third time
    assert knn.planned == (4000, 3)
    line = "OnlineKNN compares with 4,000 of 8,000 images of the bank every 3 epochs"
    assert sum(line in record.message for record in caplog.records) == 1
    assert [limit for limit in data.limits if limit] == [4000] * 4  # epochs 1, 3, 6 and the last, 7
    values = [float(seen["val/knn"]) for seen in history.seen[1:]]
    assert len(values) == 7
    assert values[0] == values[1]
    assert values[2] == values[3] == values[4]
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
    assert list((tmp_path / "theirs").iterdir())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_has_the_last_value_and_the_same_weights(tmp_path):
    whole, parts = Linear(), Linear()
    options = {"enable_checkpointing": True}
    trainer(tmp_path / "1", *monitors(tmp_path / "1"), OnlineKNN(), max_epochs=6, **options).fit(whole, Many())
    for epochs in (4, 6):  # the fifth epoch is not evaluated
        history = History()
        callbacks = [*monitors(tmp_path / "2"), OnlineKNN(), history]
        last = tmp_path / "2" / "checkpoints" / "last.ckpt"
        run = trainer(tmp_path / "2", *callbacks, max_epochs=epochs, **options)
        run.fit(parts, Many(), ckpt_path=last if epochs == 6 else None)
    assert torch.equal(whole.layer.weight, parts.layer.weight)
    assert [len(seen) > 0 and "val/knn" in seen for seen in history.seen[-2:]] == [True, True]


def test_explicit_numbers_and_evaluations_outside_of_a_fit_are_as_given(tmp_path):
    data = Many()
    trainer(tmp_path, OnlineKNN(), max_epochs=1).validate(Linear(), data, verbose=False)
    assert data.limits == [None]
    fixed = OnlineKNN(bank_size=700, every_n_epochs=np.int64(2))
    trainer(tmp_path, fixed, max_epochs=2).fit(Linear(), data)
    assert fixed.planned is None
    assert data.limits == [None, 700]
    only_interval = OnlineKNN(bank_size=4000)
    trainer(tmp_path, only_interval, max_epochs=1).fit(Linear(), data)
    assert only_interval.planned == (None, 3)
    only_size = OnlineKNN(every_n_epochs=10)
    trainer(tmp_path, only_size, max_epochs=1).fit(Linear(), Many(30_000))
    assert only_size.planned == (None, 1)  # ten validations buy all images


def test_retrieval_has_fewer_queries_where_images_are_many(tmp_path):
    monitor = RetrievalMonitor()
    trainer(tmp_path, monitor, max_epochs=1).fit(Linear(), Many(1000, 5000))
    images, every = monitor.planned
    # D = 128 is assumed: 5,000 * 1,012 multiplications a query, of 3 * 1,000 * 0.04 images' worth of a million
    assert (images, every) == (4000, 169)
    assert monitor.class_values  # the first epoch is evaluated


@pytest.mark.parametrize("budget", [0.5, 40, 900, 1e6])
def test_a_plan_keeps_to_the_budget_or_to_the_least_number_of_images(budget):
    plan = choose(budget, cost=1.5, fixed=0, total=700, least=50, sizes=True, interval=True)
    images = 700 if plan.images is None else plan.images
    assert images * 1.5 / plan.every <= budget
    assert plan.every == 1 or images == 50


@pytest.mark.parametrize("callback", [OnlineKNN, RetrievalMonitor])
def test_an_interval_is_a_number_or_auto(callback):
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        callback(every_n_epochs=0)
