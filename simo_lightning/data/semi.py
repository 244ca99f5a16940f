"""Batches of labelled and unlabelled images together, in a fixed proportion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from simo_lightning.data.sampler import ClassBalancedSampler


class SemiBalancedSampler(ClassBalancedSampler):
    """Flat order of indices in which every block is P classes x K labelled images, then U unlabelled ones.

    A visit of the labelled images is cut into blocks as by ``ClassBalancedSampler``, a visit of the unlabelled ones,
    shuffled, into blocks of U; of either the blocks that do not go round the ranks rest. An epoch is one visit of the
    part that has more blocks; the other part is visited again and again meanwhile, each time in another order, and
    stops where the epoch does. With few labels an epoch so shows every unlabelled image once and every labelled one
    ``(unlabelled / U) * (P * K / labelled)`` times. No image comes twice within a visit, and as a step of all ranks
    never spans two visits, none twice within a step.

    What is drawn is a function of ``(seed, epoch, world_size)`` alone: as only whole rounds of the ranks count, the
    number of ranks moves where a visit ends.

    Args:
        labels: Class index of each image, integer ``(N,)``; that of an unlabelled one is not looked at.
        labelled: Which have one, bool ``(N,)``.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 2.
        unlabelled_per_batch: U, at least 1.
        seed: Non-negative.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.

    Raises:
        ValueError: As ``ClassBalancedSampler``; or if ``labelled`` is not bool ``(N,)``, or there are fewer unlabelled
            images than all ranks take in one step.

    Example:
        >>> labelled = torch.tensor([True, True, True, True, False, False])
        >>> sampler = SemiBalancedSampler(torch.tensor([0, 0, 1, 1, 6, 7]), labelled, 2, 2, unlabelled_per_batch=1)
        >>> [sorted(sampler.epoch_blocks(0)[block].tolist())[:4] for block in range(2)]
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(
        self,
        labels: Tensor,
        labelled: Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        unlabelled_per_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if labelled.dtype != torch.bool or labelled.shape != labels.shape:
            raise ValueError(
                f"labelled must be bool {tuple(labels.shape)} to match labels, "
                f"got {labelled.dtype} {tuple(labelled.shape)}"
            )
        super().__init__(labels[labelled], classes_per_batch, samples_per_class, seed, rank, world_size)
        self.labelled_rows = labelled.nonzero().flatten().numpy()
        self.unlabelled_rows = (~labelled).nonzero().flatten().numpy()
        if not 1 <= unlabelled_per_batch * world_size <= len(self.unlabelled_rows):
            raise ValueError(
                f"unlabelled_per_batch must be at least 1, and over all ranks at most the {len(self.unlabelled_rows)} "
                f"unlabelled images, got {unlabelled_per_batch} on {world_size} ranks"
            )
        self.unlabelled_per_batch = unlabelled_per_batch
        self.batch_size += unlabelled_per_batch
        self.batches = max(self.batches, len(self.unlabelled_rows) // (unlabelled_per_batch * world_size))

    def epoch_blocks(self, epoch: int) -> np.ndarray:
        """All blocks of an epoch, over all ranks, ``(blocks, P * K + U)`` int64, the unlabelled ones last."""
        labelled = self._visits(epoch, 0, lambda random: self.labelled_rows[self._draw_blocks(random)])
        return np.concatenate([labelled, self._visits(epoch, 1, self._draw_unlabelled)], axis=1)

    def _draw_unlabelled(self, random: np.random.Generator) -> np.ndarray:
        """One visit of the unlabelled images, ``(blocks, U)``."""
        whole = len(self.unlabelled_rows) // self.unlabelled_per_batch * self.unlabelled_per_batch
        return random.permutation(self.unlabelled_rows)[:whole].reshape(-1, self.unlabelled_per_batch)

    def _visits(self, epoch: int, part: int, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        """As many visits as an epoch takes, each without the blocks that do not go round the ranks."""
        visits: list[np.ndarray] = []
        wanted, blocks = self.batches * self.num_replicas, 0
        while blocks < wanted:
            visit = draw(np.random.default_rng([self.seed, epoch, len(visits), part]))
            visits.append(visit[: len(visit) // self.num_replicas * self.num_replicas])
            blocks += len(visits[-1])
        return np.concatenate(visits)[:wanted]


def balanced_sampler(
    labels: Tensor,
    labelled: Tensor,
    classes_per_batch: int,
    samples_per_class: int,
    unlabelled_per_batch: int,
    seed: int,
    rank: int,
    world_size: int,
) -> ClassBalancedSampler:
    """The sampler of a training split: ``SemiBalancedSampler`` where it holds an unlabelled image.

    Args:
        labels: As of ``SemiBalancedSampler``.
        labelled: The same.
        classes_per_batch: P.
        samples_per_class: K.
        unlabelled_per_batch: U, 0 where all images are labelled.
        seed: Non-negative.
        rank: This process.
        world_size: Number of processes.

    Returns:
        The sampler.
    """
    own = (classes_per_batch, samples_per_class)
    if bool(labelled.all()) and unlabelled_per_batch == 0:
        return ClassBalancedSampler(labels, *own, seed, rank, world_size)
    return SemiBalancedSampler(labels, labelled, *own, unlabelled_per_batch, seed, rank, world_size)
