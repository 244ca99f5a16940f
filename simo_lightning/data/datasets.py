"""Data modules by name: CIFAR, digits, any folder of class folders, tensors."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch

from simo_lightning.data.augment import BatchAugment
from simo_lightning.data.datamodule import PairDataModule
from simo_lightning.data.folder import SPLIT_NAMES, Listing, coarse_folders, find_splits
from simo_lightning.data.manifest import Manifest, coarse_classes, list_split, read_coarse, read_manifest
from simo_lightning.data.packed import PackedFolder, is_packed, open_packed
from simo_lightning.data.pictures import Augment
from simo_lightning.data.reading import OnBroken, load_image_folder, read_images
from simo_lightning.data.semi import SemiSupervisedPairDataModule
from simo_lightning.data.sources import ImageSource, LabelledImages, Split, stratified_split
from simo_lightning.preprocessing import Preprocessing

EXTRA_SPLITS: tuple[Split, ...] = ("query", "gallery", "unknown")


class TensorPairDataModule(PairDataModule):
    """Images in memory, for notebooks and tests.

    Args:
        train: Training images.
        val: Validation images; None: ``val_fraction`` of the training images.
        test: Test images; None: no test split.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(
        self,
        train: LabelledImages,
        val: LabelledImages | None = None,
        test: LabelledImages | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._given: dict[Split, LabelledImages | None] = {"train": train, "val": val, "test": test}

    def load(self, split: Split) -> ImageSource | None:
        """The images passed for ``split``."""
        return self._given[split]


class CIFAR10PairDataModule(PairDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32 x 32 RGB, ten classes.

    Args:
        data_dir: Folder of torchvision's files, or of class folders of images in folders ``train`` and ``test``.
        download: Whether to fetch torchvision's archive into ``data_dir`` if no files are found.
        **kwargs: Arguments of ``PairDataModule``.
    """

    dataset: Literal["cifar10", "cifar100"] = "cifar10"

    def __init__(self, data_dir: str | Path = "data/cifar10", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir = data_dir
        self.download = download

    def load(self, split: Split) -> ImageSource | None:
        """The training or the test images; validation images only if ``data_dir`` has a folder of them."""
        return load_cifar(self.data_dir, self.dataset, split, self.download)


class CIFAR100PairDataModule(CIFAR10PairDataModule):
    """CIFAR-100: 50,000 training and 10,000 test images, 32 x 32 RGB, a hundred classes.

    Args:
        data_dir: As for ``CIFAR10PairDataModule``.
        **kwargs: Arguments of ``CIFAR10PairDataModule``.
    """

    dataset = "cifar100"

    def __init__(self, data_dir: str | Path = "data/cifar100", **kwargs: Any) -> None:
        super().__init__(data_dir, **kwargs)


class DigitsPairDataModule(PairDataModule):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and one channel: real data with nothing to download.

    Args:
        augment: Augmentation of the training batches; null: none. By default a crop with padding 1 and no flip,
            since a mirrored digit is not that digit.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(
        self,
        augment: Augment | Literal["auto"] | None = BatchAugment(crop_padding=1, flip=0.0),  # noqa: B008  # immutable
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, **kwargs)

    def load(self, split: Split) -> ImageSource | None:
        """The training images, or the fixed fifth that serves as test split."""
        return None if split == "val" else load_digits(train=split == "train")


class ImageFolderPairDataModule(PairDataModule):
    """Photographs in folders, or named by a table.

    ``data_dir`` holds one folder per split, with the usual names in any case: train or training; val, valid or
    validation; test or testing; query; gallery; unknown (only the training folder is required). In each of them one
    folder per class holds its images at any depth; "unknown" holds images of no class, in folders or not. Or
    ``data_dir`` holds the class folders themselves, which are then the training split. Or ``simo pack`` wrote it: the
    same images, read memory-mapped from a few large files. At start one line per split says what was found and what is
    done to it.

    Args:
        data_dir: The folder; ``~`` is the user's home. With ``manifest``: the folder of its relative paths, by default
            that of the manifest.
        image_size: Side in pixels; images of other sizes are resized by the shorter side and centre-cropped. Null: that
            of the model, else 224.
        manifest: CSV or Parquet file with the columns path and label, and optionally split and coarse; see
            :func:`~simo_lightning.data.read_manifest`.
        class_level: Which folder above an image names its class: 1, a folder in the folder of the split; 2, one level
            further down; -1, the folder that holds the image; -2, the one above it. Folders of one name are one class.
            Null: 1, and an error if it may be another one.
        on_broken: error: a file that is not an image ends the run, with its name. skip: it is counted and left out; all
            images are then decoded once before training.
        max_memory_gib: Decoded size in GiB above which the images of a split stay on disk and are decoded batch by
            batch in ``num_workers`` processes.
        background: Colour behind transparent pixels, a name or #rrggbb. Null: that of the model, else white.
        max_value: Grey value that becomes white in grey images of more than 8 bits, such as 4095; null: that of the
            model, else 65,535 in 16-bit files, the maximum of each file in 32-bit ones.
        coarse: Coarse classes to train on, each with the classes that it joins, such as
            {animal: [cat, dog], vehicle: [ship, truck]}; or manifest, the column "coarse" of the manifest; or folder,
            the folder above each class folder; or a CSV file with the columns label and coarse. Validation, test and
            bank keep the true classes.
        augment: As for ``PairDataModule``. An augmentation of one picture at a time reads the whole picture from its
            file, however large ``max_memory_gib`` is; the images in memory are then those of evaluation.
        **kwargs: Arguments of ``PairDataModule``.

    Raises:
        ValueError: If an argument is out of range, or neither ``data_dir`` nor ``manifest`` is given.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        image_size: int | None = None,
        manifest: str | Path | None = None,
        class_level: int | None = None,
        on_broken: OnBroken = "error",
        max_memory_gib: float = 4.0,
        background: str | None = None,
        max_value: float | None = None,
        coarse: dict[str, list[str]] | str | None = None,
        augment: Augment | Literal["auto"] | None = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(coarse=None if isinstance(coarse, str) else coarse, augment=augment, **kwargs)
        self.data_dir = data_dir
        self.image_size = image_size
        self.manifest = manifest
        self.class_level = class_level
        self.on_broken = on_broken
        self.max_memory_gib = max_memory_gib
        self.background = background
        self.max_value = max_value
        self._coarse_from = coarse if isinstance(coarse, str) else None
        self._found: Manifest | PackedFolder | dict[Split, Path] | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        # raises early if one of them is out of range
        Preprocessing(**{**self._preprocessing_arguments(), "mean": None, "std": None})
        if self.data_dir is None and self.manifest is None:
            raise ValueError("data_dir or manifest must be given, got neither")
        if not self.max_memory_gib >= 0:
            raise ValueError(f"max_memory_gib must be non-negative, got {self.max_memory_gib}")
        if self.on_broken not in ("error", "skip"):
            raise ValueError(f"on_broken must be 'error' or 'skip', got {self.on_broken!r}")
        if self.class_level == 0:
            raise ValueError("class_level must be positive (from data_dir) or negative (from the image), got 0")
        if self.manifest is not None and self.class_level is not None:
            raise ValueError(
                f"class_level must be null with a manifest, which names the classes, got {self.class_level}"
            )
        if self.manifest is not None and is_packed(self.data_dir):
            raise ValueError(
                f"manifest must be null with the packed images of {str(self.data_dir)!r}, which hold its labels, got "
                f"{str(self.manifest)!r}"
            )
        if self._coarse_from == "manifest" and self.manifest is None and not is_packed(self.data_dir):
            raise ValueError("coarse 'manifest' requires a manifest, got none")
        if self._coarse_from == "folder" and self.manifest is not None:
            raise ValueError("coarse 'folder' requires class folders, got a manifest")

    def load(self, split: Split) -> ImageSource | None:
        """The images of one split; None if the folder or the manifest has no such split."""
        listing = self._list(split)
        if listing is None:
            return None
        source = read_images(
            listing,
            split,
            self.max_memory_gib * 2**30,
            on_broken=self.on_broken,
            cache_name=f"{split}_" if self.manifest is not None else "",
            note=self._augmented_by() if split == "train" else "",
        )
        if split == "train" and self._coarse_from is not None:
            self.coarse = self._coarse_classes(self._coarse_from, listing, source.class_names)
        return source

    @property
    def extra_splits(self) -> tuple[Split, ...]:  # type: ignore[override]
        """Which of the splits "query", "gallery" and "unknown" there are."""
        found = self._find()
        given = found if isinstance(found, dict) else found.splits
        return tuple(split for split in EXTRA_SPLITS if split in given)

    def _find(self) -> Manifest | PackedFolder | dict[Split, Path]:
        """The manifest, the packed images, or the folder of each split; looked up once."""
        if self._found is None:
            if self.manifest is not None:
                self._found = read_manifest(self.manifest, self.data_dir)
            elif is_packed(self.data_dir):
                assert self.data_dir is not None
                self._found = open_packed(self.data_dir, self.class_level)
            else:
                assert self.data_dir is not None
                self._found = find_splits(self.data_dir, class_level=self.class_level)
        return self._found

    def _augmented_by(self) -> str:
        augment = self._augmentation()
        return "" if augment is None else f"augmented by {type(augment).__name__}"

    def _list(self, split: Split) -> Listing | None:
        found = self._find()
        if isinstance(found, PackedFolder):
            return found.listing(split, self.preprocessing)
        return list_split(found, split, self.preprocessing, self.class_level, self.on_broken == "skip")

    def _coarse_classes(self, origin: str, listing: Listing, class_names: list[str]) -> dict[str, list[str]]:
        found = self._find()
        if origin == "manifest" and isinstance(found, Manifest | PackedFolder):
            coarse = found.coarse()
        elif origin == "folder":
            class_level = found.class_level if isinstance(found, PackedFolder) else self.class_level
            coarse = coarse_folders(listing.images, class_level or 1)
        else:
            coarse = read_coarse(origin, self.data_dir)
        return coarse_classes(coarse, class_names, origin)


class SemiSupervisedTensorPairDataModule(SemiSupervisedPairDataModule, TensorPairDataModule):
    """Images in memory with hidden labels; arguments of both parents, by name."""


class SemiSupervisedCIFAR10PairDataModule(SemiSupervisedPairDataModule, CIFAR10PairDataModule):
    """CIFAR-10 with hidden labels; arguments of both parents, by name."""


class SemiSupervisedCIFAR100PairDataModule(SemiSupervisedPairDataModule, CIFAR100PairDataModule):
    """CIFAR-100 with hidden labels; arguments of both parents, by name."""


class SemiSupervisedDigitsPairDataModule(SemiSupervisedPairDataModule, DigitsPairDataModule):
    """Handwritten digits with hidden labels; arguments of both parents, by name."""


class SemiSupervisedImageFolderPairDataModule(SemiSupervisedPairDataModule, ImageFolderPairDataModule):
    """A folder of images with hidden labels; arguments of both parents, by name."""


def load_digits(train: bool) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and one channel, grey levels 0..16 scaled to 0..255.

    The data set has no test split; a fixed, stratified fifth of each class serves as one.

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


def load_cifar(
    data_dir: str | Path, name: Literal["cifar10", "cifar100"], split: Split, download: bool
) -> ImageSource | None:
    """CIFAR-10 or CIFAR-100 from torchvision's files or from folders of JPEG or PNG images.

    Args:
        data_dir: Holds either ``train/<class>/*`` and ``test/<class>/*``, or the other names of ``find_splits``, or
            torchvision's archive, packed or unpacked, or nothing yet.
        name: Data set.
        split: "train", the 50,000 training images; "test", the 10,000 test images; others only from class folders.
        download: Whether to fetch torchvision's archive if no files are found.

    Returns:
        uint8 images ``(N, 3, 32, 32)``; None if there is no such split.

    Raises:
        FileNotFoundError: If the files are missing or damaged and cannot be fetched; the message gives the files
            expected and their folder.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    root = Path(data_dir).expanduser()
    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    archive = root / dataset_class.filename
    has_folders = root.is_dir() and any(name.lower() in SPLIT_NAMES["train"] for name in os.listdir(root))
    folders = find_splits(root, report=split == "train") if has_folders else {}
    if "test" in folders:
        return load_image_folder(folders[split], image_size=32, split=split) if split in folders else None
    if split not in ("train", "test"):
        return None
    archive_is_whole = check_integrity(str(archive), dataset_class.tgz_md5)
    try:  # with an archive present, torchvision's download only unpacks it
        dataset = dataset_class(str(root), train=split == "train", download=download or archive_is_whole)
    except (URLError, OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        state = "is missing"
        if archive.is_file() and not archive_is_whole:
            state = f"is damaged or incomplete ({archive.name} has another checksum than the original)"
        elif (root / dataset_class.base_folder).is_dir():
            state = f"is incomplete or damaged ({dataset_class.base_folder} lacks files or has wrong checksums)"
        tried = "the download failed" if download else "download is False"
        raise FileNotFoundError(
            f"{name} {state} in data_dir {str(root.absolute())!r} and {tried}: {error}. Put {dataset_class.filename} "
            f"({dataset_class.url}) into that folder, or class folders of images, train/<class>/* and test/<class>/*"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) to (N, 3, 32, 32)
    return LabelledImages(images, torch.tensor(dataset.targets), list(dataset.classes))
