"""Log the geometry of the embeddings of validation and test."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from simo_lightning.callbacks.watcher import EmbeddingWatcher
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.metrics import ClassMomentsMetric


class GeometryMonitor(EmbeddingWatcher):
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
        super().__init__()
        self.num_classes = num_classes
        self.moments: ClassMoments | None = None
        self._metric: ClassMomentsMetric | None = None

    def begin(self) -> None:
        """Forget the last epoch."""
        self._metric = None

    def collect(self, trainer: Trainer, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            trainer: Knows the number of classes.
            embeddings: ``(N, D)``.
            labels: ``(N,)``.
        """
        if self._metric is None:
            self._metric = self._new_metric(trainer, embeddings.shape[1], embeddings.device)
        self._metric.update(embeddings, labels)

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log under ``val/`` or ``test/``.

        Args:
            trainer: Unused.
            pl_module: Logs.
            stage: "val" or "test".
        """
        if self._metric is None:
            return
        with self._metric.sync_context():
            self.moments = ClassMoments(*(value.cpu() for value in self._metric.moments))
        self._metric = None
        for name, function in GEOMETRY.items():
            # the values are those of all processes already; sync_dist tells Lightning that this was thought of
            pl_module.log(f"{stage}/{name}", function(self.moments).to(pl_module.device), sync_dist=True)

    def _new_metric(self, trainer: Trainer, dim: int, device: torch.device) -> ClassMomentsMetric:
        num_classes = self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if num_classes is None:
            raise ValueError(
                "GeometryMonitor needs the number of classes: give GeometryMonitor(num_classes=...) or a data module "
                "with the attribute num_classes, got neither"
            )
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return ClassMomentsMetric(num_classes, dim, dtype).to(device)
