"""A data loader whose position in the epoch is saved in checkpoints."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.data.sampler import ClassBalancedSampler
from simo_lightning.data.sources import ImageSource, LabelledImages


class TrainingBatch(NamedTuple):
    """A batch of a training loader.

    Attributes:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        draw: Seed of the batch's augmentation.
    """

    images: Tensor
    labels: Tensor
    draw: int


def keep_batch(batch: Any) -> Any:
    """Return the batch unchanged: the sources return whole batches."""
    return batch


def leave_signals_to_the_trainer(worker: int = 0) -> None:
    """Make a worker ignore the signals that a scheduler or Ctrl-C sends to all processes of a job (``worker_init_fn``).

    The trainer handles them after the batch and needs its workers until it has saved; a worker killed by a signal ends
    the run at once. SIGTERM from the process that reads the batches still ends a worker.
    """
    parent = mp.parent_process()
    for name in ("SIGINT", "SIGUSR1"):
        if parent is not None and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # Linux, where the sender is known
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_the_end, args=(parent.pid,), daemon=True).start()


def _wait_for_the_end(sender: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != sender:
        pass
    os._exit(0)


class ResumableLoader(DataLoader):
    """Batches of a ``ClassBalancedSampler``; a run resumed within an epoch continues with the next batch.

    Each batch carries the seed of its augmentation, a function of the sampler's seed, the epoch and the index of the
    batch among those of all ranks.

    ``__iter__`` is a generator, so neither sampler nor workers start before the first batch is requested: Lightning
    calls ``iter`` before ``set_epoch`` when it resumes, and other loaders then return the order of epoch 0
    (Lightning #21938; torchdata's ``StatefulDataLoader`` too, see docs/data.md).

    Args:
        dataset: Returns whole batches through ``__getitems__``.
        sampler: Defines order, batch size and epoch.
        processed: Returns the number of batches of this epoch that the optimizer has processed. If given, a batch that
            was returned but not processed when the state was saved (from a signal handler) is repeated after a resume.
        **kwargs: Arguments of ``DataLoader``, such as ``num_workers``.

    Attributes:
        epoch: Epoch of the last batch returned.
        batches_yielded: Batches of that epoch returned so far, including those of an interrupted run, without those
            that workers have prefetched.

    Raises:
        ValueError: If the sampler is not a ``ClassBalancedSampler``.
    """

    sampler: ClassBalancedSampler

    def __init__(
        self,
        dataset: ImageSource,
        sampler: ClassBalancedSampler,
        processed: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(sampler, ClassBalancedSampler):
            raise ValueError(f"sampler must be a ClassBalancedSampler, got {type(sampler).__name__}")
        fixed = {"batch_size": sampler.batch_size, "drop_last": True, "shuffle": False, "collate_fn": keep_batch}
        super().__init__(dataset, sampler=sampler, **{**kwargs, **fixed})  # type: ignore[arg-type]
        self.processed = processed
        self.epoch = 0
        self.batches_yielded = 0
        self._resume: tuple[int, int] | None = None  # epoch and batches to skip in it

    def __iter__(self) -> Iterator[TrainingBatch]:  # type: ignore[override]
        sampler = self.sampler
        resume, self._resume = self._resume, None
        self.epoch = sampler.epoch
        self.batches_yielded = resume[1] if resume is not None and resume[0] == self.epoch else 0
        sampler.start_batch = self.batches_yielded
        try:
            for images, labels in super().__iter__():
                sampler.start_batch = 0  # a loader without workers reads the sampler with its first batch
                position = self.batches_yielded * sampler.num_replicas + sampler.rank
                self.batches_yielded += 1
                yield TrainingBatch(images, labels, mixed_seed(sampler.seed, self.epoch, position))
        finally:
            sampler.start_batch = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches returned in it, batches per epoch and number of ranks."""
        epoch, batches = self._position()
        return {"epoch": epoch, "batches_yielded": batches, **self._scale()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches of ``state_dict``, or with the next epoch if it was complete.

        Raises:
            ValueError: If the state is from within an epoch and the number of batches per epoch or of ranks has changed
                since it was saved.
        """
        epoch, batches = state_dict["epoch"], state_dict["batches_yielded"]
        saved = {name: state_dict[name] for name in self._scale()}
        if 0 < batches < saved["batches_per_epoch"] and saved != self._scale():
            raise ValueError(
                "a checkpoint from within an epoch requires the same number of batches and ranks: saved after batch "
                f"{batches} with {saved}, but this run has {self._scale()}; or resume from the end of an epoch"
            )
        if batches >= saved["batches_per_epoch"]:
            epoch, batches = epoch + 1, 0
        self._resume = (epoch, batches)
        self.sampler.set_epoch(epoch)

    def _position(self) -> tuple[int, int]:
        if self._resume is not None:  # loaded, no batch returned since
            return self._resume
        if self.sampler.epoch != self.epoch:  # a new epoch without a batch yet
            return self.sampler.epoch, 0
        batches = self.batches_yielded
        return self.epoch, batches if self.processed is None else min(batches, self.processed())

    def _scale(self) -> dict[str, int]:
        return {"batches_per_epoch": self.sampler.batches, "world_size": self.sampler.num_replicas}


def mixed_seed(*numbers: int) -> int:
    """Hash of non-negative numbers to one seed below 2^63."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def silence_inapplicable_warnings(train: ImageSource | None, val: ImageSource | None, num_workers: int) -> None:
    """Silence Lightning's warnings about loaders where they do not apply."""
    if num_workers == 0 and isinstance(train, LabelledImages):  # for images in memory workers only add time
        warnings.filterwarnings("ignore", r".*_dataloader' does not have many workers.*")
    if val is None:  # Lightning takes an empty list as no validation
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
