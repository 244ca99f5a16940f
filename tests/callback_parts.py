"""What the tests of callbacks train: a module and a data module that the package does not know."""

from itertools import combinations
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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
