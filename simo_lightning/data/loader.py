"""A loader whose place in the epoch is part of a checkpoint."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.data.sampler import ClassBalancedSampler, EvaluationSampler, evaluation_batch_size
from simo_lightning.data.sources import ImageSource, LabelledImages


def keep_batch(batch: Any) -> Any:
    """The batch itself: the sources give batches already."""
    return batch


def leave_signals_to_the_trainer(worker: int = 0) -> None:
    """Let a worker outlive the signals that a scheduler, or Ctrl-C, sends to all processes of a job.

    The trainer acts on them after the batch, and needs its workers until it has saved; one that dies of a signal ends
    the run at once. SIGTERM from the process that reads the batches still ends a worker.

    Args:
        worker: Its number, as ``worker_init_fn`` is given it.
    """
    parent = mp.parent_process()
    for name in ("SIGINT", "SIGUSR1"):
        if parent is not None and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # Linux; only there is the sender known
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_the_end, args=(parent.pid,), daemon=True).start()


def _wait_for_the_end(sender: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != sender:
        pass
    os._exit(0)


class ResumableLoader(DataLoader):
    """Batches of a ``ClassBalancedSampler``; a run resumed in mid-epoch goes on with the very next one.

    ``__iter__`` is a generator, so neither sampler nor workers start before the first batch is asked for: Lightning
    calls ``iter`` before ``set_epoch`` when it resumes, and a common loader would then give the order of epoch 0
    (Lightning #21938).

    Args:
        dataset: Gives whole batches through ``__getitems__``.
        sampler: Gives the order, the batch size and the epoch.
        processed: Batches of this epoch that are through the optimiser. Where given, a batch that was handed out but
            not worked through when the state is saved (from a signal handler) comes again after a resume.
        **kwargs: Arguments of ``DataLoader``, such as ``num_workers``.

    Attributes:
        epoch: Epoch of the batch last given.
        batches_yielded: Batches of that epoch given so far, those of an interrupted run included; not what workers
            have prefetched.

    Raises:
        ValueError: If the sampler is of another class.
    """

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
        self._resume: tuple[int, int] | None = None  # epoch and batches to leave out in it

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, ClassBalancedSampler)
        resume, self._resume = self._resume, None
        self.epoch = sampler.epoch
        self.batches_yielded = resume[1] if resume is not None and resume[0] == self.epoch else 0
        sampler.start_batch = self.batches_yielded
        try:
            batches = super().__iter__()
            for batch in batches:
                sampler.start_batch = 0  # only now has a loader without workers asked the sampler
                self.batches_yielded += 1
                yield batch
        finally:
            sampler.start_batch = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches given in it, and what they count: batches of an epoch and the number of ranks."""
        epoch, batches = self._place()
        return {"epoch": epoch, "batches_yielded": batches, **self._scale()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches of ``state_dict``; from the start of the next epoch if they were all.

        Raises:
            ValueError: If the state lies within an epoch and the epoch has another number of batches, or the run
                another number of ranks, than when it was saved.
        """
        epoch, batches = state_dict["epoch"], state_dict["batches_yielded"]
        saved = {name: state_dict[name] for name in self._scale()}
        if 0 < batches < saved["batches_per_epoch"] and saved != self._scale():
            raise ValueError(
                "a checkpoint from within an epoch resumes only where the epoch is cut alike: saved after batch "
                f"{batches} with {saved}, but this run has {self._scale()}; resume as it was, or from an epoch's end"
            )
        if batches >= saved["batches_per_epoch"]:
            epoch, batches = epoch + 1, 0
        self._resume = (epoch, batches)
        assert isinstance(self.sampler, ClassBalancedSampler)
        self.sampler.set_epoch(epoch)

    def _place(self) -> tuple[int, int]:
        assert isinstance(self.sampler, ClassBalancedSampler)
        if self._resume is not None:  # loaded, and no batch given since
            return self._resume
        if self.sampler.epoch != self.epoch:  # a new epoch that has given none yet
            return self.sampler.epoch, 0
        batches = self.batches_yielded
        return self.epoch, batches if self.processed is None else min(batches, self.processed())

    def _scale(self) -> dict[str, int]:
        assert isinstance(self.sampler, ClassBalancedSampler)
        return {"batches_per_epoch": self.sampler.batches, "world_size": self.sampler.num_replicas}

    def draw_seed(self, seed: int) -> int:
        """Seed of the augmentation of the batch last given.

        Args:
            seed: Of the run.

        Returns:
            A function of ``seed`` and of the batch's place among all ranks' of its epoch.
        """
        assert isinstance(self.sampler, ClassBalancedSampler)
        block = (self.batches_yielded - 1) * self.sampler.num_replicas + self.sampler.rank
        return mixed_seed(seed, self.epoch, max(block, 0))


def mixed_seed(*numbers: int) -> int:
    """Non-negative numbers as one seed, below 2^63, that has nothing to do with that of any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def evaluation_loader(source: ImageSource, rank: int, world_size: int, limit: int, **kwargs: Any) -> DataLoader:
    """A rank's share of a split, in order.

    Args:
        source: Gives whole batches through ``__getitems__``.
        rank: Whose share.
        world_size: Number of shares.
        limit: Images of a batch; near it where ranks would differ in batches.
        **kwargs: Arguments of ``DataLoader``.

    Returns:
        The loader.
    """
    return DataLoader(
        source,  # type: ignore[arg-type]
        batch_size=evaluation_batch_size(len(source), world_size, limit),
        sampler=EvaluationSampler(len(source), rank, world_size),
        collate_fn=keep_batch,
        **kwargs,
    )


def loader_arguments(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """What all loaders of a data module have in common, as arguments of ``DataLoader``."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": leave_signals_to_the_trainer,
        "pin_memory": pin_memory,
    }


def hush_lightning(train: ImageSource | None, val: ImageSource | None, num_workers: int) -> None:
    """Leave out what Lightning advises on loaders where it does not hold."""
    if num_workers == 0 and isinstance(train, LabelledImages):  # to images in memory workers only add time
        warnings.filterwarnings("ignore", r".*_dataloader' does not have many workers.*")
    if val is None:  # an empty list is how Lightning is told so
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
