"""Labelled images: the interface of a source, images in memory, joined sources, splits and channel statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from simo_lightning.preprocessing import PictureSize

Source = TypeVar("Source", bound="ImageSource")
Files = TypeVar("Files", bound="PictureFiles")
Split = Literal["train", "val", "test", "query", "gallery", "unknown"]


class ImageSource(Protocol):
    """Interface of a set of labelled images, in memory or on disk.

    ``labels`` is int64 ``(N,)``, an index into ``class_names``. ``__getitems__(indices)`` returns a whole batch, uint8
    ``(B, C, H, W)`` in 0..255 and its labels ``(B,)``, and ``subset(indices)`` returns a source of only those images.

    A source of files may also have ``picture(index, size)``, which returns one whole picture before it is resized; see
    :func:`whole_picture`.
    """

    @property
    def labels(self) -> Tensor: ...  # noqa: D102

    @property
    def class_names(self) -> list[str]: ...  # noqa: D102

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...
    def subset(self: Source, indices: Tensor) -> Source: ...  # noqa: D102


def name_list(names: Iterable[str], most: int = 5) -> str:
    """Quoted names, sorted, for one line of text; of more than ``most`` the first and the number of the others.

    Example:
        >>> name_list(["dog", "ant", "cat"], most=2)
        "'ant', 'cat' and 1 more"
    """
    ordered = sorted(names)
    others = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + others


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size and their classes, held in memory.

    Args:
        images: uint8 ``(N, C, H, W)`` in 0..255; made contiguous.
        labels: Class index of each image, int64 ``(N,)`` in ``0..len(class_names) - 1``.
        class_names: One name per class.

    Raises:
        ValueError: If a shape, a dtype or the range of the labels differs.

    Example:
        >>> data = LabelledImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]), ["cat", "dog"])
        >>> len(data), data.subset(torch.tensor([2])).labels
        (3, tensor([1]))
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(images)},) to match images, got {labels.dtype} {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise ValueError(
                f"labels must lie in 0..{len(self.class_names) - 1}, an index into class_names, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        object.__setattr__(self, "images", images.contiguous())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return self.images.index_select(0, index), self.labels[index]  # a fifth of the time of images[index]

    def subset(self, indices: Tensor) -> LabelledImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order, copied."""
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names)


class PictureFiles(Protocol):
    """Image files that can be read one by one, such as ``FolderImages``."""

    def picture(self, index: int, size: PictureSize = None) -> Image.Image: ...  # noqa: D102
    def subset(self: Files, indices: Tensor) -> Files: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class DecodedFiles(LabelledImages):
    """Images in memory at the size of the model, and the files that they come from.

    Evaluation and batched augmentation use the images in memory. An augmentation of one picture at a time reads its
    file again, because it crops the whole picture.

    Args:
        images: uint8 ``(N, C, H, W)`` in 0..255.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        files: The files of the same images in the same order.
    """

    files: PictureFiles

    def picture(self, index: int, size: PictureSize = None) -> Image.Image:
        """One whole picture, read from its file; see ``FolderImages.picture``."""
        return self.files.picture(index, size)

    def subset(self, indices: Tensor) -> DecodedFiles:
        """The images at ``indices`` (int64 ``(M,)``), in that order, copied."""
        images, labels = self.images[indices], self.labels[indices]
        return replace(self, images=images, labels=labels, files=self.files.subset(indices))


def in_memory(source: ImageSource) -> bool:
    """Whether the images of a source, or of the sources that it joins or relabels, are held in memory."""
    below = [*getattr(source, "sources", []), *([source.source] if hasattr(source, "source") else [])]
    return all(in_memory(each) for each in below) if below else isinstance(source, LabelledImages)


def whole_picture(source: ImageSource, index: int, size: PictureSize = None) -> Image.Image:
    """One picture of a source before it is resized, or its image where the source has only images of one size.

    Args:
        source: Any source; the method ``picture(index, size)`` is used if it has one.
        index: Position of the image, ``0..len(source) - 1``.
        size: Smallest width and height that are needed of the picture, or a function of its width and height, called
            once, that returns them; a source may then decode it at a smaller size. None: the whole picture.

    Returns:
        The picture, upright, in mode RGB, or in mode L for an image of one channel.

    Example:
        >>> data = LabelledImages(torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.tensor([0]), ["cat"])
        >>> picture = whole_picture(data, 0)
        >>> picture.mode, picture.size
        ('L', (8, 4))
    """
    read = getattr(source, "picture", None)
    picture: Image.Image = F.to_pil_image(source.__getitems__([index])[0][0]) if read is None else read(index, size)
    if read is None and callable(size):
        size(*picture.size)
    return picture


