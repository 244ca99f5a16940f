"""Folders of class folders: listed, checked, decoded on every core, cached, or left on disk where they are large."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from simo_lightning.data.cache import CACHE, fingerprint, read_cache, write_cache
from simo_lightning.data.decode import Decoder
from simo_lightning.data.sources import LabelledImages, Split

SUFFIXES = frozenset(
    [
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)  # of the formats in decode.FORMATS
IGNORED = frozenset(  # left behind by operating systems and archives; also every name that begins with a dot
    {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
)
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Labelled images that stay on disk and are decoded batch by batch, in the loader's workers.

    Args:
        root: Folder that ``names`` start from.
        names: File of each image, relative to ``root``.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        decoder: How a file becomes pixels.
    """

    root: Path
    names: np.ndarray  # of str: one block of memory, so that workers share it
    labels: Tensor
    class_names: list[str]
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, _ = self.decode(indices)
        return torch.from_numpy(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def decode(self, indices: Sequence[int]) -> tuple[np.ndarray, Counter[str]]:
        """The images at ``indices``, uint8 ``(len(indices), 3, S, S)``, and how many were converted in which way."""
        side = self.decoder.image_size
        images, changes = np.empty((len(indices), 3, side, side), dtype=np.uint8), Counter[str]()
        for position, index in enumerate(indices):
            images[position], changed = self.decoder(self.root / self.names[index])
            changes.update(changed)
        return images, changes

    def subset(self, indices: Tensor) -> FolderImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


def find_splits(folder: str | Path, report: bool = True) -> dict[Split, Path]:
    """Folders of the splits by their usual names, in any case: ``SPLIT_NAMES``.

    Args:
        folder: Holds either one folder per split, each with the class folders, or the class folders themselves.
        report: Whether to say in the log what was found.

    Returns:
        Folder of each split that is there; ``folder`` itself as training split where no training folder is in it. A
        folder without sub-folders is no split, whatever its name.

    Raises:
        FileNotFoundError: If there is no such folder.
        OSError: If a folder cannot be read.
        ValueError: If two folders are the same split, or ``folder`` looks as if it was one level above the classes.
    """
    root = _existing(folder)
    inside = {name: set(_folders(root / name)) for name in _folders(root)}
    found: dict[Split, Path] = {}
    for split, known in SPLIT_NAMES.items():
        names = [name for name in inside if name.lower() in known and inside[name]]
        if len(names) > 1:
            raise ValueError(f"data_dir {str(root)!r} must hold one {split} folder, found {names}")
        if names:
            found[split] = root / names[0]
    if "train" not in found:
        _check_level(root, inside, found)
        return {"train": root}
    if report:
        others = sorted(set(inside) - {path.name for path in found.values()})
        rank_zero_info(
            f"{str(root)!r}: {', '.join(f'{split} split in {path.name!r}' for split, path in found.items())}"
            + (f"; left out: {_some(others)}" if others else "")
        )
    return found


def _check_level(root: Path, inside: dict[str, set[str]], found: dict[Split, Path]) -> None:
    """Refuse a folder whose sub-folders look like splits or folds rather than classes."""
    advice = (
        "data_dir must hold class folders, or folders 'train', 'val', 'test' that do. Where the folders in it are the "
        "classes all the same, put them into a folder 'train'"
    )
    for split, path in found.items():
        raise ValueError(f"{str(path)!r} looks like a {split} split, but there is no training folder: {advice}")
    if len(inside) == 1:
        ((name, below),) = inside.items()
        if len(below) > 1:
            raise ValueError(f"{str(root)!r} holds the single folder {name!r}, is that the data_dir? {advice}")
    if (
        not inside
        or not all(inside.values())
        or any(len(_entries(root / name)) > len(below) for name, below in inside.items())
    ):
        return
    shared = Counter(name for names in inside.values() for name in names)
    twice = sorted(name for name, count in shared.items() if count > 1)
    if len(twice) > 1:
        raise ValueError(
            f"{str(root)!r} looks one level too high: its folders {_some(inside)} hold no image themselves, and "
            f"several of them hold the same folders {_some(twice)}. {advice}"
        )
    rank_zero_warn(
        f"{str(root)!r}: no class folder holds an image itself, only sub-folders, whose images are joined: "
        f"are {_some(inside)} the classes?"
    )


def list_image_folder(folder: str | Path, decoder: Decoder) -> tuple[FolderImages, list[str]]:
    """List ``folder/<class>/**/*`` without decoding, classes and files in the order of their names.

    Names that begin with a dot or are in ``IGNORED`` are left out at every level, and so are files beside the class
    folders. Links to files and folders are followed.

    Args:
        folder: Holds the class folders.
        decoder: How a file becomes pixels.

    Returns:
        The images and the names that were left out.

    Raises:
        FileNotFoundError: If ``folder`` is no folder or holds fewer than two class folders, or a link is broken.
        OSError: If a folder cannot be read.
        ValueError: If a class folder holds no image, a file with a suffix that is not an image's or something that is
            no file, or a link leads back to a folder that it lies in.
    """
    root = _existing(folder)
    left_out: list[str] = []
    entries = _entries(root, left_out)
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    left_out += [entry.name for entry in entries if not entry.is_dir()]
    if len(classes) < 2:
        raise FileNotFoundError(
            f"{str(root)!r} must hold at least 2 class folders of images, found {len(classes)}: {classes}"
        )
    parents = {_identity(path) for path in (root.resolve(), *root.resolve().parents)}
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_image_names(root, name, parents, left_out))
        if not found:
            raise ValueError(f"class folder {str(root / name)!r} holds no image")
        names += found
        labels += [label] * len(found)
    return FolderImages(root, np.array(names), torch.tensor(labels), classes, decoder), left_out


