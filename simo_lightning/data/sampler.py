"""Samplers with their own rank and world size, which Lightning does not wrap."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class ClassBalancedSampler(DistributedSampler):
    """Indices in batches of P x K: P different classes, K different images of each.

    An epoch is a sequence of batches that depends only on ``(seed, epoch)``. Batch ``b`` belongs to rank
    ``b % world_size``; the last ``batches % world_size`` batches are dropped, so that all ranks have the same number.

    Coverage. Each class of ``n_c`` images is shuffled and split into ``q_c = n_c // K`` chunks; the remaining
    ``n_c % K`` images are not used in this epoch. Each batch takes one chunk of each of the P classes with the most
    chunks left, ties at random, until fewer than P classes have chunks left. No image is repeated within an epoch. The
    number of batches is the largest possible one: the largest B with ``sum_c min(q_c, B) >= P * B``. With classes of
    equal size that is ``sum_c q_c // P``, and every image is used once, up to remainders of K and P. Of a class much
    larger than the others an epoch uses only a part, another one in each epoch.

    It is a ``DistributedSampler`` so that Lightning does not wrap it, also with ``use_distributed_sampler=True``.

    Args:
        labels: Class index of each image, integer ``(N,)``; indices without an image are skipped.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 2: a single image has no positive pair.
        seed: Non-negative.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.

    Attributes:
        epoch: Set by ``set_epoch``.
        start_batch: Batches of this rank that the next iteration skips (a resumed epoch); does not change the length.

    Raises:
        ValueError: If ``labels`` are not integers ``(N,)``, P exceeds the number of classes, K is below 2 or above the
            size of the smallest class, the seed is negative, or there are fewer batches than ranks.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> sampler = ClassBalancedSampler(labels, classes_per_batch=3, samples_per_class=2)
        >>> sorted(sampler)
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        labels: Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        counts = _class_counts(labels)
        sizes = counts[counts > 0]
        if not 1 <= classes_per_batch <= len(sizes):
            raise ValueError(
                f"classes_per_batch must lie in 1..{len(sizes)}, the number of classes, got {classes_per_batch}"
            )
        if samples_per_class < 2:
            raise ValueError(
                f"samples_per_class must be at least 2 (1 gives no positive pair), got {samples_per_class}"
            )
        if samples_per_class > sizes.min():
            smallest = int(np.where(counts > 0, counts, counts.max() + 1).argmin())
            raise ValueError(
                f"samples_per_class must not exceed the smallest class: class {smallest} has {counts[smallest]} "
                f"images, got {samples_per_class}"
            )
        if seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed}")
        super().__init__(range(len(labels)), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.labels = labels.numpy().astype(np.int64)
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.batch_size = classes_per_batch * samples_per_class
        self.start_batch = 0
        self.batches = _count_blocks(sizes // samples_per_class, classes_per_batch) // world_size
        if self.batches == 0:
            raise ValueError(
                f"world_size must not exceed the batches of an epoch, got {world_size} ranks for "
                f"{_count_blocks(sizes // samples_per_class, classes_per_batch)} batches of {self.batch_size} images"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        blocks = self.epoch_blocks(self.epoch)[: self.batches * self.num_replicas]
        mine = blocks[self.rank :: self.num_replicas][self.start_batch :]
        return iter(mine.ravel().tolist())

    def epoch_blocks(self, epoch: int) -> np.ndarray:
        """All batches of an epoch over all ranks, ``(batches, P * K)`` int64; the K images of a class are adjacent."""
        return self._draw_blocks(np.random.default_rng([self.seed, epoch]))

    def _draw_blocks(self, random: np.random.Generator) -> np.ndarray:
        """One pass over the images in batches, ``(batches, P * K)``."""
        shuffled = random.permutation(len(self.labels))
        order = shuffled[np.argsort(self.labels[shuffled], kind="stable")]  # sorted by class, shuffled within each
        counts = np.bincount(self.labels)
        schedule = _schedule(counts // self.samples_per_class, self.classes_per_batch, random)  # (B, P) classes
        firsts = np.cumsum(counts) - counts  # position of the first image of each class in order
        starts = firsts[schedule] + self.samples_per_class * _occurrence(schedule)
        positions = starts[..., None] + np.arange(self.samples_per_class)  # (B, P, K)
        return order[positions].reshape(len(schedule), -1)


def _class_counts(labels: Tensor) -> np.ndarray:
    """Number of images of each class index; ValueError unless ``labels`` are such indices."""
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers of shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be non-negative class indices, got {int(labels.min())}")
    return np.bincount(labels.numpy())


def _count_blocks(chunks: np.ndarray, classes_per_batch: int) -> int:
    """The largest B with ``sum_c min(chunks_c, B) >= classes_per_batch * B``."""
    low, high = 0, int(chunks.sum()) // classes_per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(chunks, middle).sum() >= classes_per_batch * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _schedule(chunks: np.ndarray, classes_per_batch: int, random: np.random.Generator) -> np.ndarray:
    """Classes of each batch, ``(B, P)``: those with the most chunks left, ties at random."""
    ties = iter(random.random(len(chunks) + int(chunks.sum())).tolist())
    heap = [(-count, next(ties), label) for label, count in enumerate(chunks.tolist()) if count]
    heapq.heapify(heap)
    schedule = []
    while len(heap) >= classes_per_batch:
        taken = [heapq.heappop(heap) for _ in range(classes_per_batch)]
        schedule.append([label for _, _, label in taken])
        for count, _, label in taken:
            if count < -1:
                heapq.heappush(heap, (count + 1, next(ties), label))
    return np.array(schedule, dtype=np.int64).reshape(-1, classes_per_batch)


def _occurrence(schedule: np.ndarray) -> np.ndarray:
    """Number of earlier occurrences of each entry's class, shape of ``schedule``."""
    flat = schedule.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    occurrence = np.empty_like(flat)
    occurrence[order] = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    return occurrence.reshape(schedule.shape)


class EvaluationSampler(DistributedSampler):
    """This rank's share ``rank, rank + world_size, ...``, without padding or repetition.

    Args:
        size: Number of images.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer images than ranks.

    Example:
        >>> list(EvaluationSampler(5, rank=1, world_size=2))
        [1, 3]
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        if size < world_size:
            raise ValueError(
                f"every rank needs at least one image to evaluate, got {size} images for {world_size} ranks"
            )
        super().__init__(range(size), world_size, rank, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def evaluation_batch_size(size: int, world_size: int, limit: int) -> int:
    """The batch size nearest to ``limit`` that gives all ranks of an ``EvaluationSampler`` the same number of batches.

    Shares differ by one image if ``world_size`` does not divide ``size``. If that image formed its own batch, one rank
    would wait forever in the collectives of its forward pass (DDP broadcasts the buffers of BatchNorm).

    Example:
        >>> evaluation_batch_size(201, world_size=2, limit=100)  # shares of 101 and 100
        99
        >>> evaluation_batch_size(200, world_size=2, limit=100)
        100
    """
    if limit < 1:
        raise ValueError(f"the evaluation batch size must be at least 1, got {limit}")
    share, surplus = divmod(size, world_size)
    candidates = [*range(limit, 1, -1), *range(limit + 1, limit + share + 2)]
    if surplus == 0 or share == 0:
        return limit
    return next(batch for batch in candidates if share % batch)  # the additional image then joins an incomplete batch


def pair_indices(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs ``i < j`` of a batch, split into similar (same label) and dissimilar ones.

    Args:
        labels: Class index of each image, ``(N,)``.

    Returns:
        Similar pairs ``(S, 2)`` and dissimilar pairs ``(T, 2)``, int64, ``S + T = N (N - 1) / 2``.

    Raises:
        ValueError: If ``labels`` is not ``(N,)``.

    Example:
        >>> similar, dissimilar = pair_indices(torch.tensor([0, 0, 1]))
        >>> similar.tolist(), dissimilar.tolist()
        ([[0, 1]], [[0, 2], [1, 2]])
    """
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    pairs = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device).T  # (N (N - 1) / 2, 2)
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    return pairs[same], pairs[~same]
