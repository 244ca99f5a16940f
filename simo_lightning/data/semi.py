"""Semi-supervised training: batches of labelled and unlabelled images in a fixed proportion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simo_lightning.data.datamodule import PairDataModule
from simo_lightning.data.labels import Relabelled
from simo_lightning.data.sampler import ClassBalancedSampler, ClassSampling, SmallClasses
from simo_lightning.data.sources import ImageSource, stratified_labelled


class SemiSupervisedPairDataModule(PairDataModule):
    """Mixin for a data module: a share of the training images keeps its labels, the other labels are hidden.

    It precedes the data module in the bases: ``class Few(SemiSupervisedPairDataModule, MyData)``. The same labels are
    hidden on every rank and in every run with the same ``split_seed``. A training batch has U additional unlabelled
    images, each in a class of its own: a hidden label is replaced by ``num_classes`` plus the index of the image among
    the training images. The bank holds only labelled images. ``SemiBalancedSampler`` defines an epoch.

    Args:
        label_fraction: Share of each training class that keeps its label, in (0, 1], rounded to whole images and drawn
            by ``split_seed``; a smaller share is a subset of a larger one.
        unlabelled_per_batch: U, number of unlabelled images in a training batch of each rank; 0: train only on the
            labelled images, as a classifier must; null: P x K. Not used if ``label_fraction`` is 1.
        **kwargs: Arguments of the other data module. ``views`` must be at least 2 if U is positive, because the views
            of an unlabelled image are its only positive pairs.

    Raises:
        ValueError: If an argument is out of range.

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
        if unlabelled_per_batch is not None and unlabelled_per_batch < 0:
            raise ValueError(f"unlabelled_per_batch must be at least 0, got {unlabelled_per_batch}")
        self.label_fraction = label_fraction
        self.unlabelled_per_batch = unlabelled_per_batch if label_fraction < 1 else 0
        if self.unlabelled_per_batch != 0 and self.views < 2:
            raise ValueError(
                "views must be at least 2 with unlabelled images, whose views are their only positive pairs, got "
                f"{self.views}; unlabelled_per_batch 0 trains only on the labelled images"
            )

    def _label_training(self, train: ImageSource) -> None:
        super()._label_training(train)
        visible = self._training  # with coarse labels, if given
        labelled = stratified_labelled(visible.labels, visible.class_names, self.label_fraction, self.split_seed)
        kept = labelled.nonzero().flatten()
        self._labelled = labelled
        self._bank = train.subset(kept)
        if self.unlabelled_per_batch != 0:
            own = max(self.num_classes, len(train.class_names)) + torch.arange(len(train))  # above every class
            self._training = Relabelled(train, torch.where(labelled, visible.labels, own), visible.class_names)
        else:
            self._training = Relabelled(self._bank, visible.labels[kept], visible.class_names)

    def _number_classes(self, train: ImageSource) -> ImageSource:
        train = super()._number_classes(train)
        if self.unlabelled_per_batch is None:
            assert self.classes_per_batch is not None
            self.unlabelled_per_batch = self.classes_per_batch * self.samples_per_class
        return train

    def _train_sampler(self) -> ClassBalancedSampler:
        if not self.unlabelled_per_batch:
            return super()._train_sampler()
        images = (self._training.labels, self._labelled)
        return SemiBalancedSampler(*images, unlabelled_per_batch=self.unlabelled_per_batch, **self._sampling())


class SemiBalancedSampler(ClassBalancedSampler):
    """Indices in batches of P classes x K labelled images, followed by U unlabelled ones.

    A pass over the labelled images is split into batches as by ``ClassBalancedSampler``, a shuffled pass over the
    unlabelled ones into batches of U; of each, the last ``batches % world_size`` are dropped. An epoch is one pass over
    the part with more batches. The other part is repeated, in a new order for each pass, until the epoch ends. With few
    labels an epoch uses every unlabelled image once and every labelled one
    ``(unlabelled / U) * (P * K / labelled)`` times. Where ``class_sampling`` is "natural" and no class is smaller than
    K, no image is repeated within a pass, nor within a step of all ranks, because a step never spans two passes.

    The order depends only on ``(seed, epoch, world_size)``: a pass ends at a multiple of the number of ranks.

    Args:
        labels: Class index of each image, integer ``(N,)``; not used for unlabelled images.
        labelled: True for labelled images, bool ``(N,)``.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 2.
        unlabelled_per_batch: U, at least 1.
        seed: Non-negative.
        rank: This process, ``0..world_size - 1``.
        world_size: Number of processes.
        small_classes: As for ``ClassBalancedSampler``.
        class_sampling: As for ``ClassBalancedSampler``; it defines a pass over the labelled images.

    Raises:
        ValueError: As ``ClassBalancedSampler``; or if ``labelled`` is not bool ``(N,)``, or there are fewer unlabelled
            images than one step of all ranks requires.

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
        small_classes: SmallClasses = "error",
        class_sampling: ClassSampling = "natural",
    ) -> None:
        if labelled.dtype != torch.bool or labelled.shape != labels.shape:
            raise ValueError(
                f"labelled must be bool {tuple(labels.shape)} to match labels, "
                f"got {labelled.dtype} {tuple(labelled.shape)}"
            )
        sampling = (seed, rank, world_size, small_classes, class_sampling)
        super().__init__(labels[labelled], classes_per_batch, samples_per_class, *sampling)
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
        """All batches of an epoch over all ranks, ``(batches, P * K + U)`` int64, unlabelled images last."""
        labelled = self._passes(epoch, 0, lambda random: self.labelled_indices[self._draw_blocks(random)])
        return np.concatenate([labelled, self._passes(epoch, 1, self._draw_unlabelled)], axis=1)

    def _draw_unlabelled(self, random: np.random.Generator) -> np.ndarray:
        """One pass over the unlabelled images, ``(batches, U)``."""
        whole = len(self.unlabelled_indices) // self.unlabelled_per_batch * self.unlabelled_per_batch
        return random.permutation(self.unlabelled_indices)[:whole].reshape(-1, self.unlabelled_per_batch)

    def _passes(self, epoch: int, part: int, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        """Passes until the epoch is full, ``(batches, ...)``, each cut to a multiple of the number of ranks."""
        passes: list[np.ndarray] = []
        total, blocks = self.batches * self.num_replicas, 0
        while blocks < total:
            drawn = draw(np.random.default_rng([self.seed, epoch, len(passes), part]))
            passes.append(drawn[: len(drawn) // self.num_replicas * self.num_replicas])
            blocks += len(passes[-1])
        return np.concatenate(passes)[:total]