def _image_names(root: Path, inside: str, parents: set[tuple[int, int]], left_out: list[str]) -> Iterator[str]:
    """Names relative to ``root`` of the images in the folder ``inside``, at any depth."""
    here = _identity(root / inside)
    if here in parents:
        raise ValueError(f"link {str(root / inside)!r} leads back to a folder that it lies in; take it away")
    for entry in _entries(root / inside, left_out):
        name = os.path.join(inside, entry.name)
        if entry.is_dir():
            yield from _image_names(root, name, parents | {here}, left_out)
        elif not entry.is_file():
            raise ValueError(f"{entry.path!r} is neither a file nor a folder; take it away")
        elif os.path.splitext(name)[1].lower() not in SUFFIXES:
            raise ValueError(f"{entry.path!r} is no image (suffixes read: {', '.join(sorted(SUFFIXES))}); take it away")
        else:
            yield name


def _existing(folder: str | Path) -> Path:
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is no folder; it should hold one folder of images per class")
    return root


def _entries(folder: Path, left_out: list[str] | None = None) -> list[os.DirEntry[str]]:
    """What is in a folder apart from ignored names, which join ``left_out``; OSError where a link is broken."""
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                if left_out is not None and not entry.name.startswith(CACHE):
                    left_out.append(entry.name)
                continue
            if entry.is_symlink():
                entry.stat()
            entries.append(entry)
    return entries


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _some(names: Sequence[str] | dict[str, set[str]], most: int = 5) -> str:
    shown = sorted(names)
    return ", ".join(map(repr, shown[:most])) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def load_image_folder(
    folder: str | Path,
    image_size: int,
    max_memory: int = 4 * 2**30,
    workers: int | None = None,
    background: str = "white",
    max_value: float | None = None,
) -> LabelledImages | FolderImages:
    """Labelled images from a folder of class folders, decoded into memory and cached, or left on disk if too large.

    One line in the log says how many images of which kind were found, how many were converted in which way, and what
    was left out. Images left on disk are decoded, and converted, as they are read.

    The cache is one hidden file in ``folder``, or in the user's cache folder where that cannot be written. It holds
    for the exact names, sizes and times of change of the files, and for the arguments here.

    Args:
        folder: Holds ``<class>/**/*``; ``~`` is the user's home. See ``list_image_folder`` for what is left out.
        image_size: Side in pixels; other sizes are resized by the shorter side and centre-cropped.
        max_memory: Decoded bytes (``N * 3 * image_size**2``) above which the images stay on disk.
        workers: Processes that decode; None: one per core where processes can be forked.
        background: Colour behind transparent pixels; see ``Decoder``.
        max_value: Grey value that becomes 255 in images of more than 8 bits; None: as ``Decoder`` says.

    Returns:
        The images, RGB, classes in the order of their names.

    Raises:
        FileNotFoundError: If there is no such folder, or it has fewer than two class folders.
        OSError: If a file or a folder cannot be read; it is named.
        ValueError: If an argument is out of its range, a class folder is empty, a link leads back to a folder that it
            lies in, or a file is no image; it is named.
    """
    decoder = Decoder(image_size, background, max_value)
    listed, left_out = list_image_folder(folder, decoder)
    if len(listed) * 3 * image_size**2 > max_memory:
        _report(listed, left_out, None)
        return listed
    key = fingerprint(listed.root, listed.names, decoder)
    images, changes = read_cache(listed.root, image_size, key, len(listed))
    if images is None:
        images, changes = _decode_all(listed, workers)
        write_cache(listed.root, image_size, key, images, changes)
    _report(listed, left_out, changes)
    return LabelledImages(images, listed.labels, listed.class_names)


