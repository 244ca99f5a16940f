"""Balanced batches in an order that reads the chunks of a stream one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from simo_lightning.data.sampler import ClassBalancedSampler, SmallClasses


class StreamSampler(ClassBalancedSampler):
    """Batches of P x K as of :class:`~simo_lightning.data.ClassBalancedSampler`, drawn from a sliding window of chunks.

    The order of an epoch is a function of ``(seed, epoch)`` and of the labels and chunks of the images; nothing is
    read. It is drawn in three steps:

    1. The chunks are shuffled. The image of the chunk at position ``p`` gets the key ``p + window * u``, with ``u``
       uniform in [0, 1): in the order of the keys, an image comes at most ``window`` chunks after its own begins.
    2. The images of each class, in this order, are split into groups of K. Where a class pauses for more than half a
       window, the images of an incomplete group are set aside; groups of these follow at the end of the class. The
       remaining ``n_c % K`` images are not used in this epoch.
    3. The groups are taken in the order of their last images. As soon as groups of P different classes wait, they are a
       batch, unless the epoch would then have fewer batches than its number of groups allows.

    An epoch has as many batches as one of ``ClassBalancedSampler`` with ``class_sampling`` "natural", in which each
    image comes at most once. Rank r takes the r-th of ``world_size`` equal parts of the sequence of batches, so that
    it reads its own part of the chunks; the batches themselves do not depend on the number of ranks.

    The images of a batch lie in about ``window`` chunks where each class comes in bundles whose size is a multiple of
    K, as :func:`~simo_lightning.streaming.write_stream` arranges them. For any other data the batches are as valid, but
    some of their images lie elsewhere.

    Args:
        labels: Class index of each image, integer ``(N,)``.
        chunks: Chunk that holds each image, non-negative integers ``(N,)``.
        window: Number of chunks, at least 1, from which the images of a batch are drawn.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 2.
        seed: Non-negative.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.
        small_classes: What to do with classes of fewer than K images: "error", "repeat" or "skip".

    Raises:
        ValueError: If ``window`` is below 1, ``chunks`` do not match the labels, or as ``ClassBalancedSampler``.

    Example:
        >>> import torch
        >>> labels, chunks = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]), np.repeat([0, 1], 4)
        >>> sampler = StreamSampler(labels, chunks, window=1, classes_per_batch=2, samples_per_class=2)
        >>> [sorted(batch) for batch in sampler.epoch_blocks(0).tolist()]
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """

    def __init__(
        self,
        labels: Tensor,
        chunks: np.ndarray,
        window: int,
        classes_per_batch: int,
        samples_per_class: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        small_classes: SmallClasses = "error",
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 chunk, got {window}")
        if chunks.shape != tuple(labels.shape):
            raise ValueError(f"chunks must have shape {tuple(labels.shape)} to match labels, got {chunks.shape}")
        super().__init__(labels, classes_per_batch, samples_per_class, seed, rank, world_size, small_classes)
        self.chunks, self.window = chunks, window
        self._drawn: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[int]:
        for batch in self.rank_blocks()[self.start_batch :]:
            yield from batch.tolist()

    def rank_blocks(self) -> np.ndarray:
        """The batches of this rank in this epoch, ``(batches, P * K)`` int32; drawn once."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = None  # frees the memory of the last epoch first
            first = self.rank * self.batches
            self._drawn = (self.epoch, self.epoch_blocks(self.epoch)[first : first + self.batches].copy())
        return self._drawn[1]

    def _draw_blocks(self, random: np.random.Generator) -> np.ndarray:
        """The batches of an epoch, ``(batches, P * K)`` int32."""
        counts, k = np.bincount(self.labels), self.samples_per_class
        first = np.cumsum(counts) - counts  # (C,) place of each class's first image in order
        position = random.permutation(int(self.chunks.max()) + 1).astype(np.float32)
        keys = self.window * random.random(len(self.labels), dtype=np.float32)
        keys += position[self.chunks]
        order = np.argsort(self.labels, kind="stable").astype(np.int32)  # by class
        for start, count in zip(first.tolist(), counts.tolist(), strict=True):
            images = order[start : start + count]
            images[:] = images[_whole_groups_first(keys[images], k, self.window / 2)]
        classes = np.repeat(np.arange(len(counts)), self._chunks)  # (G,) class of each group of K
        number = np.arange(len(classes)) - np.repeat(np.cumsum(self._chunks) - self._chunks, self._chunks)
        last = first[classes] + np.minimum((number + 1) * k, counts[classes]) - 1
        by_time = np.argsort(keys[order[last]], kind="stable")
        groups = by_time[_batches(classes[by_time], self.classes_per_batch, self._blocks, random)]  # (B, P)
        blocks = np.empty((*groups.shape, k), dtype=np.int32)
        for block, group in zip(blocks, groups, strict=True):
            label = classes[group][:, None]
            within = (number[group][:, None] * k + np.arange(k)) % counts[label]  # a small class begins anew
            block[:] = order[first[label] + within]
        return blocks.reshape(len(groups), -1)


