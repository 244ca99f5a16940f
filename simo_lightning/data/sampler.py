"""Samplers with their own rank and world size, which Lightning does not wrap."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

SmallClasses = Literal["repeat", "skip", "error"]
ClassSampling = Literal["natural", "sqrt", "balanced"]


class ClassBalancedSampler(DistributedSampler):
    """Indices in batches of P x K: P different classes, K images of each.

    An epoch is a sequence of batches that depends only on ``(seed, epoch)``. Batch ``b`` belongs to rank
    ``b % world_size``; the last ``batches % world_size`` batches are dropped, so that all ranks have the same number.

    A pass over a class of ``n_c`` images is a shuffle of them, split into ``q_c = n_c // K`` chunks; the remaining
    ``n_c % K`` images are not used in this pass. Each batch takes one chunk of each of P classes, those with the most
    chunks left, ties at random. Where classes appear unequally often, the batches are then shuffled.

    ``class_sampling`` says how many chunks ``a_c`` of each class an epoch takes:

    - "natural": in proportion to ``n_c``: at most one pass, so that no image is repeated within an epoch. The number of
      batches is the largest possible one: the largest B with ``sum_c min(q_c, B) >= P * B``. Of a class much larger
      than the others an epoch uses only a part, another one in each epoch.
    - "sqrt": in proportion to ``sqrt(n_c)``, in ``B = sum_c q_c // P`` batches, at most one chunk in each.
    - "balanced": the same number of every class, in the same number of batches.

    With "sqrt" and "balanced", ``a_c`` is rounded down or up, at random in each epoch such that its mean is exact; a
    class that appears in more than ``q_c`` batches is used again, in a new shuffle for each pass. Two ranks may then
    take the same image in one step. With classes of equal size all three have ``B = sum_c q_c // P`` batches, and every
    image is used once, up to remainders of K and P.

    ``small_classes`` says what happens to a class of fewer than K images:

    - "error": it raises.
    - "repeat": ``q_c = 1``, and a chunk holds each of its images ``K // n_c`` times and ``K % n_c`` of them, at random,
      once more. Only here an image comes more than once in a batch.
    - "skip": it is left out.

    It is a ``DistributedSampler`` so that Lightning does not wrap it, also with ``use_distributed_sampler=True``.

    Args:
        labels: Class index of each image, integer ``(N,)``; indices without an image are skipped.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 2: a single image has no positive pair.
        seed: Non-negative.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.
        small_classes: What to do with classes of fewer than K images: "error", "repeat" or "skip".
        class_sampling: How often classes appear: "natural", "sqrt" or "balanced".

    Attributes:
        epoch: Set by ``set_epoch``.
        start_batch: Batches of this rank that the next iteration skips (a resumed epoch); does not change the length.
        batches: Batches of an epoch on each rank.
        identity: Further numbers on which the order depends; a run resumed within an epoch must have the same.

    Raises:
        ValueError: If ``labels`` are not integers ``(N,)``, P exceeds the number of classes that are not left out, K is
            below 2, a class is smaller than K and ``small_classes`` is "error", the seed is negative, an option is
            unknown, or there are fewer batches than ranks.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> sampler = ClassBalancedSampler(labels, classes_per_batch=3, samples_per_class=2)
        >>> sorted(sampler)
        [0, 1, 2, 3, 4, 5]
        >>> sampler = ClassBalancedSampler(torch.tensor([0, 0, 1]), 2, samples_per_class=2, small_classes="repeat")
        >>> sorted(sampler)
        [0, 1, 2, 2]
    """

    def __init__(
        self,
        labels: Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        small_classes: SmallClasses = "error",
        class_sampling: ClassSampling = "natural",
    ) -> None:
        check_sampling(small_classes, class_sampling)
        counts = _class_counts(labels)
        if samples_per_class < 2:
            raise ValueError(
                f"samples_per_class must be at least 2 (1 gives no positive pair), got {samples_per_class}"
            )
        chunks = _chunks(counts, samples_per_class, small_classes)
        classes = int((chunks > 0).sum())
        if not 1 <= classes_per_batch <= classes:
            which = f"of at least {samples_per_class} images" if small_classes == "skip" else ""
            raise ValueError(
                f"classes_per_batch must lie in 1..{classes}, the number of training classes{which and ' ' + which}, "
                f"got {classes_per_batch}"
            )
        if seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed}")
        super().__init__(range(len(labels)), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        # A copy: a loader that pickles the tensor for its workers moves it to shared memory and frees its own
        self.labels = labels.numpy().astype(np.int64)
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.class_sampling = class_sampling
        self.batch_size = classes_per_batch * samples_per_class
        self.start_batch = 0
        self.identity: dict[str, int] = {}
        self._chunks = chunks  # (C,) in one pass over each class
        if class_sampling == "natural":
            self._blocks = _count_blocks(chunks, classes_per_batch)
        else:
            self._blocks = int(chunks.sum()) // classes_per_batch
        self.batches = self._blocks // world_size
        if self.batches == 0:
            raise ValueError(
                f"world_size must not exceed the batches of an epoch, got {world_size} ranks for "
                f"{self._blocks} batches of {self.batch_size} images"
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
        """The batches of an epoch, ``(batches, P * K)``."""
        appearances = self._appearances(random)  # (C,)
        per_pass, counts = np.maximum(self._chunks, 1), np.bincount(self.labels)
        later = np.maximum(-(-appearances // per_pass) - 1, 0)  # (C,) passes over each class after its first
        images, passes = self._passes_over_classes(later)
        shuffled = random.permutation(len(images))
        order = shuffled[np.argsort(passes[shuffled], kind="stable")]  # by pass, shuffled within each
        sizes = np.bincount(passes)
        starts = np.cumsum(sizes) - sizes  # position of the first image of each pass in order
        schedule = _schedule(appearances, self.classes_per_batch, random)  # (B, P) classes
        visit, chunk = np.divmod(_occurrence(schedule), per_pass[schedule])  # (B, P) each
        second = len(later) + np.cumsum(later) - later  # (C,) number of the second pass; the first has the class's
        number = np.where(visit == 0, schedule, second[schedule] + visit - 1)
        within = chunk[..., None] * self.samples_per_class + np.arange(self.samples_per_class)  # (B, P, K)
        within %= counts[schedule][..., None]  # a small class begins anew
        return images[order[starts[number][..., None] + within]].reshape(len(schedule), -1)

    def _appearances(self, random: np.random.Generator) -> np.ndarray:
        """Number of batches of an epoch that hold each class, ``(C,)``."""
        if self.class_sampling == "natural":
            return self._chunks
        sizes = np.bincount(self.labels) * (self._chunks > 0)
        weights = np.sqrt(sizes) if self.class_sampling == "sqrt" else np.sign(sizes).astype(float)
        return _systematic(_capped_shares(weights, self.classes_per_batch, self._blocks), random)

    def _passes_over_classes(self, later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images of all passes of an epoch, and the number of the pass of each.

        The first pass over each class has the number of the class; all of them together are the data set. ``later``
        further passes over each class follow.
        """
        counts = np.bincount(self.labels)
        classes = np.repeat(np.arange(len(counts)), later)  # of each further pass
        sizes = counts[classes]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        by_class = np.argsort(self.labels, kind="stable")
        further = by_class[np.repeat((np.cumsum(counts) - counts)[classes], sizes) + within]
        numbers = np.repeat(len(counts) + np.arange(len(classes)), sizes)
        return np.concatenate([np.arange(len(self.labels)), further]), np.concatenate([self.labels, numbers])


