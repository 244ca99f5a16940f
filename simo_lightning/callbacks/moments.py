"""The base class of callbacks that evaluate class moments, which are summed once for all of them."""

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, described, step_embeddings
from simo_lightning.distributed import largest_over_ranks, sum_over_ranks
from simo_lightning.functional.moments import SECOND_BUDGET_MB, ClassMoments
from simo_lightning.lightning_private import logged_step

# Batches are added together once they have this many embeddings: most of the time of an addition is a fixed cost.
_CHUNK_SIZE = 4096


class _SharedMoments:
    """Class moments that several callbacks of one trainer share: each passes every batch, which is added once.

    Without a number of classes, the moments have as many as the largest label requires, over all processes.
    """

    def __init__(self, num_classes: int | None, skip_unknown: bool, second_budget_mb: float) -> None:
        self.num_classes, self.skip_unknown, self.second_budget_mb = num_classes, skip_unknown, second_budget_mb
        self._moments: ClassMoments | None = None
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
        if sum(len(kept) for _, kept in self._batches) >= _CHUNK_SIZE:
            self._add_batches()

    def compute(self, index: Hashable, device: torch.device) -> ClassMoments | None:
        """Moments over all processes, on the CPU, of the batches since the last index; computed once per index."""
        if index != self._result_at:
            self._add_batches()
            moments, self._moments, self._result_at = self._moments, None, index
            # a process without embeddings takes part in the sums
            own = (0, 0) if moments is None else tuple(moments.sums.shape)
            num_classes, dim = (largest_over_ranks(size, device) for size in own)
            self._result = None
            if num_classes:
                if moments is None:
                    moments = self._zeros(num_classes, dim, torch.device("cpu") if device.type == "mps" else device)
                self._result = self._padded(moments, num_classes).map(lambda part: sum_over_ranks(part).cpu())
        return self._result

    def _add_batches(self) -> None:
        if not self._batches:
            return
        embeddings, labels = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._batches = []
        if self.skip_unknown:
            known = labels >= 0
            if self.num_classes is not None:
                known &= labels < self.num_classes
            embeddings, labels = embeddings[known], labels[known]
        if self._moments is not None and embeddings.shape[1:] != self._moments.sums.shape[1:]:
            dim = self._moments.sums.shape[1]
            raise ValueError(f"embeddings must have shape (N, {dim}), got {tuple(embeddings.shape)}")
        if embeddings.device.type == "mps":  # which has no float64
            embeddings, labels = embeddings.cpu(), labels.cpu()
        num_classes = self.num_classes or _smallest_num_classes(self._moments, labels)
        if self._moments is None:
            self._moments = self._zeros(num_classes, embeddings.shape[1], embeddings.device)
        self._moments = self._padded(self._moments, num_classes)
        self._moments.add_(embeddings, labels)

    def _zeros(self, num_classes: int, dim: int, device: torch.device) -> ClassMoments:
        return ClassMoments.zeros(num_classes, dim, device=device, second_budget_mb=self.second_budget_mb)

    def _padded(self, moments: ClassMoments, num_classes: int) -> ClassMoments:
        """The moments with further classes that have no embeddings."""
        if num_classes == len(moments.counts):
            return moments
        padded = self._zeros(num_classes, moments.sums.shape[1], moments.sums.device)
        for name, part in padded.tensors().items():  # second only where it is still within the budget
            own = moments.tensors()[name]
            part[: len(own)] = own
        return padded


def _smallest_num_classes(moments: ClassMoments | None, labels: Tensor) -> int:
    """C that holds the labels and the moments so far, at least 1."""
    so_far = 1 if moments is None else len(moments.counts)
    return max(so_far, int(labels.max()) + 1) if len(labels) else so_far


# By trainer, then by number of classes, length of the window in steps, 0 for validation and test, and budget.
_SHARED: WeakKeyDictionary[Trainer, dict[tuple[int | None, int, float], _SharedMoments]] = WeakKeyDictionary()


def _shared(trainer: Trainer, num_classes: int | None, window: int, budget: float) -> _SharedMoments:
    moments = _SHARED.setdefault(trainer, {})
    return moments.setdefault((num_classes, window, budget), _SharedMoments(num_classes, window > 0, budget))


