"""A data loader whose position in the epoch is saved in checkpoints."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from simo_lightning.data.pictures import AugmentedPictures
from simo_lightning.data.sampler import ClassBalancedSampler
from simo_lightning.data.sources import ImageSource


class TrainingBatch(NamedTuple):
    """A batch of a training loader.

    Attributes:
        images: uint8 ``(N, C, H, W)``; or ``(N, V, C, H, W)``, V views of each image that the loader has augmented.
        labels: int64 ``(N,)``.
        draw: Seed of the batch's augmentation.
    """

    images: Tensor
    labels: Tensor
    draw: int


class DrawnIndices(list[int]):
    """Indices of a batch, and the seed of its augmentation.

    Args:
        indices: Positions of the images in the data set.
        draw: Seed of the batch's augmentation.
    """

    def __init__(self, indices: Iterable[int], draw: int) -> None:
        super().__init__(indices)
        self.draw = draw

    def __reduce__(self) -> tuple[Any, ...]:
        return DrawnIndices, (list(self), self.draw)


class DrawnBatches(BatchSampler):
    """Batches of a ``ClassBalancedSampler``, each with the seed of its augmentation.

    The seed is a function of the sampler's seed, the epoch and the index of the batch among those of all ranks. It
    travels with the indices, so that a worker that augments the images knows it.

    Args:
        sampler: Defines order, batch size and epoch.
    """

    sampler: ClassBalancedSampler

    def __init__(self, sampler: ClassBalancedSampler) -> None:
        super().__init__(sampler, sampler.batch_size, drop_last=True)

    def __iter__(self) -> Iterator[DrawnIndices]:
        epoch, first = self.sampler.epoch, self.sampler.start_batch
        for number, indices in enumerate(super().__iter__(), first):
            yield DrawnIndices(indices, self.draw(epoch, number))

    def draw(self, epoch: int, number: int) -> int:
        """Seed of a batch of this rank.

        Args:
            epoch: Epoch.
            number: Index of the batch in it, among those of this rank.

        Returns:
            Seed below 2^63.
        """
        return mixed_seed(self.sampler.seed, epoch, number * self.sampler.num_replicas + self.sampler.rank)


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

    Each batch carries the seed of its augmentation (:class:`DrawnBatches`), which a data set such as
    ``AugmentedPictures`` finds in the indices, too.

    ``__iter__`` is a generator, so neither sampler nor workers start before the first batch is requested: Lightning
    calls ``iter`` before ``set_epoch`` when it resumes, and other loaders then return the order of epoch 0
    (Lightning #21938; torchdata's ``StatefulDataLoader`` too, see docs/data.md).

    Args:
        dataset: Returns whole batches through ``__getitems__``, an ``ImageSource`` or ``AugmentedPictures``.
        sampler: Defines order, batch size and epoch.
        processed: Returns the number of batches of this epoch that the optimizer has processed. If given, a batch that
            was returned but not processed when the state was saved (from a signal handler) is repeated after a resume.
        **kwargs: Arguments of ``DataLoader``, such as ``num_workers``; not those that the sampler determines.

    Attributes:
        epoch: Epoch of the last batch returned.
        batches_yielded: Batches of that epoch returned so far, including those of an interrupted run, without those
            that workers have prefetched.

    Raises:
        ValueError: If the sampler is not a ``ClassBalancedSampler``.
    """

    batch_sampler: DrawnBatches

    def __init__(
        self,
        dataset: ImageSource | AugmentedPictures,
        sampler: ClassBalancedSampler,
        processed: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(sampler, ClassBalancedSampler):
            raise ValueError(f"sampler must be a ClassBalancedSampler, got {type(sampler).__name__}")
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=DrawnBatches(sampler),
            collate_fn=keep_batch,
            **kwargs,
        )
        self.processed = processed
        self.epoch = 0
        self.batches_yielded = 0
        self._resume: tuple[int, int] | None = None  # epoch and batches to skip in it

    @property  # type: ignore[override]
    def sampler(self) -> ClassBalancedSampler:
        """The sampler of the batches. Lightning sets its epoch, and does not wrap a DistributedSampler."""
        return self.batch_sampler.sampler

    @sampler.setter
    def sampler(self, value: Any) -> None:
        """Ignore the sequential sampler that ``DataLoader`` makes beside a batch sampler."""

    def __iter__(self) -> Iterator[TrainingBatch]:  # type: ignore[override]
        sampler = self.sampler
        resume, self._resume = self._resume, None
        self.epoch = sampler.epoch
        self.batches_yielded = resume[1] if resume is not None and resume[0] == self.epoch else 0
        sampler.start_batch = self.batches_yielded
        try:
            for images, labels in super().__iter__():
                sampler.start_batch = 0  # a loader without workers reads the sampler with its first batch
                draw = self.batch_sampler.draw(self.epoch, self.batches_yielded)
                self.batches_yielded += 1
                yield TrainingBatch(images, labels, draw)
        finally:
            sampler.start_batch = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches returned in it, batches per epoch, number of ranks, and what else identifies the order."""
        epoch, batches = self._position()
        return {"epoch": epoch, "batches_yielded": batches, **self._scale()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches of ``state_dict``, or with the next epoch if it was complete.

        Raises:
            ValueError: If the state is from within an epoch and the number of batches per epoch or of ranks, or another
                number that identifies the order, has changed since it was saved.
        """
        epoch, batches = state_dict["epoch"], state_dict["batches_yielded"]
        saved = {name: state_dict.get(name, -1) for name in self._scale()}
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
        scale = {"batches_per_epoch": self.sampler.batches, "world_size": self.sampler.num_replicas}
        return {**scale, **self.sampler.identity}


def mixed_seed(*numbers: int) -> int:
    """Hash of non-negative numbers to one seed below 2^63."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def default_workers(trainer: Trainer | None = None, most: int = 16) -> int:
    """Processes for a loader that decodes images: the cores that this process may use, over its neighbours on the node.

    Args:
        trainer: Knows the number of processes on the node; None: one.
        most: Largest number.

    Returns:
        0 where a process cannot be forked safely: on other systems than Linux, and within a loader's worker.
    """
    if sys.platform != "linux" or mp.current_process().daemon:
        return 0
    neighbours = 1 if trainer is None else max(1, trainer.num_devices)
    return max(1, min(most, len(os.sched_getaffinity(0)) // neighbours))


def silence_inapplicable_warnings(training: bool, evaluation: bool, validation: bool) -> None:
    """Silence Lightning's warnings about loaders where they do not apply.

    Args:
        training: Whether the training loader rightly has no workers, which only add time for images in memory.
        evaluation: The same of the other loaders.
        validation: Whether there is a validation split.
    """
    quiet = ["train"] * training + ["val", "test", "predict"] * evaluation
    if quiet:
        warnings.filterwarnings("ignore", rf".*'({'|'.join(quiet)})_dataloader' does not have many workers.*")
    if not validation:  # Lightning takes an empty list as no validation
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
