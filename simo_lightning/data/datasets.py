"""Data modules by name: CIFAR, digits, any folder of class folders, tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simo_lightning.data.augment import BatchAugment
from simo_lightning.data.datamodule import PairDataModule, Split
from simo_lightning.data.folder import load_image_folder
from simo_lightning.data.sources import ImageSource, LabelledImages, load_cifar, load_digits


class TensorPairDataModule(PairDataModule):
    """Images that are in memory already, for notebooks and tests.

    Args:
        train: Training images.
        val: Validation images; ``None`` = a share of the training images.
        test: Test images, if there are any.
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
        """The images given."""
        return self._given[split]


class CIFAR10PairDataModule(PairDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32 x 32 RGB, ten classes.

    Args:
        data_dir: Folder of torchvision's files, or of class folders of images, ``train/<class>/*`` and
            ``test/<class>/*``.
        download: Whether to fetch torchvision's archive into ``data_dir`` where no files are found.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(self, data_dir: str = "data/cifar10", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir = data_dir
        self.download = download

    def load(self, split: Split) -> ImageSource | None:
        """The training or the test images."""
        return None if split == "val" else load_cifar(self.data_dir, "cifar10", split == "train", self.download)


class CIFAR100PairDataModule(PairDataModule):
    """CIFAR-100: 50,000 training and 10,000 test images, 32 x 32 RGB, a hundred classes.

    Args:
        data_dir: Folder of torchvision's files, or of class folders of images, ``train/<class>/*`` and
            ``test/<class>/*``.
        download: Whether to fetch torchvision's archive into ``data_dir`` where no files are found.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(self, data_dir: str = "data/cifar100", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir = data_dir
        self.download = download

    def load(self, split: Split) -> ImageSource | None:
        """The training or the test images."""
        return None if split == "val" else load_cifar(self.data_dir, "cifar100", split == "train", self.download)


class DigitsPairDataModule(PairDataModule):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and one channel: real data with nothing to download.

    Args:
        augment: Augmentation of the training batches; null = none. By default a crop by one pixel and no flip, which
            would make other signs of digits.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(
        self,
        augment: BatchAugment | None = BatchAugment(crop_padding=1, flip=0.0),  # noqa: B008  # immutable
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, **kwargs)

    def load(self, split: Split) -> ImageSource | None:
        """The training images or the fixed fifth that is the test here."""
        return None if split == "val" else load_digits(train=split == "train")


class ImageFolderPairDataModule(PairDataModule):
    """Any folder of class folders of images.

    ``data_dir`` holds ``train/<class>/*`` and, where there are, ``val/<class>/*`` and ``test/<class>/*``; or the class
    folders themselves, which are then the training split.

    Args:
        data_dir: That folder.
        image_size: Side in pixels; images of other sizes are resized by the shorter side and centre-cropped.
        max_memory_gib: Decoded size of a split in GiB above which its images stay on disk and are decoded by
            ``num_workers`` processes, batch by batch.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(self, data_dir: str, image_size: int = 32, max_memory_gib: float = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir = data_dir
        self.image_size = image_size
        self.max_memory_gib = max_memory_gib

    def load(self, split: Split) -> ImageSource | None:
        """One split's folder, or ``data_dir`` itself."""
        folder = Path(self.data_dir) / split
        if split == "train" and not folder.is_dir():
            folder = Path(self.data_dir)
        if split != "train" and not (folder.is_dir() and (Path(self.data_dir) / "train").is_dir()):
            return None
        return load_image_folder(folder, self.image_size, int(self.max_memory_gib * 2**30))
