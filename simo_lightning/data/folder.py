"""Folders of class folders: which splits, classes and image files they hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor

from simo_lightning.data.cache import CACHE
from simo_lightning.data.sources import Split, name_list
from simo_lightning.preprocessing import FORMATS, Decoder, PictureSize, Preprocessing
from simo_lightning.retry import retry_while_lost

IGNORED = frozenset(  # written by operating systems and archivers; names that begin with a dot are ignored too
    {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
)
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
    "query": ("query",),
    "gallery": ("gallery",),
    "unknown": ("unknown",),
}


ADVICE = "remove it, or set on_broken to 'skip'"


@contextmanager
def named_as_broken(advice: str = ADVICE) -> Iterator[None]:
    """Say in a ValueError what to do about a file that does not decode."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Labelled images that stay on disk and are decoded batch by batch, in the loader's workers.

    Args:
        root: Folder of the images.
        names: Path of each image, relative to ``root`` or absolute.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        decoder: Reads a file.
    """

    root: Path
    names: np.ndarray  # of str: one block of memory, which forked workers share
    labels: Tensor
    class_names: list[str]
    decoder: Preprocessing
    checked: ClassVar[bool] = False
    """Whether each image is known to decode."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = np.empty((len(indices), self.decoder.channels, *self.decoder.size), dtype=np.uint8)
        for position, index in enumerate(indices):
            images[position] = self.read(index, self.decoder.read)[0]
        return torch.from_numpy(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def path(self, index: int) -> Path:
        """Path of one image, by which it is known."""
        return self.root / str(self.names[index])

    def file(self, index: int) -> Path | BinaryIO:
        """What the decoder reads for one image."""
        return self.path(index)

    def read(self, index: int, read: Callable[[Path | BinaryIO], Any]) -> Any:
        """What ``read`` makes of the file of one image; tried again while its file system is away.

        Raises:
            ValueError: If it does not decode; the message names it.
        """
        with named_as_broken(self.advice):
            return retry_while_lost(lambda: read(self.file(index)), self.path(index))

    @property
    def stored(self) -> Sequence[str]:
        """Files that hold the images, relative to ``root``."""
        names: list[str] = self.names.tolist()
        return names

    @property
    def advice(self) -> str:
        """What to do about an image that does not decode."""
        return ADVICE

    def picture(self, index: int, size: PictureSize = None) -> Image.Image:
        """One whole picture, upright and in mode RGB, for a transform that crops and resizes it itself.

        Args:
            index: Position of the image, ``0..len(self) - 1``.
            size: Smallest width and height that are needed: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size as
                long as it is not smaller than that, which saves most of the time. Or a function of the width and height
                of the picture that returns them; see ``preprocessing.Decoder``. None: at its full size.

        Returns:
            The picture, not resized, transparency composited on the background of ``decoder``.

        Raises:
            OSError: If the file cannot be read; the message names it.
            ValueError: If it is not an image or is damaged; the message names it.
        """
        decoder = Decoder(self.decoder.background, self.decoder.max_value)
        found: Image.Image = self.read(index, lambda file: decoder(file, size))[0]
        return found

    def subset(self, indices: Tensor) -> FolderImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


@dataclass(frozen=True, eq=False)
class Listing:
    """The image files of one split, as a folder or a manifest names them; no file is opened yet.

    Args:
        images: Files and classes; every class has at least one file.
        left_out: Names that are not images of a class, and how often each was found.
        empty: Class folders without an image, left out.
        missing: Files that a manifest names and that do not exist, left out.
    """

    images: FolderImages
    left_out: Counter[str] = field(default_factory=Counter)
    empty: Sequence[str] = ()
    missing: Sequence[str] = ()


def list_files(root: Path, names: Sequence[str], classes: Sequence[str], decoder: Preprocessing) -> FolderImages:
    """Files and the name of each one's class, sorted by class and file, so that the order found does not matter."""
    class_names = sorted(set(classes))
    index = {name: number for number, name in enumerate(class_names)}
    labels = np.fromiter((index[name] for name in classes), dtype=np.int64, count=len(classes))
    files = np.array(names, dtype=np.str_)
    order = np.lexsort((files, labels))
    return FolderImages(root, files[order], torch.from_numpy(labels[order]), class_names, decoder)


def find_splits(folder: str | Path, report: bool = True, class_level: int | None = None) -> dict[Split, Path]:
    """Folders of the splits, recognised by their usual names in any case (``SPLIT_NAMES``).

    Args:
        folder: Holds either one folder per split, each with class folders, or the class folders themselves.
        report: Whether to log which folders were found.
        class_level: As for :class:`ImageFolderPairDataModule`; if given, the class folders may be at any depth.

    Returns:
        Folder of each split found; ``folder`` itself as the training split if it holds no training folder. A folder
        without sub-folders is not a split, except "unknown" beside a training folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        OSError: If a folder cannot be read.
        ValueError: If two folders are the same split, or ``folder`` looks one level above the class folders.
    """
    root = existing_folder(folder)
    inside = {name: set(_folders(root / name)) for name in _folders(root)}
    found: dict[Split, Path] = {}
    for split, known in SPLIT_NAMES.items():
        names = [name for name in inside if name.lower() in known and (inside[name] or split == "unknown")]
        if len(names) > 1:
            raise ValueError(f"data_dir {str(root)!r} must hold one {split} folder, found {names}")
        if names:
            found[split] = root / names[0]
    if "train" not in found:
        _check_level(root, inside, found, class_level)
        return {"train": root}
    if report:
        others = sorted(set(inside) - {path.name for path in found.values()})
        rank_zero_info(
            f"{str(root)!r}: {', '.join(f'{split} split in {path.name!r}' for split, path in found.items())}"
            + (f"; left out: {name_list(others)}" if others else "")
        )
    return found


def _check_level(root: Path, inside: dict[str, set[str]], found: dict[Split, Path], class_level: int | None) -> None:
    """Refuse a folder whose sub-folders look like splits or folds rather than classes."""
    advice = (
        "data_dir must hold class folders, or folders 'train', 'val', 'test' that do. If its sub-folders are the "
        "classes after all, put them into a folder 'train'"
    )
    for split, path in found.items():
        if inside[path.name]:
            raise ValueError(f"{str(path)!r} looks like a {split} split, but there is no training folder: {advice}")
        rank_zero_info(f"{str(path)!r} is taken as a class; a split of that name requires a folder 'train' beside it")
    if class_level is not None:
        return
    if len(inside) == 1 and len(*inside.values()) > 1:
        raise ValueError(
            f"{str(root)!r} holds the single folder {name_list(inside)}, is that the data_dir? {advice}, or set "
            "class_level (2: one level further down)"
        )
    if not inside or any(not below or len(_entries(root / name)) > len(below) for name, below in inside.items()):
        return  # some folder holds images itself
    counts = Counter(name for below in inside.values() for name in below)
    repeated = [name for name, count in counts.items() if count > 1]
    if len(repeated) > 1:
        raise ValueError(
            f"{str(root)!r} looks one level too high: its folders {name_list(inside)} hold no image themselves, and "
            f"several of them hold the same folders {name_list(repeated)}. {advice}, or set class_level (1), or 2 if "
            f"{name_list(repeated)} are the classes"
        )


def list_image_folder(
    folder: str | Path,
    decoder: Preprocessing,
    class_level: int | None = None,
    skip: bool = False,
    one_class: str | None = None,
) -> Listing:
    """List the images below ``folder`` without opening them; each folder is read once.

    Names that begin with a dot or are in ``IGNORED`` are left out at every level, and so are files in ``folder``
    itself. Links to files and folders are followed.

    Args:
        folder: Holds the class folders.
        decoder: Reads a file.
        class_level: Which folder above an image names its class: 1 is a folder in ``folder`` itself, 2 one level
            further down; -1 is the folder that holds the image, -2 the one above it. Folders of one name are one class.
            None: 1, and an error if it may be another one, since no folder in ``folder`` holds an image itself.
        skip: Whether files without an image's suffix are left out; otherwise they are an error.
        one_class: Name of a single class of all images, those in ``folder`` itself included.

    Returns:
        The images, and what was left out.

    Raises:
        FileNotFoundError: If ``folder`` is not a folder or holds no image, or a link is broken.
        OSError: If a folder cannot be read.
        ValueError: If ``folder`` holds a file without an image's suffix, an image above the level of the classes, or
            an entry that is neither file nor folder; if a link leads back to a folder that contains it; or if
            ``class_level`` is 0, or None and not clear.
    """
    if class_level == 0:
        raise ValueError("class_level must be positive (from data_dir) or negative (from the image), got 0")
    root = existing_folder(folder)
    walk = _Walk(root, skip, root_files=one_class is not None)
    walk.visit("", frozenset(root.resolve().parents))
    if one_class is not None:
        classes, empty = [one_class] * len(walk.names), []
    else:
        if class_level is None:
            _check_clear(root, walk.names)
        classes = [_class_of(root, name, class_level or 1) for name in walk.names]
        levels = (_at_level(os.path.join(name, ""), class_level or 1) for name in walk.without_image)
        empty = sorted({name for name in levels if name is not None} - set(classes))
    if not walk.names:
        raise FileNotFoundError(
            f"{str(root)!r} must hold class folders of images, found no image"
            + (f" in {name_list(empty)}" if empty else "")
        )
    return Listing(list_files(root, walk.names, classes, decoder), walk.left_out, empty)


def coarse_folders(images: FolderImages, class_level: int) -> dict[str, str]:
    """Name of the folder above the class folder of each class.

    Raises:
        ValueError: If there is no such folder, or a class lies in several.
    """
    found: dict[str, str] = {}
    for name, label in zip(images.names.tolist(), images.labels.tolist(), strict=True):
        own, above = images.class_names[label], _at_level(name, class_level - 1) if class_level != 1 else None
        if above is None:
            raise ValueError(
                f"coarse 'folder' requires a folder above each class folder (class_level 2 or more, or negative), but "
                f"{name!r} has none at class_level {class_level}"
            )
        if found.setdefault(own, above) != above:
            raise ValueError(
                f"coarse 'folder' requires each class in one folder, but {own!r} is in {name_list({found[own], above})}"
            )
    return found


def _at_level(name: str, level: int) -> str | None:
    """Folder of a path at a level from its start (1, 2, ...) or its file (-1, -2, ...); None if it has none there."""
    folders = name.split(os.sep)[:-1]
    position = level - 1 if level > 0 else len(folders) + level
    return folders[position] if 0 <= position < len(folders) else None


def _class_of(root: Path, name: str, level: int) -> str:
    found = _at_level(name, level)
    if found is None:
        raise ValueError(
            f"class_level {level} must name a folder above every image below {str(root)!r}, but {name!r} has "
            f"{name.count(os.sep)} above it"
        )
    return found


def _check_clear(root: Path, names: Sequence[str]) -> None:
    """Refuse a tree whose folders at the first level may be the classes, or those that hold the images."""
    if not names or any(name.count(os.sep) < 2 for name in names):
        return
    holders = {name.rsplit(os.sep, 2)[1] for name in names}
    if len(holders) > 1:
        tops = {name.split(os.sep, 1)[0] for name in names}
        raise ValueError(
            f"{str(root)!r} holds no class folder that holds an image itself: set class_level to 1 if its "
            f"{len(tops):,} folders ({name_list(tops)}) are the classes, or to -1 if the folders that hold the images "
            f"({len(holders):,} names: {name_list(holders)}) are"
        )


class _Walk:
    """Image files below a folder, their paths relative to it."""

    def __init__(self, root: Path, skip: bool, root_files: bool) -> None:
        self.root = root
        self.skip = skip
        self.root_files = root_files  # whether files in the root itself are images of a class
        self.names: list[str] = []
        self.left_out = Counter[str]()
        self.without_image: list[str] = []  # folders that hold neither images nor folders

    def visit(self, inside: str, parents: frozenset[Path]) -> None:
        """Add what the folder ``inside`` holds at any depth; ``parents`` are the folders that contain it."""
        here = (self.root / inside).resolve()
        if here in parents:
            raise ValueError(f"link {str(self.root / inside)!r} leads back to a folder that contains it; remove it")
        anything = False
        for entry in _entries(self.root / inside, self.left_out):
            name = os.path.join(inside, entry.name)
            if entry.is_dir():
                self.visit(name, parents | {here})
                anything = True
            elif not inside and not self.root_files:
                self.left_out[entry.name] += 1
            elif self._is_image(entry):
                self.names.append(name)
                anything = True
        if inside and not anything:
            self.without_image.append(inside)

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        if not entry.is_file():
            raise ValueError(f"{entry.path!r} is neither a file nor a folder; remove it")
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in _suffixes():
            return True
        if not self.skip:
            raise ValueError(
                f"{entry.path!r} is not an image (suffixes read: {', '.join(sorted(_suffixes()))}); convert or remove "
                "it, or set on_broken to 'skip'"
            )
        self.left_out[f"*{suffix}" if suffix else entry.name] += 1
        return False


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that are read; a function since Pillow then imports all its formats."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def existing_folder(folder: str | Path) -> Path:
    """Absolute path of a folder; FileNotFoundError if there is none."""
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is not a folder; it must hold one folder of images per class")
    return root


def _entries(folder: Path, left_out: Counter[str] | None = None) -> list[os.DirEntry[str]]:
    """Entries of a folder without ignored names, which are added to ``left_out``; OSError if a link is broken."""
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                if left_out is not None and not entry.name.startswith(CACHE):
                    left_out[entry.name] += 1
                continue
            if entry.is_symlink():
                entry.stat()  # raises if its target is missing
            entries.append(entry)
    return entries


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())