def _report(listed: FolderImages, left_out: list[str], changes: dict[str, int] | None) -> None:
    suffixes = Counter(os.path.splitext(name)[1].lower().lstrip(".") for name in listed.names)
    parts = [f"{len(listed):,} images of {len(listed.class_names):,} classes ({_counted(suffixes)})"]
    if changes is None:
        parts.append("too many for max_memory_gib: decoded from disk, each file checked and converted when it is read")
    elif changes:
        parts.append(f"converted: {_counted(changes)}")
    if left_out:
        parts.append(f"left out: {_counted(Counter(left_out))}")
    rank_zero_info(f"{str(listed.root)!r}: {'; '.join(parts)}")


def _counted(counts: dict[str, int], most: int = 8) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[most:])
    return ", ".join(f"{count:,} {name}" for name, count in ranked[:most]) + (f", {rest:,} others" if rest else "")


def _decode_all(listed: FolderImages, workers: int | None, chunk: int = 1000) -> tuple[Tensor, dict[str, int]]:
    """Decode every image, uint8 ``(N, 3, S, S)``; on forked processes where that is possible and pays.

    Threads are slower than one process here: reading a small image is mostly Python. Arrays come back through pipes,
    not shared memory, which containers keep small.
    """
    side = listed.decoder.image_size
    chunks = [range(start, min(start + chunk, len(listed))) for start in range(0, len(listed), chunk)]
    images, changes = torch.empty(len(listed), 3, side, side, dtype=torch.uint8), Counter[str]()
    workers = _default_workers() if workers is None else workers
    with warnings.catch_warnings(), ExitStack() as stack:
        parallel: Callable[..., Iterable[tuple[np.ndarray, Counter[str]]]] = map
        if workers > 1 and len(chunks) > 1:
            warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)  # the children run no torch code
            parallel = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))).map
        for indices, (decoded, changed) in zip(chunks, parallel(listed.decode, chunks), strict=True):
            images[indices.start : indices.stop] = torch.from_numpy(decoded)
            changes.update(changed)
    return images, dict(changes)


def _default_workers() -> int:
    """Cores this process may use; 1 where a child process cannot be forked safely."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(16, len(os.sched_getaffinity(0)))
