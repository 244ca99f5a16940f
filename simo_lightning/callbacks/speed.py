"""Counts the images a run trains on per second."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class ImagesPerSecond(Callback):
    """Logs ``train/images_per_second``: the images of all processes over the time of the training part of the epoch.

    Validation is not counted. The training part is everything else between two batches: data, augmentation, forward,
    backward, optimizer, logging. Batches that do not begin with a tensor ``(N, ...)`` are not counted, and nothing is
    logged for them.
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._since = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images, self.seconds, self._since = 0, 0.0, time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
            self.images += len(batch[0]) * trainer.world_size
        self.seconds, self._since = self.seconds + now - self._since, now

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.images and self.seconds:
            pl_module.log("train/images_per_second", self.images / self.seconds, sync_dist=True)
