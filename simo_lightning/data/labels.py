"""Replaced labels: classes matched by name, coarse classes and hidden labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simo_lightning.data.sources import ImageSource, LabelledImages, name_list


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The images of a source with other labels; images are not copied.

    Args:
        source: Source of the images.
        labels: Label of each image, int64 ``(N,)``, non-negative; a hidden label is at least ``len(class_names)``.
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
        return self.source.__getitems__(indices)[0], self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def subset(self, indices: Tensor) -> Relabelled:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return Relabelled(self.source.subset(indices), self.labels[indices], self.class_names)


def index_by_name(source: ImageSource, class_names: Sequence[str]) -> ImageSource:
    """The same images with labels that index ``class_names``: each class is found there by its name.

    Args:
        source: Images, not copied.
        class_names: Holds the name of every class that has an image in ``source``.

    Returns:
        ``source`` itself if its labels are already those.

    Raises:
        ValueError: If a class of ``source`` has images but is not in ``class_names``.

    Example:
        >>> data = LabelledImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["cat", "dog"])
        >>> index_by_name(data, ["ant", "dog", "cat"]).labels
        tensor([2, 1])
    """
    own, names = list(source.class_names), list(class_names)
    if own == names[: len(own)]:
        return source
    place = {name: number for number, name in enumerate(names)}
    missing = [name for name in present_classes(source) if name not in place]
    if missing:
        raise ValueError(f"class_names must hold every class of the images, but lacks {name_list(missing)}")
    labels = torch.tensor([place.get(name, -1) for name in own], dtype=torch.int64)[source.labels]
    if isinstance(source, LabelledImages):
        return replace(source, labels=labels, class_names=names)
    return Relabelled(source, labels, names)


def present_classes(source: ImageSource) -> list[str]:
    """Names of the classes that have an image in ``source``, in the order of its ``class_names``."""
    counts = torch.bincount(source.labels, minlength=len(source.class_names)).tolist()
    return [name for name, count in zip(source.class_names, counts, strict=True) if count]


def without_classes(coarse: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """``coarse`` without the classes ``names``, and without the coarse classes that are then empty."""
    gone = set(names)
    left = {name: [member for member in members if member not in gone] for name, members in coarse.items()}
    return {name: members for name, members in left.items() if members or not coarse[name]}


def coarse_index(class_names: Sequence[str], coarse: Mapping[str, Sequence[str]]) -> Tensor:
    """Coarse class of each class.

    Args:
        class_names: C names.
        coarse: Names of the classes in each coarse class; every class in exactly one of at least two coarse classes.

    Returns:
        Index into ``list(coarse)``, int64 ``(C,)``.

    Raises:
        ValueError: If classes are unknown, missing or repeated, a coarse class is empty, or there are fewer than two.

    Example:
        >>> coarse_index(["cat", "ship", "dog"], {"animal": ["cat", "dog"], "vehicle": ["ship"]})
        tensor([0, 1, 0])
    """
    given = [name for names in coarse.values() for name in names]
    wrong = {
        "unknown": set(given) - set(class_names),
        "missing": set(class_names) - set(given),
        "repeated": {name for name, count in Counter(given).items() if count > 1},
        "empty": {name for name, members in coarse.items() if not members},
    }
    found = [f"{problem}: {name_list(names)}" for problem, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"coarse must hold every class ({name_list(class_names)}) exactly once, got {'; '.join(found)}"
        )
    if len(coarse) < 2:
        raise ValueError(f"coarse must have at least 2 coarse classes, got {len(coarse)}")
    index = {name: number for number, names in enumerate(coarse.values()) for name in names}
    return torch.tensor([index[name] for name in class_names])