def check_sampling(small_classes: str, class_sampling: str) -> None:
    """ValueError if an option of ``ClassBalancedSampler`` is unknown."""
    for name, value, options in (
        ("small_classes", small_classes, get_args(SmallClasses)),
        ("class_sampling", class_sampling, get_args(ClassSampling)),
    ):
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def _chunks(counts: np.ndarray, samples_per_class: int, small_classes: SmallClasses) -> np.ndarray:
    """Number of chunks of K images in one pass over each class, ``(C,)``; 0: the class is left out."""
    small = (counts > 0) & (counts < samples_per_class)
    if small_classes == "error" and small.any():
        smallest = int(np.where(counts > 0, counts, counts.max() + 1).argmin())
        raise ValueError(
            f"samples_per_class must not exceed the smallest class: class {smallest} has {counts[smallest]} "
            f"images, got {samples_per_class}"
        )
    return np.where(small & (small_classes == "repeat"), 1, counts // samples_per_class)


def _capped_shares(weights: np.ndarray, classes_per_batch: int, blocks: int) -> np.ndarray:
    """``classes_per_batch * blocks`` appearances in proportion to ``weights``, none above ``blocks``, ``(C,)``."""
    shares = np.zeros(len(weights))
    full = np.zeros(len(weights), dtype=bool)  # classes in every batch
    while True:
        rest = np.where(full, 0.0, weights)
        left = (classes_per_batch - full.sum()) * blocks
        shares = np.where(full, blocks, rest * (left / max(rest.sum(), 1e-300)))
        above = (shares > blocks) & ~full
        if not above.any():
            return shares
        full |= above


def _systematic(shares: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each share rounded down or up at random, with the share as mean and the same total (systematic sampling)."""
    whole = np.floor(shares).astype(np.int64)
    rest = shares - whole
    total = round(float(rest.sum()))
    ends = np.cumsum(rest)
    ends *= total / max(ends[-1], 1e-300)  # the sum of the parts is whole, up to rounding
    marks = np.minimum(np.floor(np.concatenate([[0.0], ends]) + random.random()), total)
    marks[-1] = total
    return whole + np.diff(marks).astype(np.int64)


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
    """Classes of each batch, ``(B, P)``: those with the most chunks left, ties at random; then shuffled if unequal."""
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
    batches = np.array(schedule, dtype=np.int64).reshape(-1, classes_per_batch)
    if len(np.unique(chunks[chunks > 0])) > 1:  # the classes with most chunks came first
        return random.permutation(batches)
    return batches


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
