"""What the callbacks that judge class moments have in common: of validation, test and a window of training batches."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from simo_lightning.callbacks.watcher import EmbeddingWatcher, embedded_rows
from simo_lightning.distributed import sum_over_ranks
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.metrics import ClassMomentsMetric

# Batches are kept until together they have so many rows: adding them costs a fixed time more than time per row.
_ROWS_AT_ONCE = 4096


class MomentsWatcher(EmbeddingWatcher):
    """Hands class moments to :meth:`judge`: those of each validation and test epoch, and of training if asked for.

    In training they are those of all batches since the last time: the embeddings as the loss saw them, so of augmented
    images, in training mode and by the weights of those steps, which change within the window. A row whose label is no
    class, as that of an image whose label is hidden, is left out there. A window that a checkpoint cuts begins anew.

    The moments are summed over batches, loaders and processes, so they are exact on any number of them. A module whose
    steps return no embeddings is left alone.

    Args:
        num_classes: C; None: ``trainer.datamodule.num_classes``.
        every_n_epochs: Epochs of training from one judgement of validation to the next.
        every_n_steps: Steps of the optimizer from one judgement of training batches to the next; None: no judgement,
            and no cost.

    Raises:
        ValueError: If a number is below 1; and when the first embeddings come, if the number of classes is not known.
    """

    def __init__(
        self, num_classes: int | None = None, every_n_epochs: int = 1, every_n_steps: int | None = None
    ) -> None:
        super().__init__(every_n_epochs)
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None, got {every_n_steps}")
        self.num_classes = num_classes
        self.every_n_steps = every_n_steps
        self._epoch: _Sums | None = None
        self._window: _Sums | None = None
        self._windows = 0  # that are over

    def judge(self, trainer: Trainer, pl_module: LightningModule, stage: str, moments: ClassMoments) -> None:
        """Judge; every process comes here with the same moments.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "train", "val" or "test".
            moments: Of all processes, on the CPU.
        """
        raise NotImplementedError

    def record(self, trainer: Trainer, pl_module: LightningModule, stage: str, values: dict[str, Tensor]) -> None:
        """Log the values as ``<stage>/<name>``; those of training at this very step, whenever Lightning logs next.

        Args:
            trainer: Has the loggers.
            pl_module: Logs validation and test.
            stage: "train", "val" or "test".
            values: Scalars by name, the same on every process.
        """
        if stage != "train":
            for name, value in values.items():
                # the values are those of all processes already; sync_dist tells Lightning that this was thought of
                pl_module.log(f"{stage}/{name}", value.to(pl_module.device), sync_dist=True)
            return
        # pl_module.log would hold a value back until log_every_n_steps, and then repeat it; so do Lightning's monitors
        named = {f"{stage}/{name}": value for name, value in values.items()}
        trainer.callback_metrics.update(named)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            numbers = {name: float(value) for name, value in named.items()}
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=step)

    def begin(self) -> None:
        """Forget the last epoch of validation or test."""
        self._epoch = None

    def collect(self, trainer: Trainer, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            trainer: Knows the number of classes.
            embeddings: ``(N, D)``.
            labels: ``(N,)``.
        """
        self._epoch = self._epoch or self._sums(trainer, embeddings.shape[1], embeddings.device)
        self._epoch.add(embeddings, labels)

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Judge the epoch.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "val" or "test".
        """
        sums, self._epoch = self._epoch, None
        if sums is not None:
            self.judge(trainer, pl_module, stage, sums.of_all_processes())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._window = None
        self._windows = trainer.global_step // (self.every_n_steps or 1)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None:
            return
        rows = embedded_rows(outputs)
        if rows is not None:
            self._window = self._window or self._sums(trainer, rows[0].shape[1], rows[0].device, skip_unknown=True)
            self._window.add(*rows)
        if trainer.global_step // self.every_n_steps > self._windows:
            self._windows = trainer.global_step // self.every_n_steps
            sums, self._window = self._window, None
            if sums is not None:
                self.judge(trainer, pl_module, "train", sums.of_all_processes())

    def _sums(self, trainer: Trainer, dim: int, device: torch.device, skip_unknown: bool = False) -> "_Sums":
        num_classes = self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if num_classes is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} needs the number of classes: give {name}(num_classes=...) or a data module "
                "with the attribute num_classes, got neither"
            )
        return _Sums(num_classes, dim, device, skip_unknown)


class _Sums:
    """Class moments of batches, which are added by the thousand rows."""

    def __init__(self, num_classes: int, dim: int, device: torch.device, skip_unknown: bool) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.metric = ClassMomentsMetric(num_classes, dim, dtype).to(device)
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._skip_unknown = skip_unknown

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        # a copy: what a compiled step returned may be overwritten by the next
        self._batches.append((embeddings.clone(), labels.clone()))
        if sum(len(rows) for rows, _ in self._batches) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._batches:
            return
        embeddings, labels = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._batches = []
        if self._skip_unknown:
            known = (labels >= 0) & (labels < self.metric.num_classes)
            embeddings, labels = embeddings[known], labels[known]
        self.metric.update(embeddings, labels)

    def of_all_processes(self) -> ClassMoments:
        self._flush()
        return ClassMoments(*(sum_over_ranks(value).cpu() for value in self.metric.moments))
