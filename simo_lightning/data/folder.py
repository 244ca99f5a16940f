"""Folders of class folders: listed, checked, decoded on all cores, cached; large ones stay on disk."""

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
from functools import cache
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor

from simo_lightning.data.cache import CACHE, fingerprint, read_cache, write_cache
from simo_lightning.data.sources import DecodedFiles, LabelledImages, Split, name_list
from simo_lightning.preprocessing import FORMATS, Decoder, PictureSize, Preprocessing

IGNORED = frozenset(  # written by operating systems and archivers; names that begin with a dot are ignored too
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
        root: Folder of all images.
        names: Path of each image relative to ``root``.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        decoder: Reads a file.
    """

    root: Path
    names: np.ndarray  # of str: one block of memory, which forked workers share
    labels: Tensor
    class_names: list[str]
    decoder: Preprocessing

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, _ = self.decode(indices)
        return torch.from_numpy(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def decode(self, indices: Sequence[int]) -> tuple[np.ndarray, Counter[str]]:
        """The images at ``indices``, uint8 ``(len(indices), 3, S, S)``, and the number of each conversion."""
        images, changes = np.empty((len(indices), 3, *self.decoder.size), dtype=np.uint8), Counter[str]()
        for position, index in enumerate(indices):
            images[position], changed = self.decoder.read(self.root / self.names[index])
            changes.update(changed)
        return images, changes

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
        return decoder(self.root / self.names[index], size)[0]

    def subset(self, indices: Tensor) -> FolderImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


def find_splits(folder: str | Path, report: bool = True) -> dict[Split, Path]:
    """Folders of the splits, recognised by their usual names in any case (``SPLIT_NAMES``).

    Args:
        folder: Holds either one folder per split, each with class folders, or the class folders themselves.
        report: Whether to log which folders were found.

    Returns:
        Folder of each split found; ``folder`` itself as the training split if it holds no training folder. A folder
        without sub-folders is not a split.

    Raises:
        FileNotFoundError: If there is no such folder.
        OSError: If a folder cannot be read.
        ValueError: If two folders are the same split, or ``folder`` looks one level above the class folders.
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
            + (f"; left out: {name_list(others)}" if others else "")
        )
    return found


def _check_level(root: Path, inside: dict[str, set[str]], found: dict[Split, Path]) -> None:
    """Refuse a folder whose sub-folders look like splits or folds rather than classes."""
    advice = (
        "data_dir must hold class folders, or folders 'train', 'val', 'test' that do. If its sub-folders are the "
        "classes after all, put them into a folder 'train'"
    )
    for split, path in found.items():
        raise ValueError(f"{str(path)!r} looks like a {split} split, but there is no training folder: {advice}")
    if len(inside) == 1 and len(*inside.values()) > 1:
        raise ValueError(f"{str(root)!r} holds the single folder {name_list(inside)}, is that the data_dir? {advice}")
    if not inside or any(not below or len(_entries(root / name)) > len(below) for name, below in inside.items()):
        return  # some folder holds images itself
    counts = Counter(name for below in inside.values() for name in below)
    repeated = [name for name, count in counts.items() if count > 1]
    if len(repeated) > 1:
        raise ValueError(
            f"{str(root)!r} looks one level too high: its folders {name_list(inside)} hold no image themselves, and "
            f"several of them hold the same folders {name_list(repeated)}. {advice}"
        )
    rank_zero_warn(
        f"{str(root)!r}: no class folder holds an image itself, only sub-folders, whose images are joined: "
        f"are {name_list(inside)} the classes?"
    )


