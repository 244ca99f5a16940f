"""What a training image is called: hidden labels, coarse labels, and what is left for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simo_lightning.data.sources import ImageSource, stratified_labelled

Coarse = dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The images of a source under other labels, without a copy of them.

    Args:
        source: Gives the images.
        labels: Label of each image, int64 ``(N,)``; one that is no index into ``class_names`` belongs to an image whose
            class is hidden.
        class_names: One name per class.

    Raises:
        ValueError: If ``labels`` is not int64 ``(N,)`` and non-negative.

    Example:
        >>> from simo_lightning.data import LabelledImages
        >>> data = LabelledImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["cat", "dog"])
        >>> Relabelled(data, torch.tensor([0, 0]), ["animal"]).__getitems__([1])[1]
        tensor([0])
    """

    source: ImageSource
    labels: Tensor
    class_names: list[str]

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.source),):
            raise ValueError(
                f"labels must be int64 ({len(self.source)},) to match the images, "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if len(self.labels) and int(self.labels.min()) < 0:
            raise ValueError(f"labels must be non-negative, got {int(self.labels.min())}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.source.__getitems__(indices)[0], self.labels[rows]

    def subset(self, indices: Tensor) -> Relabelled:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return Relabelled(self.source.subset(indices), self.labels[indices], self.class_names)


class TrainingLabels(NamedTuple):
    """The training split as training sees it, and the part of it that evaluation may compare with.

    Attributes:
        train: Label of an image: its class among ``train.class_names``, or one of its own where that is hidden.
        bank: The labelled images under their true classes.
        labelled: Which images of ``train`` have a class, bool ``(N,)``.
    """

    train: ImageSource
    bank: ImageSource
    labelled: Tensor


def training_labels(
    source: ImageSource, label_fraction: float, coarse: Coarse | None, seed: int, hidden_too: bool = True
) -> TrainingLabels:
    """Give the training images the labels that training may know.

    A hidden image gets the label ``C + i``, with C the number of true classes and i its place in ``source``: its own on
    every rank and in every run, and outside of ``0..C - 1``.

    Args:
        source: Training images under their true classes.
        label_fraction: Share of each class that keeps its label, in (0, 1]: the nearest whole number of images. Those
            of a smaller share are among those of a larger.
        coarse: Names of the true classes that each coarse class joins, or None.
        seed: Non-negative; which labels are kept is a function of the labels, the share and the seed alone.
        hidden_too: Whether training sees the images whose label is hidden.

    Returns:
        The parts; ``train`` and ``bank`` are ``source`` itself where nothing is hidden or joined.

    Raises:
        ValueError: If a class would keep no label, or ``coarse`` is not a partition of the classes.

    Example:
        >>> from simo_lightning.data import LabelledImages
        >>> images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
        >>> data = LabelledImages(images, torch.tensor([0, 0, 1, 1]), ["cat", "dog"])
        >>> training_labels(data, 0.5, None, seed=0).train.labels
        tensor([0, 3, 4, 1])
    """
    index, names = torch.arange(len(source.class_names)), list(source.class_names)
    if coarse is not None:
        index, names = coarse_index(source.class_names, coarse), list(coarse)
    labels, labelled = index[source.labels], torch.ones(len(source), dtype=torch.bool)
    bank = source
    if label_fraction < 1:
        labelled = stratified_labelled(labels, names, label_fraction, seed)
        bank = source.subset(labelled.nonzero().flatten())
        if not hidden_too:
            source, labels, labelled = bank, labels[labelled], labelled[labelled]
        labels = torch.where(labelled, labels, len(source.class_names) + torch.arange(len(source)))
    unchanged = coarse is None and bool(labelled.all())
    return TrainingLabels(source if unchanged else Relabelled(source, labels, names), bank, labelled)


def coarse_index(class_names: Sequence[str], coarse: Mapping[str, Sequence[str]]) -> Tensor:
    """Coarse class of each class.

    Args:
        class_names: C names.
        coarse: Names of the classes that each coarse class joins; every class in exactly one, at least two of them.

    Returns:
        Index into ``list(coarse)``, int64 ``(C,)``.

    Raises:
        ValueError: Naming the classes that are unknown, missing or in two places, or an empty coarse class.

    Example:
        >>> coarse_index(["cat", "ship", "dog"], {"animal": ["cat", "dog"], "vehicle": ["ship"]})
        tensor([0, 1, 0])
    """
    given = [name for names in coarse.values() for name in names]
    wrong = {
        "unknown": sorted(set(given) - set(class_names)),
        "missing": sorted(set(class_names) - set(given)),
        "more than once": sorted({name for name in given if given.count(name) > 1}),
        "without a class": sorted(name for name, members in coarse.items() if not members),
    }
    said = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if said:
        raise ValueError(
            f"coarse must hold every class of {', '.join(class_names)} exactly once, got {'; '.join(said)}"
        )
    if len(coarse) < 2:
        raise ValueError(f"coarse must have at least 2 coarse classes, got {len(coarse)}")
    place = {name: number for number, names in enumerate(coarse.values()) for name in names}
    return torch.tensor([place[name] for name in class_names])


def check_smallest_class(train: ImageSource, samples_per_class: int) -> None:
    """Raise ValueError, with the class's name, if a class has too few labelled training images for a batch."""
    known = train.labels[train.labels < len(train.class_names)]
    counts = torch.bincount(known, minlength=len(train.class_names))
    smallest = int(counts.argmin())
    if counts[smallest] < samples_per_class:
        kind = "images" if len(known) == len(train.labels) else "labelled images"
        raise ValueError(
            f"samples_per_class must not exceed the smallest class of the training split: "
            f"{train.class_names[smallest]!r} has {counts[smallest]} {kind}, got {samples_per_class}"
        )
