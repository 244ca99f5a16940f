"""Labelled images: what a source of data looks like, in memory, and the two that need no folder of one's own."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.error import URLError

import torch
from torch import Tensor

Source = TypeVar("Source", bound="ImageSource")


class ImageSource(Protocol):
    """What the data modules ask of a set of labelled images, in memory or on disk.

    ``labels`` is int64 ``(N,)``, an index into ``class_names``. ``__getitems__(indices)`` gives a whole batch, uint8
    ``(B, C, H, W)`` in 0..255 and its labels ``(B,)``, and ``subset(indices)`` a source with those rows alone.
    """

    @property
    def labels(self) -> Tensor: ...  # noqa: D102

    @property
    def class_names(self) -> list[str]: ...  # noqa: D102

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...
    def subset(self: Source, indices: Tensor) -> Source: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size and their classes, held in memory.

    Args:
        images: uint8 ``(N, C, H, W)`` in 0..255; made contiguous.
        labels: Class index of each image, int64 ``(N,)`` in ``0..len(class_names) - 1``.
        class_names: One name per class.

    Raises:
        ValueError: If shapes, dtypes or the range of the labels are other than that.

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
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.images.index_select(0, rows), self.labels[rows]  # a fifth of the time of images[rows]

    def subset(self, indices: Tensor) -> LabelledImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order, copied."""
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out the same fraction of every class.

    Args:
        labels: Class index of each image, int64 ``(N,)``.
        fraction: Share to hold out, in ``[0, 1)``; of each class the nearest whole number of images, and where it is
            positive at least one of any class that has two.
        seed: Non-negative; the split is a function of ``labels``, ``fraction`` and ``seed`` alone.

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
    """Indices (ascending) of ``limit`` images with the classes in proportion; all if there are no more.

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
    """Which images keep their label where a share of each class does.

    Args:
        labels: Class index of each image, int64 ``(N,)``.
        class_names: C names.
        fraction: Share that keeps it, in ``(0, 1]``; of each class the nearest whole number of images.
        seed: Non-negative; those of a smaller share are among those of a larger one of the same seed.

    Returns:
        Mask ``(N,)``.

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
    bare = ((counts > 0) & (keep == 0)).nonzero().flatten().tolist()
    if bare:
        raise ValueError(
            f"label_fraction must leave every class at least one labelled image, got {fraction} for "
            f"{', '.join(f'{class_names[label]!r} with {counts[label]} images' for label in bare)}"
        )
    return _first_of_each_class(labels, keep, seed)


def _first_of_each_class(labels: Tensor, take: Tensor, seed: int) -> Tensor:
    """Mask ``(N,)`` of the first ``take[c]`` images of each class ``c`` in an order drawn from ``seed``."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled inside each
    counts = torch.bincount(labels, minlength=len(take))
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]  # place in its class
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[place < take[labels[order]]]] = True
    return mask


def check_same_classes(split: str, source: ImageSource | None, class_names: list[str]) -> None:
    """Raise ValueError, with the classes that differ, if a split has other classes than the training split."""
    if source is None or list(source.class_names) == class_names:
        return
    missing = sorted(set(class_names) - set(source.class_names))
    extra = sorted(set(source.class_names) - set(class_names))
    raise ValueError(
        f"the {split} split must have the classes of the training split, in their order: "
        f"it lacks {missing}, and training lacks {extra}"
    )


def channel_statistics(source: ImageSource, seed: int, sample: int = 2000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in 0..1, over all images in memory or a sample of those on disk.

    A channel without variation is given the deviation 1.
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
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()  # a constant channel stays 0


def load_digits(train: bool) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and one channel, grey levels 0..16 scaled to 0..255.

    The set has no test split: one fifth of each class (fixed, stratified) is its test split here.

    Args:
        train: The training split (1,438 images) or the test split (359).

    Returns:
        The images.

    Source:
        ``sklearn.datasets.load_digits``, the test set of Alpaydin & Kaynak's optical recognition of handwritten digits.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]  # (1797, 1, 8, 8)
    labels = torch.from_numpy(digits.target).long()
    kept, held = stratified_split(labels, 0.2, seed=0)
    return LabelledImages(images, labels, [str(name) for name in digits.target_names]).subset(kept if train else held)


def load_cifar(data_dir: str | Path, name: Literal["cifar10", "cifar100"], train: bool, download: bool) -> ImageSource:
    """CIFAR-10 or CIFAR-100 from torchvision's files or from folders of JPEG or PNG images.

    Args:
        data_dir: Holds either ``train/<class>/*`` and ``test/<class>/*``, or torchvision's archive or what it unpacks
            to; or nothing yet.
        name: Which of the two.
        train: The 50,000 training images or the 10,000 of the test.
        download: Fetch torchvision's archive where no files are found.

    Returns:
        uint8 images ``(N, 3, 32, 32)``.

    Raises:
        FileNotFoundError: If the files are not there, or damaged, and cannot be fetched: says what to put where.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    from simo_lightning.data.folder import load_image_folder

    root = Path(data_dir)
    if (root / "train").is_dir() and (root / "test").is_dir():
        return load_image_folder(root / ("train" if train else "test"), image_size=32)
    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    archive = root / dataset_class.filename
    archive_is_whole = check_integrity(str(archive), dataset_class.tgz_md5)
    try:  # torchvision's download unpacks an archive that is there, and fetches none then
        dataset = dataset_class(str(root), train=train, download=download or archive_is_whole)
    except (URLError, OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        state = "is not there"
        if archive.is_file() and not archive_is_whole:
            state = f"is damaged or half downloaded ({archive.name} has another checksum than the original)"
        elif (root / dataset_class.base_folder).is_dir():
            state = f"is incomplete or damaged ({dataset_class.base_folder} lacks files or has wrong checksums)"
        tried = "the download failed" if download else "download is False"
        raise FileNotFoundError(
            f"{name} {state} in data_dir {str(root.absolute())!r} and {tried}: {error}. Put {dataset_class.filename} "
            f"({dataset_class.url}) into that folder, or class folders of images, train/<class>/* and test/<class>/*"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) to (N, 3, 32, 32)
    return LabelledImages(images, torch.tensor(dataset.targets), list(dataset.classes))