def list_image_folder(folder: str | Path, decoder: Preprocessing) -> tuple[FolderImages, list[str]]:
    """List ``folder/<class>/**/*`` without decoding, classes and files sorted by name.

    Names that begin with a dot or are in ``IGNORED`` are left out at every level, and so are files beside the class
    folders. Links to files and folders are followed.

    Args:
        folder: Holds the class folders.
        decoder: Reads a file.

    Returns:
        The images and the names that were left out.

    Raises:
        FileNotFoundError: If ``folder`` is not a folder or holds fewer than two class folders, or a link is broken.
        OSError: If a folder cannot be read.
        ValueError: If a class folder holds no image, a file without an image's suffix, or an entry that is neither
            file nor folder, or if a link leads back to a folder that contains it.
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
    parents = {root.resolve(), *root.resolve().parents}
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_image_names(root, name, parents, left_out))
        if not found:
            raise ValueError(f"class folder {str(root / name)!r} holds no image")
        names += found
        labels += [label] * len(found)
    return FolderImages(root, np.array(names), torch.tensor(labels), classes, decoder), left_out


def _image_names(root: Path, inside: str, parents: set[Path], left_out: list[str]) -> Iterator[str]:
    """Paths relative to ``root`` of the images in the folder ``inside``, at any depth."""
    here = (root / inside).resolve()
    if here in parents:
        raise ValueError(f"link {str(root / inside)!r} leads back to a folder that contains it; remove it")
    for entry in _entries(root / inside, left_out):
        name = os.path.join(inside, entry.name)
        if entry.is_dir():
            yield from _image_names(root, name, parents | {here}, left_out)
        elif not entry.is_file():
            raise ValueError(f"{entry.path!r} is neither a file nor a folder; remove it")
        elif os.path.splitext(name)[1].lower() not in _suffixes():
            raise ValueError(
                f"{entry.path!r} is not an image (suffixes read: {', '.join(sorted(_suffixes()))}); remove it"
            )
        else:
            yield name


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that are read; a function since Pillow then imports all its formats."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def _existing(folder: str | Path) -> Path:
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is not a folder; it must hold one folder of images per class")
    return root


def _entries(folder: Path, left_out: list[str] | None = None) -> list[os.DirEntry[str]]:
    """Entries of a folder without ignored names, which are added to ``left_out``; OSError if a link is broken."""
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                if left_out is not None and not entry.name.startswith(CACHE):
                    left_out.append(entry.name)
                continue
            if entry.is_symlink():
                entry.stat()  # raises if its target is missing
            entries.append(entry)
    return entries


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def load_image_folder(
    folder: str | Path,
    image_size: int,
    max_memory: float = 4 * 2**30,
    workers: int | None = None,
    background: str = "white",
    max_value: float | None = None,
) -> LabelledImages | FolderImages:
    """Labelled images from a folder of class folders, decoded into memory and cached, or left on disk if too large.

    One log line gives the number of images per suffix, the number of each conversion, and the names left out. Images
    that stay on disk are not opened here: their line has no conversions, and a damaged file raises when it is read.

    The cache is one hidden file in ``folder``, or a file in the user's cache folder if ``folder`` is read-only. It is
    used only if the names, sizes and modification times of all files and the arguments are the same.

    Args:
        folder: Holds ``<class>/**/*``; ``~`` is the user's home. Names that begin with a dot and those in ``IGNORED``
            are left out.
        image_size: Side in pixels; other sizes are resized by the shorter side and centre-cropped.
        max_memory: Decoded bytes (``N * 3 * image_size**2``) above which the images stay on disk.
        workers: Processes that decode; None: one per core, at most 16, on Linux, else 1.
        background: Colour behind transparent pixels; see ``preprocessing.Decoder``.
        max_value: Grey value that becomes 255 in images of more than 8 bits; None: see ``preprocessing.Decoder``.

    Returns:
        The images, RGB, classes sorted by name.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds fewer than two class folders.
        OSError: If a file or a folder cannot be read; the message names it.
        ValueError: If an argument is out of range, a class folder is empty, a link leads back to a folder that
            contains it, or a file is not an image; the message names it.
    """
    decoder = Preprocessing(image_size, background=background, max_value=max_value)
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
    return DecodedFiles(images, listed.labels, listed.class_names, listed)


def _report(listed: FolderImages, left_out: list[str], changes: dict[str, int] | None) -> None:
    suffixes = Counter(os.path.splitext(name)[1].lower().lstrip(".") for name in listed.names)
    parts = [f"{len(listed):,} images of {len(listed.class_names):,} classes ({_counted(suffixes)})"]
    if changes is None:
        parts.append(
            "larger than max_memory_gib, so they stay on disk: no file is opened yet, conversions are not counted, and "
            "a damaged file ends the run when it is read"
        )
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
    """Decode every image, uint8 ``(N, 3, S, S)``; on forked processes if there is more than one chunk.

    Threads are slower than one process: decoding a small image is mostly Python. Arrays return through pipes rather
    than shared memory, which is small in containers.
    """
    chunks = [range(start, min(start + chunk, len(listed))) for start in range(0, len(listed), chunk)]
    images, changes = torch.empty(len(listed), 3, *listed.decoder.size, dtype=torch.uint8), Counter[str]()
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
    """Cores that this process may use; 1 if a child process cannot be forked safely."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(16, len(os.sched_getaffinity(0)))
