"""Training with few labels: batches of labelled and unlabelled images together, in a fixed proportion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simo_lightning.data.datamodule import PairDataModule
from simo_lightning.data.labels import Relabelled
from simo_lightning.data.sampler import ClassBalancedSampler
from simo_lightning.data.sources import ImageSource, stratified_labelled


class SemiSupervisedPairDataModule(PairDataModule):
    """A data module whose training images keep a share of their labels; the other labels are hidden.

    It goes before another data module in a class's bases: ``class Few(SemiSupervisedPairDataModule, MyData)``. The same
    labels are hidden on every rank and in every run. A training batch holds U unlabelled images more, each a class of
    its own: the label of an image whose label is hidden is ``num_classes`` plus its index among the training images.
    The bank holds the labelled images alone. See ``SemiBalancedSampler`` for what an epoch is.

    Args:
        label_fraction: Share of each training class that keeps its label, in (0, 1], the nearest whole number of
            images, drawn by ``split_seed``; those of a smaller share are among those of a larger.
        unlabelled_per_batch: U, unlabelled images of a training batch on each rank; 0: train on the labelled images
            alone, as a head must; null: as many as labelled ones, P x K.
        **kwargs: Arguments of the other data module. ``views`` must be at least 2 where U is positive, because the
            views of an unlabelled image are its only positive pairs.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from simo_lightning.data import SemiSupervisedDigitsPairDataModule
        >>> data = SemiSupervisedDigitsPairDataModule(label_fraction=0.1, samples_per_class=4, views=2)
        >>> data.setup("fit")
        >>> images, labels = data.prepare(next(iter(data.train_dataloader())), augment=True)
        >>> images.shape, int((labels < 10).sum())
        (torch.Size([160, 1, 8, 8]), 80)
    """

    def __init__(self, *, label_fraction: float = 0.1, unlabelled_per_batch: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < label_fraction <= 1:
            raise ValueError(f"label_fraction must lie in (0, 1], got {label_fraction}")
        if unlabelled_per_batch is None:
            unlabelled_per_batch = self.classes_per_batch * self.samples_per_class
        if unlabelled_per_batch < 0:
            raise ValueError(f"unlabelled_per_batch must be at least 0, got {unlabelled_per_batch}")
        self.label_fraction = label_fraction
        self.unlabelled_per_batch = unlabelled_per_batch if label_fraction < 1 else 0
        if self.unlabelled_per_batch and self.views < 2:
            raise ValueError(
                "views must be at least 2 with unlabelled images, whose views are their only positive pairs, got "
                f"{self.views}; unlabelled_per_batch 0 trains on the labelled images alone"
            )

    def _label_training(self, train: ImageSource) -> None:
        super()._label_training(train)
        visible = self._training  # under the coarse labels, where there are any
        labelled = stratified_labelled(visible.labels, visible.class_names, self.label_fraction, self.split_seed)
        kept = labelled.nonzero().flatten()
        self._labelled = labelled
        self._bank = train.subset(kept)
        if self.unlabelled_per_batch:
            own = len(train.class_names) + torch.arange(len(train))  # no true or coarse class has these
            self._training = Relabelled(train, torch.where(labelled, visible.labels, own), visible.class_names)
        else:
            self._training = Relabelled(self._bank, visible.labels[kept], visible.class_names)

    def _train_sampler(self) -> ClassBalancedSampler:
        if not self.unlabelled_per_batch:
            return super()._train_sampler()
        batch = (self.classes_per_batch, self.samples_per_class, self.unlabelled_per_batch)
        return SemiBalancedSampler(self._training.labels, self._labelled, *batch, self.seed, self.rank, self.world_size)


class SemiBalancedSampler(ClassBalancedSampler):
    """Flat order of indices in which every block is P classes x K labelled images, then U unlabelled ones.

    A pass over the labelled images is cut into blocks as by ``ClassBalancedSampler``, a pass over the unlabelled ones,
    shuffled, into blocks of U; the last blocks of either that do not divide among the ranks are left out. An epoch is
    one pass over the part that has more blocks. Meanwhile the other part is passed over again and again, each time in
    another order, and stops where the epoch does. With few labels an epoch thus holds every unlabelled image once and
    every labelled one ``(unlabelled / U) * (P * K / labelled)`` times. No image comes twice within a pass, nor within a
    step, because a step of all ranks never spans two passes.

    The order is a function of ``(seed, epoch, world_size)`` alone: the number of ranks decides where a pass ends.

    Args:
        labels: Class index of each image, integer ``(N,)``; that of an unlabelled one is not used.
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
        self.labelled_indices = labelled.nonzero().flatten().numpy()
        self.unlabelled_indices = (~labelled).nonzero().flatten().numpy()
        if not 1 <= unlabelled_per_batch * world_size <= len(self.unlabelled_indices):
            raise ValueError(
                "unlabelled_per_batch must be at least 1, and over all ranks at most the "
                f"{len(self.unlabelled_indices)} unlabelled images, got {unlabelled_per_batch} on {world_size} ranks"
            )
        self.unlabelled_per_batch = unlabelled_per_batch
        self.batch_size += unlabelled_per_batch
        self.batches = max(self.batches, len(self.unlabelled_indices) // (unlabelled_per_batch * world_size))

    def epoch_blocks(self, epoch: int) -> np.ndarray:
        """All blocks of an epoch, over all ranks, ``(blocks, P * K + U)`` int64, the unlabelled ones last."""
        labelled = self._passes(epoch, 0, lambda random: self.labelled_indices[self._draw_blocks(random)])
        return np.concatenate([labelled, self._passes(epoch, 1, self._draw_unlabelled)], axis=1)

    def _draw_unlabelled(self, random: np.random.Generator) -> np.ndarray:
        """One pass over the unlabelled images, ``(blocks, U)``."""
        whole = len(self.unlabelled_indices) // self.unlabelled_per_batch * self.unlabelled_per_batch
        return random.permutation(self.unlabelled_indices)[:whole].reshape(-1, self.unlabelled_per_batch)

    def _passes(self, epoch: int, part: int, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        """As many passes as an epoch takes, each without the blocks that do not divide among the ranks."""
        passes: list[np.ndarray] = []
        wanted, blocks = self.batches * self.num_replicas, 0
        while blocks < wanted:
            drawn = draw(np.random.default_rng([self.seed, epoch, len(passes), part]))
            passes.append(drawn[: len(drawn) // self.num_replicas * self.num_replicas])
            blocks += len(passes[-1])
        return np.concatenate(passes)[:wanted]