@dataclass(frozen=True, eq=False)
class JoinedImages:
    """The images of several sources, one source after the other, or a choice of them; images are not copied.

    Args:
        sources: At least one, with images of one shape and labels that index ``class_names``.
        class_names: One name per class.
        index: The images chosen, as indices of all images of the sources, int64 ``(N,)``; None: all.

    Attributes:
        labels: Class index of each image, int64 ``(N,)``.

    Raises:
        ValueError: If there is no source.

    Example:
        >>> first = LabelledImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["cat", "dog"])
        >>> joined = JoinedImages([first, first.subset(torch.tensor([1]))], ["cat", "dog"])
        >>> joined.labels, joined.__getitems__([2, 0])[1]
        (tensor([0, 1, 1]), tensor([1, 0]))
    """

    sources: Sequence[ImageSource]
    class_names: list[str]
    index: Tensor | None = None
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must hold at least one source of images, got none")
        labels = torch.cat([source.labels for source in self.sources])
        object.__setattr__(self, "labels", labels if self.index is None else labels[self.index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        place = chosen if self.index is None else self.index[chosen]
        ends = torch.tensor([len(source) for source in self.sources]).cumsum(0)
        owner = torch.bucketize(place, ends, right=True)
        images = torch.empty(0, dtype=torch.uint8)
        for number in owner.unique().tolist():
            mine = (owner == number).nonzero().flatten()
            source = self.sources[number]
            part = source.__getitems__((place[mine] - ends[number] + len(source)).tolist())[0]
            if not len(images):
                images = part.new_empty(len(chosen), *part.shape[1:])
            images[mine] = part
        return images, self.labels[chosen]

    def picture(self, index: int, size: PictureSize = None) -> Image.Image:
        """One whole picture; see :func:`whole_picture`."""
        return whole_picture(*self.locate(index), size)

    def locate(self, index: int) -> tuple[ImageSource, int]:
        """The source that holds an image, and the image's position there."""
        place = index if self.index is None else int(self.index[index])
        for source in self.sources:
            if place < len(source):
                break
            place -= len(source)
        return source, place

    def subset(self, indices: Tensor) -> JoinedImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return JoinedImages(self.sources, self.class_names, indices if self.index is None else self.index[indices])


def join_images(sources: Sequence[ImageSource], class_names: list[str]) -> ImageSource:
    """The images of several sources with the same class indices: in memory if all of them are, else where they are."""
    if len(sources) == 1:
        return sources[0]
    memory = [source for source in sources if type(source) is LabelledImages]  # DecodedFiles would lose their files
    if len(memory) == len(sources) and len({source.images.shape[1:] for source in memory}) == 1:
        images = torch.cat([source.images for source in memory])
        return LabelledImages(images, torch.cat([source.labels for source in memory]), class_names)
    return JoinedImages(sources, class_names)


# The three functions below do not use scikit-learn's train_test_split(stratify=...): it raises if a class has one image
# or a part has fewer images than there are classes (a bank of 5,000 images of 10,000 classes).


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out the same fraction of every class.

    Args:
        labels: Class index of each image, int64 ``(N,)``.
        fraction: Share to hold out, in ``[0, 1)``, rounded to whole images per class; if positive, at least one image
            of every class that has two or more.
        seed: Non-negative; the split depends only on ``labels``, ``fraction`` and ``seed``.

    Returns:
        Indices that stay and indices held out, both ascending.

    Raises:
        ValueError: If ``fraction`` lies outside ``[0, 1)``.

    Example:
        >>> stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)[1]
        tensor([0, 4])
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to hold out must lie in [0, 1), got {fraction}")
    counts = torch.bincount(labels)
    held = (counts * fraction).round().long()
    if fraction > 0:
        held = held.clamp(min=1).minimum((counts - 1).clamp(min=0))
    chosen = _first_of_each_class(labels, held, seed)
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def stratified_subset(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Indices (ascending) of ``limit`` images with the classes in proportion; all if there are at most ``limit``.

    Example:
        >>> len(stratified_subset(torch.tensor([0] * 90 + [1] * 10), 20, seed=0))
        20
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    if limit >= len(labels):
        return torch.arange(len(labels))
    exact = torch.bincount(labels).double() * limit / len(labels)
    take = exact.floor().long()
    largest_remainders = (exact - take).argsort(descending=True, stable=True)[: limit - int(take.sum())]
    take[largest_remainders] += 1
    return _first_of_each_class(labels, take, seed).nonzero().flatten()


def stratified_labelled(labels: Tensor, class_names: Sequence[str], fraction: float, seed: int) -> Tensor:
    """Draw the images of each class that keep their label.

    Args:
        labels: Class index of each image, int64 ``(N,)``.
        class_names: C names.
        fraction: Share of labelled images, in ``(0, 1]``, rounded to whole images per class.
        seed: Non-negative; with the same seed a smaller share is a subset of a larger one.

    Returns:
        True for labelled images, bool ``(N,)``.

    Raises:
        ValueError: If ``fraction`` is out of range or leaves a class without a label.

    Example:
        >>> stratified_labelled(torch.tensor([0, 0, 1, 1]), ["cat", "dog"], 0.5, seed=0)
        tensor([ True, False, False,  True])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction must lie in (0, 1], got {fraction}")
    counts = torch.bincount(labels, minlength=len(class_names))
    keep = (counts * fraction).round().long()
    without = ((counts > 0) & (keep == 0)).nonzero().flatten().tolist()
    if without:
        raise ValueError(
            f"label_fraction must leave every class at least one labelled image, got {fraction} for "
            f"{name_list(f'{class_names[label]} ({counts[label]} images)' for label in without)}"
        )
    return _first_of_each_class(labels, keep, seed)


def _first_of_each_class(labels: Tensor, take: Tensor, seed: int) -> Tensor:
    """Mask ``(N,)`` of the first ``take[c]`` images of each class ``c`` in an order drawn from ``seed``."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled inside each
    counts = torch.bincount(labels, minlength=len(take))
    position = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # within its class
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[position < take[labels[order]]]] = True
    return mask


def channel_statistics(source: ImageSource, seed: int, sample: int = 2000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in 0..1, over all images in memory or a sample of those on disk.

    The standard deviation of a constant channel is returned as 1.
    """
    if isinstance(source, LabelledImages):
        images = source.images
    else:
        chosen = stratified_subset(source.labels, min(sample, len(source)), seed)
        images = source.__getitems__(chosen.tolist())[0]
    histogram = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = histogram / histogram.sum(1, keepdim=True)  # (C, 256)
    mean = share @ levels
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()
