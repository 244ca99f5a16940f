"""Folders of class folders: listed, checked, decoded on every core, cached, or left on disk where they are large."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from simo_lightning.data.cache import fingerprint, read_cache, write_cache
from simo_lightning.data.sources import LabelledImages

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
DROPPINGS = frozenset({"thumbs.db", "desktop.ini"})  # what Windows leaves behind; it hides them without a dot


def decode_image(path: str | Path, image_size: int) -> np.ndarray:
    """Read one image as RGB, its shorter side resized and its centre cropped to a square where the size differs.

    Args:
        path: File of any format that Pillow reads.
        image_size: Side of the square in pixels.

    Returns:
        uint8 ``(3, image_size, image_size)``.

    Raises:
        ValueError: If the file is no image, or a truncated one; it is named.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (image_size, image_size))  # a JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8
            pixels = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{str(path)!r} does not decode as an image: {error}") from error
    if pixels.size != (image_size, image_size):
        width, height = pixels.size
        scale = image_size / min(width, height)
        width, height = max(image_size, round(width * scale)), max(image_size, round(height * scale))
        left, top = (width - image_size) // 2, (height - image_size) // 2
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        pixels = pixels.crop((left, top, left + image_size, top + image_size))
    return np.asarray(pixels).transpose(2, 0, 1)


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Labelled images that stay on disk and are decoded batch by batch, in the loader's workers.

    Args:
        root: Folder that ``names`` start from.
        names: File of each image, relative to ``root``.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        image_size: Side of the decoded square in pixels.
    """

    root: Path
    names: np.ndarray  # of str: one block of memory, so that workers share it
    labels: Tensor
    class_names: list[str]
    image_size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.decode(indices)), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def decode(self, indices: Sequence[int]) -> np.ndarray:
        """Decode the images at ``indices`` into uint8 ``(len(indices), 3, image_size, image_size)``."""
        images = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.uint8)
        for row, index in enumerate(indices):
            images[row] = decode_image(self.root / self.names[index], self.image_size)
        return images

    def subset(self, indices: Tensor) -> FolderImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return FolderImages(
            self.root, self.names[indices.numpy()], self.labels[indices], self.class_names, self.image_size
        )


def list_image_folder(folder: str | Path, image_size: int) -> FolderImages:
    """List ``folder/<class>/**/*`` without decoding: classes and files in order of their names, hidden ones skipped.

    Raises:
        FileNotFoundError: If ``folder`` is no folder, or holds fewer than two class folders.
        ValueError: If a class folder holds no image, or a file with a suffix that is not an image's.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root.absolute())!r} is no folder; it should hold one folder of images per class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise FileNotFoundError(
            f"{str(root.absolute())!r} must hold at least 2 class folders of images, found {len(classes)}: {classes}"
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_image_names(root, name))
        if not found:
            raise ValueError(f"class folder {str(root / name)!r} holds no image")
        names += found
        labels += [label] * len(found)
    return FolderImages(root, np.array(names), torch.tensor(labels), classes, image_size)


def _image_names(root: Path, class_name: str) -> list[str]:
    """Relative names of the images under one class folder, at any depth."""
    names = []
    for parent, folders, files in os.walk(root / class_name, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(parent, root)
        for name in files:
            if name.startswith(".") or name.lower() in DROPPINGS:
                continue
            path = os.path.join(parent, name)
            if os.path.splitext(name)[1].lower() not in SUFFIXES:
                raise ValueError(f"{path!r} is no image (suffixes read: {', '.join(sorted(SUFFIXES))}); take it away")
            names.append(os.path.join(inside, name))
    return names


def load_image_folder(
    folder: str | Path, image_size: int, max_memory: int = 4 * 2**30, workers: int | None = None
) -> LabelledImages | FolderImages:
    """Labelled images from a folder of class folders, decoded into memory and cached, or left on disk if too large.

    The cache is one hidden file in ``folder``, or in the user's cache folder where that cannot be written, and holds
    for the exact names, sizes and times of change of the files. A change of any of them decodes all again.

    Args:
        folder: Holds ``<class>/**/*``, JPEG, PNG and whatever else Pillow reads.
        image_size: Side in pixels; other sizes are resized by the shorter side and centre-cropped.
        max_memory: Decoded bytes (``N * 3 * image_size**2``) above which the images stay on disk.
        workers: Processes that decode; ``None`` = one per core where processes can be forked.

    Returns:
        The images, RGB, classes in the order of their names.

    Raises:
        FileNotFoundError: If there is no such folder, or it has fewer than two class folders.
        ValueError: If ``image_size`` is not positive, a class folder is empty, or a file is no image: it is named.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    listed = list_image_folder(folder, image_size)
    if len(listed) * 3 * image_size**2 > max_memory:
        return listed
    key = fingerprint(listed.root, listed.names, image_size)
    images = read_cache(listed.root, image_size, key, len(listed))
    if images is None:
        images = _decode_all(listed, workers)
        write_cache(listed.root, image_size, key, images)
    return LabelledImages(images, listed.labels, listed.class_names)


def _decode_all(listed: FolderImages, workers: int | None, chunk: int = 1000) -> Tensor:
    """Decode every image, uint8 ``(N, 3, S, S)``; on forked processes where that is possible and worth while.

    Threads are slower than one process here: reading a small image is mostly Python. Arrays come back through pipes,
    not shared memory, which containers keep small.
    """
    chunks = [range(start, min(start + chunk, len(listed))) for start in range(0, len(listed), chunk)]
    images = torch.empty(len(listed), 3, listed.image_size, listed.image_size, dtype=torch.uint8)
    workers = _default_workers() if workers is None else workers
    if workers < 2 or len(chunks) < 2:
        for rows in chunks:
            images[rows.start : rows.stop] = torch.from_numpy(listed.decode(rows))
        return images
    with warnings.catch_warnings(), ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)  # the children run no torch code
        for rows, decoded in zip(chunks, pool.map(listed.decode, chunks), strict=True):
            images[rows.start : rows.stop] = torch.from_numpy(decoded)
    return images


def _default_workers() -> int:
    """Cores this process may use; 1 where a child process cannot be forked safely."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(16, len(os.sched_getaffinity(0)))
