"""Counts the images a run trains on per second."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class ImagesPerSecond(Callback):
    """Logs ``train/images_per_second``: the images of all processes over the time of the training part of the epoch.

    Validation is not counted. The training part is everything else between two batches: data, augmentation, forward,
    backward, optimizer, logging.
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock.

        Args:
            trainer: Unused.
            pl_module: Unused.
        """
        self.images, self.seconds, self._since = 0, 0.0, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch.

        Args:
            trainer: Knows the number of processes.
            pl_module: Unused.
            outputs: Unused.
            batch: Images first.
            batch_idx: Unused.
        """
        now = time.monotonic()
        self.images += len(batch[0]) * trainer.world_size
        self.seconds, self._since = self.seconds + now - self._since, now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the time of validation out.

        Args:
            trainer: Unused.
            pl_module: Unused.
        """
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's speed.

        Args:
            trainer: Unused.
            pl_module: Logs.
        """
        if self.seconds:
            pl_module.log("train/images_per_second", self.images / self.seconds)
