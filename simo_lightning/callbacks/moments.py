"""The base class of callbacks that evaluate class moments, which all of them share."""

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, step_embeddings
from simo_lightning.distributed import sum_over_ranks
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.lightning_private import logged_step
from simo_lightning.metrics import ClassMomentsMetric

# Batches are kept until they have this many rows together: adding them costs a fixed time more than time per row.
_ROWS_AT_ONCE = 4096


class _SharedMoments:
    """Class moments that several callbacks of one trainer sum once: each adds every batch, the first one does it."""

    def __init__(self, num_classes: int, skip_unknown: bool) -> None:
        self.num_classes, self.skip_unknown = num_classes, skip_unknown
        self._metric: ClassMomentsMetric | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._last_added: Hashable = None
        self._result: ClassMoments | None = None
        self._result_at: Hashable = None

    def update(self, embeddings: Tensor, labels: Tensor, index: Hashable) -> None:
        """Add the batch with this index, unless another callback has added it."""
        if index == self._last_added:
            return
        self._last_added = index
        # copies: the next step of a compiled module may overwrite what this one returned
        self._batches.append((embeddings.clone(), labels.clone()))
        if sum(len(kept) for _, kept in self._batches) >= _ROWS_AT_ONCE:
            self._add_batches()

    def compute(self, index: Hashable) -> ClassMoments | None:
        """Moments of all processes, on the CPU, of the batches since the last index; at the same index the same."""
        if index != self._result_at:
            self._add_batches()
            self._result, self._result_at = None, index
            if self._metric is not None:
                self._result = ClassMoments(*(sum_over_ranks(value).cpu() for value in self._metric.moments))
                self._metric = None
        return self._result

    def _add_batches(self) -> None:
        if not self._batches:
            return
        embeddings, labels = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._batches = []
        if self._metric is None:
            dtype = torch.float32 if embeddings.device.type == "mps" else torch.float64
            self._metric = ClassMomentsMetric(self.num_classes, embeddings.shape[1], dtype).to(embeddings.device)
        if self.skip_unknown:
            known = (labels >= 0) & (labels < self.num_classes)
            embeddings, labels = embeddings[known], labels[known]
        self._metric.update(embeddings, labels)


# Of each trainer, by the number of classes and the length of the window in steps; 0 for validation and test.
_SHARED: WeakKeyDictionary[Trainer, dict[tuple[int, int], _SharedMoments]] = WeakKeyDictionary()


def _shared(trainer: Trainer, num_classes: int, window: int) -> _SharedMoments:
    moments = _SHARED.setdefault(trainer, {})
    return moments.setdefault((num_classes, window), _SharedMoments(num_classes, skip_unknown=window > 0))


def _forget(trainer: Trainer, training: bool) -> None:
    """Let the windows of training begin anew, or validation and test; all callbacks call it before a first batch."""
    _SHARED[trainer] = {key: kept for key, kept in _SHARED.get(trainer, {}).items() if (key[1] > 0) != training}


class ClassMomentsCallback(EvaluationCallback):
    """Evaluates the class moments of each validation and test epoch, and of training batches if asked for.

    A subclass implements :meth:`evaluate`. The moments are summed over batches, loaders and processes, so they are
    exact, and they are summed once however many such callbacks a trainer has.

    In training they are the moments of all batches since the last evaluation: embeddings as the loss saw them, of
    augmented images, in training mode and with the weights of those steps, which change within the window. An embedding
    whose label is no class, such as that of an image whose label is hidden, is left out there. After a resume a window
    begins anew.

    Args:
        num_classes: C; None: ``trainer.datamodule.num_classes``.
        every_n_epochs: Epochs of training from one evaluation of validation to the next.
        every_n_steps: Optimizer steps from one evaluation of training batches to the next; None: no such evaluation,
            and no cost.

    Raises:
        ValueError: If a number is below 1; and when the first embeddings come, if the number of classes is unknown.
    """

    def __init__(
        self, num_classes: int | None = None, every_n_epochs: int = 1, every_n_steps: int | None = None
    ) -> None:
        super().__init__(every_n_epochs)
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None, got {every_n_steps}")
        self.num_classes = num_classes
        self.every_n_steps = every_n_steps
        self._epoch: _SharedMoments | None = None
        self._window: _SharedMoments | None = None
        self._windows = 0  # that are complete

    def evaluate(self, trainer: Trainer, stage: str, moments: ClassMoments) -> dict[str, Tensor]:
        """Evaluate; every process calls it with the same moments.

        Args:
            trainer: The trainer.
            stage: "train", "val" or "test".
            moments: Of all processes, on the CPU.

        Returns:
            Scalars to log by name.
        """
        raise NotImplementedError

    @override
    def reset(self, trainer: Trainer) -> None:
        self._epoch = None
        _forget(trainer, training=False)

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        self._epoch = _shared(trainer, self._known_num_classes(trainer), window=0)
        self._epoch.update(embeddings, labels, index)

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        moments = None if self._epoch is None else self._epoch.compute("end of the epoch")
        return {} if moments is None else self.evaluate(trainer, stage, moments)

    def log_values(self, trainer: Trainer, pl_module: LightningModule, stage: str, values: dict[str, Tensor]) -> None:
        """Log values as ``<stage>/<name>``; those of training at this very step, whenever Lightning logs next.

        Args:
            trainer: With the loggers.
            pl_module: Logs validation and test.
            stage: "train", "val" or "test".
            values: Scalars, the same on every process.
        """
        if stage != "train":
            super().log_values(trainer, pl_module, stage, values)
            return
        # pl_module.log would hold a value back until log_every_n_steps, and then repeat it; so do Lightning's monitors
        named = {f"{stage}/{name}": value for name, value in values.items()}
        trainer.callback_metrics.update(named)
        step = logged_step(trainer)
        for logger in trainer.loggers:
            numbers = {name: float(value) for name, value in named.items()}
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=step)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = None
        self._windows = trainer.global_step // (self.every_n_steps or 1)
        _forget(trainer, training=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None:
            return
        found, index = step_embeddings(outputs), (trainer.current_epoch, batch_idx)
        if found is not None:
            self._window = _shared(trainer, self._known_num_classes(trainer), self.every_n_steps)
            self._window.update(*found, index)
        if trainer.global_step // self.every_n_steps > self._windows:
            self._windows = trainer.global_step // self.every_n_steps
            moments = None if self._window is None else self._window.compute(index)
            if moments is not None:
                self.log_values(trainer, pl_module, "train", self.evaluate(trainer, "train", moments))
