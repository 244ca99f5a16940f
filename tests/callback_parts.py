"""What the tests of callbacks train: a module and a data module that the package does not know."""

from itertools import combinations
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.functional.moments import ClassMoments, class_moments
from tests.bounds import assert_float32_error

NUM_CLASSES = 3


def pictures(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (n,), generator=generator).sort().values
    images = torch.randint(200, (n, 1, 2, 4), generator=generator) + 25 * labels.view(-1, 1, 1, 1)
    return TensorDataset(images.to(torch.uint8), labels)


class Pictures(pl.LightningDataModule):
    """Sorted by class; rank 0 has the first two thirds: no row twice, and other classes on each rank."""

    num_classes = NUM_CLASSES
    class_names = ("cat", "dog", "ship")

    train, val = pictures(60, 0), pictures(40, 1)

    def loader(self, dataset: TensorDataset) -> DataLoader:
        images, labels = dataset.tensors
        if self.trainer is not None and self.trainer.world_size > 1:
            cut = 2 * len(labels) // 3
            own = slice(0, cut) if self.trainer.global_rank == 0 else slice(cut, None)
            images, labels = images[own], labels[own]
        return DataLoader(TensorDataset(images, labels), batch_size=16)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.train)

    def bank_dataloader(self, limit: int | None = None) -> DataLoader:
        return self.loader(TensorDataset(*self.train[:limit]))

    def prepare(self, batch: tuple[Tensor, Tensor], augment: bool) -> tuple[Tensor, Tensor]:
        images, labels = batch
        assert images.dtype == torch.uint8, "prepared twice"
        return images.float() / 255 - 0.5, labels

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return self.trainer.precision_plugin.convert_input(self.prepare(batch, augment=False))


class Encoder(pl.LightningModule):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, dim))

    def embed(self, images: Tensor) -> Tensor:
        return self.net(images).float()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"embeddings": self.embed(batch[0]), "labels": batch[1]}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Shares(pl.LightningDataModule):
    """Four batches of 24 rows in training and two of 20 in validation; of two processes the first has two thirds."""

    num_classes = NUM_CLASSES

    def loader(self, rows: int, seed: int) -> DataLoader:
        images, labels = pictures(4 * rows, seed).tensors
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        batches = []
        for index in order.split(rows):
            own = index
            if self.trainer.world_size > 1:
                cut = 2 * rows // 3
                own = index[:cut] if self.trainer.global_rank == 0 else index[cut:]
            batches.append(((images[own].float() / 255 - 0.5).flatten(1), labels[own]))
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self.loader(24, 0)

    def val_dataloader(self) -> DataLoader:
        return self.loader(20, 1)


def layer() -> nn.Module:
    """An encoder of the rows of Shares, the same every time."""
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(32.0).view(4, 8).sin())
        linear.bias.zero_()
    return linear


class History(pl.Callback):
    """What is logged after the sanity check and after each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, run: pl.Trainer, module: pl.LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in run.callback_metrics.items()})

    on_sanity_check_end = on_train_epoch_end


class Returned(pl.Callback):
    """The embeddings, in float64, and labels that the steps of the last validation, test or training epoch returned.

    Values computed from them differ from those of a callback by float64's rounding alone, whatever the processor: not
    by how the encoder rounds, which depends on the batch size.
    """

    def on_validation_epoch_start(self, run: pl.Trainer, module: pl.LightningModule) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def on_validation_batch_end(self, run, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.batches.append((outputs["embeddings"].detach().double(), outputs["labels"]))

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    @property
    def rows(self) -> np.ndarray:
        return torch.cat([rows for rows, _ in self.batches]).numpy()

    @property
    def labels(self) -> np.ndarray:
        return torch.cat([labels for _, labels in self.batches]).numpy()

    def moments(self, num_classes: int = NUM_CLASSES) -> ClassMoments:
        return class_moments(torch.from_numpy(self.rows), torch.from_numpy(self.labels), num_classes)


def trainer(folder: Path, *callbacks: pl.Callback, **options) -> pl.Trainer:
    quiet = {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
    defaults = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "logger": False, **quiet}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


def embedded(module: Encoder, dataset: TensorDataset) -> tuple[np.ndarray, np.ndarray]:
    images, labels = dataset.tensors
    with torch.no_grad():
        return module.eval().embed(images.float() / 255 - 0.5).double().numpy(), labels.numpy()


def cosine_loop(rows: np.ndarray, labels: np.ndarray) -> list[float]:
    means = [rows[labels == label].mean(0) for label in range(NUM_CLASSES)]
    return [abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(means, 2)]


def neighbours(module: Encoder, known: TensorDataset, asked: TensorDataset, k: int) -> float:
    theirs = KNeighborsClassifier(k, metric="cosine").fit(*embedded(module, known))
    return theirs.score(*embedded(module, asked))


def adam_loop(
    batches: list[tuple[Tensor, Tensor]], lr: float, dtype: type[np.floating] = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax regression on directions by Adam as Kingma & Ba write it."""
    dim = batches[0][0].shape[1]
    theta, first, second = (np.zeros((NUM_CLASSES, dim + 1), dtype) for _ in range(3))
    for step, (rows, labels) in enumerate(batches, start=1):
        gradient = np.zeros_like(theta)
        known = [index for index, label in enumerate(labels.tolist()) if 0 <= label < NUM_CLASSES]
        for index in known:
            row = rows[index].double().numpy().astype(dtype)
            row = np.append(row / np.linalg.norm(row) * np.sqrt(dtype(dim)), dtype(1))
            p = np.exp(theta @ row - (theta @ row).max())
            gradient += np.outer(p / p.sum() - np.eye(NUM_CLASSES, dtype=dtype)[labels[index]], row) / dtype(len(known))
        first = dtype(0.9) * first + dtype(0.1) * gradient
        second = dtype(0.999) * second + dtype(0.001) * gradient**2
        corrected = first / dtype(1 - 0.9**step), second / dtype(1 - 0.999**step)
        theta = theta - dtype(lr) * corrected[0] / (np.sqrt(corrected[1]) + dtype(1e-8))
    assert theta.dtype == dtype
    return theta[:, :-1], theta[:, -1]


def assert_learned(head: torch.nn.Linear, batches: list[tuple[Tensor, Tensor]], lr: float) -> None:
    """Weight and bias err as much as Adam in float32 does: eight times at most, as the sums have another order."""
    exact, plain = (adam_loop(batches, lr, dtype) for dtype in (np.float64, np.float32))
    for actual, *expected in zip((head.weight, head.bias), plain, exact, strict=True):
        assert_float32_error(actual, *map(torch.from_numpy, expected), factor=8)
