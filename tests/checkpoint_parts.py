"""Modules and trainers of the checkpoint tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simo_lightning import DigitsPairDataModule, SimOLoss, SimOModule
from simo_lightning.class_paths import InitArgumentsMixin


class Flat(InitArgumentsMixin, nn.Module):
    """An encoder of digits that remembers its arguments."""

    embedding_dim = 4

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 4))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(images)
        return embeddings


class OwnEncoder(SimOModule):
    """A subclass with arguments of its own, whose encoder is made inside."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__(Flat(), SimOLoss(form="log"))
        self.gain = gain


class SavesHyperparameters(SimOModule):
    """A subclass that calls save_hyperparameters(), with objects among them."""

    def __init__(self, encoder: nn.Module, make: Callable[..., Any] = print, gain: float = 1.0) -> None:
        super().__init__(encoder)
        self.gain = gain
        self.save_hyperparameters()


def weights(module: pl.LightningModule) -> dict[str, Tensor]:
    """A copy of the state of a module, whole where it is sharded."""
    state = module.state_dict().items()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in state}


class Seen(pl.Callback):
    """Keeps the weights before training, and the batch and the loss of every step of this rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps: list[Any] = []
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((*batch, outputs["loss"]))


def trainer(folder: Path, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 1, "enable_model_summary": False, "accelerator": "cpu", **quiet, **arguments}
    return pl.Trainer(default_root_dir=folder, **options)


def fit(module: pl.LightningModule, folder: Path, ckpt_path: Path | None = None, **arguments: Any) -> pl.Trainer:
    run = trainer(folder, **arguments)
    run.fit(module, datamodule=DigitsPairDataModule(samples_per_class=10), ckpt_path=ckpt_path)
    return run


def save(module: pl.LightningModule, path: Path, **arguments: Any) -> Path:
    """A checkpoint of a module that is not trained."""
    run = trainer(path.parent)
    run.strategy.connect(module)
    run.save_checkpoint(path, **arguments)
    return path