def _forget(trainer: Trainer, training: bool) -> None:
    """Clear the windows of training, or validation and test; all callbacks call it before the first batch."""
    _SHARED[trainer] = {key: kept for key, kept in _SHARED.get(trainer, {}).items() if (key[1] > 0) != training}


class ClassMomentsCallback(EvaluationCallback):
    """Evaluates the class moments of each validation and test epoch, and optionally of training batches.

    A subclass implements :meth:`evaluate`. The moments are summed over batches, loaders and processes, so they are
    exact, and they are summed once for all such callbacks of a trainer that have the same arguments. They are float64,
    on the CPU where the device has none (MPS).

    In training they are the moments of all batches since the last evaluation: embeddings of augmented images in
    training mode, as in the loss, with the weights of each step, which change within the window. Embeddings whose label
    is not a class, such as those of unlabelled images, are ignored there. A resumed run begins a new window.

    Args:
        num_classes: C; None: ``trainer.datamodule.num_classes``, else one more than the largest label.
        every_n_epochs: Epochs of training from one evaluation of validation to the next.
        every_n_steps: Optimizer steps from one evaluation of training batches to the next; None: none, at
            no cost.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``; where they would be
            larger, the moments are without ``second``.

    Raises:
        ValueError: If a number is below 1; in the run, if a label is not a class, the other moments would take more
            than 4 GiB, or with ``every_n_steps`` the training steps return no embeddings.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        second_budget_mb: float = SECOND_BUDGET_MB,
    ) -> None:
        super().__init__(every_n_epochs)
        if not second_budget_mb >= 0:
            raise ValueError(f"second_budget_mb must be at least 0, got {second_budget_mb}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None, got {every_n_steps}")
        self.num_classes = num_classes
        self.every_n_steps = every_n_steps
        self.second_budget_mb = second_budget_mb
        self._epoch: _SharedMoments | None = None
        self._window: _SharedMoments | None = None
        self._windows = 0  # complete ones

    def evaluate(self, trainer: Trainer, stage: str, moments: ClassMoments) -> dict[str, Tensor]:
        """Evaluate; every process calls it with the same moments.

        Args:
            trainer: The trainer.
            stage: "train", "val" or "test".
            moments: Over all processes, on the CPU.

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
        num_classes = self._known_num_classes(trainer)
        if self._epoch is None and not self._fits(num_classes, embeddings):
            return
        self._epoch = _shared(trainer, num_classes, 0, self.second_budget_mb)
        self._epoch.update(embeddings, labels, index)

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        moments = None if self._epoch is None else self._epoch.compute("end of the epoch", pl_module.device)
        return {} if moments is None else self.evaluate(trainer, stage, moments)

    def log_values(self, trainer: Trainer, pl_module: LightningModule, stage: str, values: dict[str, Tensor]) -> None:
        """Log values as ``<stage>/<name>``; those of training at the current step.

        Args:
            trainer: With the loggers.
            pl_module: Logs validation and test.
            stage: "train", "val" or "test".
            values: Scalars, the same on every process.
        """
        if stage != "train":
            super().log_values(trainer, pl_module, stage, values)
            return
        # pl_module.log would delay a value until log_every_n_steps and then repeat it
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
        returned, index = step_embeddings(outputs), (trainer.current_epoch, batch_idx)
        if returned is not None:
            self._window = _shared(trainer, self._known_num_classes(trainer), self.every_n_steps, self.second_budget_mb)
            self._window.update(*returned, index)
        elif self.required:
            raise ValueError(
                f"{type(self).__name__}(every_n_steps={self.every_n_steps}) requires that "
                f"{type(pl_module).__name__}.training_step returns loss, embeddings (N, D) and labels (N,), "
                f"got {described(outputs)}"
            )
        if trainer.global_step // self.every_n_steps > self._windows:
            self._windows = trainer.global_step // self.every_n_steps
            moments = None if self._window is None else self._window.compute(index, pl_module.device)
            if moments is not None:
                self.log_values(trainer, pl_module, "train", self.evaluate(trainer, "train", moments))

    def _fits(self, num_classes: int | None, embeddings: Tensor) -> bool:
        """Whether the moments are small enough, for a callback that is not required; others raise when they are not."""
        if self.required or num_classes is None:
            return True
        try:
            ClassMoments.zeros(num_classes, embeddings.shape[1], device="meta", second_budget_mb=0)
        except ValueError as error:
            self._tell_once(f"{type(self).__name__} is left out: {error}")
            return False
        return True
