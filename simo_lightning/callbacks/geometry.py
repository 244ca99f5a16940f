"""Log the geometry of the embeddings of validation and test."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.metrics import ClassMomentsMetric


class GeometryMonitor(Callback):
    """Log every function of ``functional.geometry`` at the end of each validation and test epoch.

    The names are ``val/orthogonality``, ``test/effective_rank`` and so on. The class moments of all embeddings that
    the steps return as ``outputs["embeddings"]`` with ``outputs["labels"]`` are summed, over batches, loaders and
    processes, so the numbers are exact; a module whose steps return no embeddings is left alone.

    Args:
        num_classes: C; None: ``trainer.datamodule.num_classes``.

    Attributes:
        moments: Class moments of the last epoch, over all processes, on the CPU; None before.

    Raises:
        ValueError: When the first embeddings come, if the number of classes is not known.
    """

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = num_classes
        self.moments: ClassMoments | None = None
        self._metric: ClassMomentsMetric | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch."""
        self._metric = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch."""
        self._metric = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._add(trainer, outputs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._add(trainer, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log under ``val/``."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log under ``test/``."""
        self._log(pl_module, "test")

    def _add(self, trainer: Trainer, outputs: Any) -> None:
        if trainer.sanity_checking or not isinstance(outputs, dict) or "embeddings" not in outputs:
            return
        embeddings = outputs["embeddings"]
        if self._metric is None:
            self._metric = self._new_metric(trainer, embeddings.shape[1], embeddings.device)
        self._metric.update(embeddings, outputs["labels"])

    def _new_metric(self, trainer: Trainer, dim: int, device: torch.device) -> ClassMomentsMetric:
        num_classes = self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if num_classes is None:
            raise ValueError(
                "GeometryMonitor needs the number of classes: give GeometryMonitor(num_classes=...) or a data module "
                "with the attribute num_classes, got neither"
            )
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return ClassMomentsMetric(num_classes, dim, dtype).to(device)

    def _log(self, pl_module: LightningModule, stage: str) -> None:
        if self._metric is None:
            return
        with self._metric.sync_context():
            self.moments = ClassMoments(*(value.cpu() for value in self._metric.moments))
        self._metric = None
        for name, function in GEOMETRY.items():
            # the values are those of all processes already; sync_dist tells Lightning that this was thought of
            pl_module.log(f"{stage}/{name}", function(self.moments).to(pl_module.device), sync_dist=True)