def _whole_groups_first(keys: np.ndarray, size: int, pause: float) -> np.ndarray:
    """Order of the images of a class: by their keys, but those of incomplete groups before a pause come at the end."""
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=-np.inf) > pause)
    lengths = np.diff(begins, append=len(keys))
    within = np.arange(len(keys)) - np.repeat(begins, lengths)
    incomplete = within >= np.repeat(lengths - lengths % size, lengths)
    return np.concatenate([order[~incomplete], order[incomplete]])


def _batches(classes: np.ndarray, per_batch: int, batches: int, random: np.random.Generator) -> np.ndarray:
    """Groups of each batch, ``(batches, per_batch)``, as positions in ``classes``, the classes of the groups in time.

    ``b`` further batches of P classes can be made of ``r_c`` groups of each class if and only if
    ``sum_c min(r_c, b) >= P b``. A batch takes one from the left side for each class with ``r_c >= b`` whether it holds
    the class or not, and one for each other class that it holds. So a batch may hold as many of the others as the
    inequality has room for; within that it takes the groups that have waited longest, and it is put off while there are
    too few. With all groups waiting there are enough, so that the number of batches is always reached.
    """
    kept = np.flatnonzero(_kept(classes, batches, random))
    left = np.bincount(classes[kept])  # (C,) groups not yet used
    waiting: list[deque[int]] = [deque() for _ in left]
    never = len(classes)
    oldest = np.full(len(left), never)  # (C,) group of each class that has waited longest
    made: list[np.ndarray] = []
    classes_waiting = 0
    for group, label in zip(kept.tolist(), classes[kept].tolist(), strict=True):
        waiting[label].append(group)
        if oldest[label] < never:
            continue  # a class already waited: nothing has changed for the next batch
        oldest[label] = group
        classes_waiting += 1
        while classes_waiting >= per_batch and len(made) < batches:
            b = batches - len(made)
            frequent = left >= b
            room = int(np.minimum(left, b).sum() - frequent.sum()) - per_batch * (b - 1)
            ready = np.flatnonzero(oldest < never)
            ready = ready[np.argsort(oldest[ready])]
            chosen = ready[frequent[ready] | (np.cumsum(~frequent[ready]) <= room)][:per_batch]
            if len(chosen) < per_batch:
                break
            made.append(oldest[chosen])
            left[chosen] -= 1
            for one in chosen.tolist():
                waiting[one].popleft()
                oldest[one] = waiting[one][0] if waiting[one] else never
                classes_waiting -= not waiting[one]
    assert len(made) == batches, (len(made), batches)
    return np.array(made, dtype=np.int64).reshape(-1, per_batch)


def _kept(classes: np.ndarray, batches: int, random: np.random.Generator) -> np.ndarray:
    """Mask of at most ``batches`` groups of each class, evenly spaced in time."""
    counts = np.bincount(classes)
    order = np.argsort(classes, kind="stable")
    number = np.empty(len(classes), dtype=np.int64)  # of each group within its class
    number[order] = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = np.minimum(1.0, batches / np.maximum(counts, 1))
    shift = random.random(len(counts))
    ends = np.floor((number + 1) * share[classes] + shift[classes] + 1e-9)
    kept: np.ndarray = ends > np.floor(number * share[classes] + shift[classes] + 1e-9)
    return kept
