"""Samplers that take rank and world size themselves, so that Lightning never wraps them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class ClassBalancedSampler(DistributedSampler):
    """Flat order of indices in which every block of P x K is a batch: P different classes, K different images of each.

    An epoch is a sequence of blocks that is a function of ``(seed, epoch)`` alone. Block ``b`` goes to rank
    ``b % world_size``; the last ``blocks % world_size`` blocks are left out, so that all ranks have as many.

    Coverage. Each class of ``n_c`` images is shuffled and cut into ``q_c = n_c // K`` chunks; the remaining
    ``n_c % K`` images are not used in this epoch. Each block takes one chunk of each of the P classes that have most
    chunks left, ties at random, until fewer than P classes have any. No image comes twice in an epoch. The number of
    blocks is the most that any order allows: the largest B with ``sum_c min(q_c, B) >= P * B``. With classes of equal
    size that is ``sum_c q_c // P``, so every image comes once, up to remainders of K and P. A class much larger than
    the others is not exhausted in an epoch; other images of it come in the next.

    It is a ``DistributedSampler`` only because Lightning does not wrap one, whatever ``use_distributed_sampler`` says.

    Args:
        labels: Class index of each image, integer ``(N,)``; an index that no image has is no class.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 2: one image alone has no positive pair.
        seed: Non-negative.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.

    Attributes:
        epoch: Set by ``set_epoch``.
        start_batch: Batches of this rank that the next iteration skips (a resumed epoch); the length stays.

    Raises:
        ValueError: If ``labels`` are no integers ``(N,)``, P exceeds the number of classes, K is under 2 or over the
            smallest class, the seed is negative, or an epoch has no batch for every rank.

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
                f"classes_per_batch must lie in 1..{len(sizes)}, the classes there are, got {classes_per_batch}"
            )
        if samples_per_class < 2:
            raise ValueError(
                f"samples_per_class must be at least 2 (1 makes no positive pair), got {samples_per_class}"
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
        """All blocks of an epoch, over all ranks, ``(blocks, P * K)`` int64: K images of a class stand together."""
        return self._draw_blocks(np.random.default_rng([self.seed, epoch]))

    def _draw_blocks(self, random: np.random.Generator) -> np.ndarray:
        """One visit of the classes in blocks, ``(blocks, P * K)``."""
        shuffled = random.permutation(len(self.labels))
        order = shuffled[np.argsort(self.labels[shuffled], kind="stable")]  # by class, shuffled inside each
        counts = np.bincount(self.labels)
        schedule = _schedule(counts // self.samples_per_class, self.classes_per_batch, random)  # (B, P) classes
        firsts = np.cumsum(counts) - counts  # where each class begins in order
        starts = firsts[schedule] + self.samples_per_class * _occurrence(schedule)
        positions = starts[..., None] + np.arange(self.samples_per_class)  # (B, P, K)
        return order[positions].reshape(len(schedule), self.classes_per_batch * self.samples_per_class)


def _class_counts(labels: Tensor) -> np.ndarray:
    """Number of images of each index, after a check that ``labels`` are such indices."""
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
    """Classes of each block, ``(B, P)``: always those with most chunks left, ties at random."""
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
    """How often each entry's class came before it, shape of ``schedule``."""
    flat = schedule.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    occurrence = np.empty_like(flat)
    occurrence[order] = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    return occurrence.reshape(schedule.shape)


class EvaluationSampler(DistributedSampler):
    """This rank's share in order, ``rank, rank + world_size, ...``: no image padded, none twice.

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
            raise ValueError(f"every rank needs an image to evaluate, got {size} images for {world_size} ranks")
        super().__init__(range(size), world_size, rank, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def evaluation_batch_size(size: int, world_size: int, limit: int) -> int:
    """The batch size nearest to ``limit`` with which all ranks of an ``EvaluationSampler`` have as many batches.

    Shares differ by one image where ``world_size`` does not divide ``size``. If that image was a batch of its own, one
    rank would wait forever in the collectives of its forward pass (DDP broadcasts the buffers of BatchNorm).

    Example:
        >>> evaluation_batch_size(201, world_size=2, limit=100)  # shares of 101 and 100
        99
        >>> evaluation_batch_size(200, world_size=2, limit=100)
        100
    """
    if limit < 1:
        raise ValueError(f"the batch size for evaluation must be at least 1, got {limit}")
    share, surplus = divmod(size, world_size)
    candidates = [*range(limit, 1, -1), *range(limit + 1, limit + share + 2)]
    if surplus == 0 or share == 0:
        return limit
    return next(batch for batch in candidates if share % batch)  # the extra image joins a batch that is not full


def pair_indices(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Unordered pairs ``i < j`` of a batch, separated by whether they share a label.

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
