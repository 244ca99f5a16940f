"""Listed image files become a source: decoded on all cores and cached, or left on disk if they are large."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image

from simo_lightning.data.cache import Cached, fingerprint, read_cache, write_cache
from simo_lightning.data.folder import FolderImages, Listing, list_files, list_image_folder, named_as_broken
from simo_lightning.data.sources import DecodedFiles, LabelledImages, Split, name_list
from simo_lightning.preprocessing import FORMATS, Preprocessing

OnBroken = Literal["error", "skip"]
CHUNK = 1000  # images decoded by one task of a process
SAMPLE = 200  # files whose header is read for the sizes in the log


def load_image_folder(
    folder: str | Path,
    image_size: int = 224,
    max_memory: float = 4 * 2**30,
    workers: int | None = None,
    background: str = "white",
    max_value: float | None = None,
    class_level: int | None = None,
    on_broken: OnBroken = "error",
    split: Split = "train",
) -> LabelledImages | FolderImages:
    """Labelled images from a folder of class folders, decoded into memory and cached, or left on disk if too large.

    One log line says what was found and what is done to it: images and their formats, classes, sizes, the number of
    each conversion, and what was left out.

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
        class_level: Which folder above an image names its class; see :class:`ImageFolderPairDataModule`.
        on_broken: error: a file that does not decode ends the run, with its name; skip: it is counted and left out. To
            skip, images that stay on disk are all decoded once at start, and the result is cached.
        split: The training split must have two classes; the images of "unknown" need no class folders.

    Returns:
        The images, RGB, classes sorted by name.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no image.
        OSError: If a file or a folder cannot be read; the message names it.
        ValueError: If an argument is out of range, the training split has fewer than two classes, a link leads back to
            a folder that contains it, or a file is not an image; the message names it.
    """
    decoder = Preprocessing(image_size, background=background, max_value=max_value)
    one_class = "unknown" if split == "unknown" else None
    listing = list_image_folder(folder, decoder, class_level, on_broken == "skip", one_class)
    return read_images(listing, split, max_memory, workers, on_broken)


def read_images(
    listing: Listing,
    split: Split = "train",
    max_memory: float = 4 * 2**30,
    workers: int | None = None,
    on_broken: OnBroken = "error",
    cache_name: str = "",
    note: str = "",
) -> LabelledImages | FolderImages:
    """Decode the images of a listing into memory, or check them and leave them on disk.

    Args:
        listing: Files and classes.
        split: The training split must have two classes.
        max_memory: Decoded bytes above which the images stay on disk.
        workers: Processes that decode; None: one per core, at most 16, on Linux, else 1.
        on_broken: See :func:`load_image_folder`.
        cache_name: Part of the name of the cache, where the images of several splits share a folder.
        note: Words for the log about what is done to the images later.

    Returns:
        The images that can be read.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not an image and ``on_broken`` is "error", no image is left, or the training split has
            fewer than two classes; the message names it.
    """
    if on_broken not in ("error", "skip"):
        raise ValueError(f"on_broken must be 'error' or 'skip', got {on_broken!r}")
    listed = listing.images
    _check_classes(listed, split, listing)
    channels, (height, width) = listed.decoder.channels, listed.decoder.size
    in_memory = len(listed) * channels * height * width <= max_memory
    cached = None
    if in_memory or (on_broken == "skip" and not listed.checked):
        cached = _decoded(listed, in_memory, workers, on_broken, cache_name)
        listed = _without(listed, cached.broken)
        _check_classes(listed, split, listing)
    _report(split, listing, listed, cached, in_memory, note)
    if cached is None or not in_memory:
        return listed
    return DecodedFiles(cached.images, listed.labels, listed.class_names, listed)


def _check_classes(listed: FolderImages, split: Split, listing: Listing) -> None:
    least = 2 if split == "train" else 1
    if len(listed.class_names) < least:
        empty = f"; without an image: {name_list(listing.empty)}" if listing.empty else ""
        raise ValueError(
            f"{str(listed.root)!r} must hold at least {least} class{'es' * (least > 1)} of readable images for the "
            f"{split} split, found {len(listed.class_names)}: {listed.class_names}{empty}"
        )


def _decoded(listed: FolderImages, keep: bool, workers: int | None, on_broken: OnBroken, cache_name: str) -> Cached:
    """The images if ``keep``, and the files that do not decode; from the cache if it has them."""
    decoder = listed.decoder
    size = "x".join(map(str, dict.fromkeys(decoder.size)))
    name = f"{cache_name}{size}" if keep else f"{cache_name}checked"
    key = fingerprint(listed.root, listed.stored, decoder)
    shape = (decoder.channels, *decoder.size) if keep else None
    cached = read_cache(listed.root, name, key, len(listed), shape)
    if cached is None:
        cached = _decode_all(listed, keep, workers, skip=on_broken == "skip")
        write_cache(listed.root, name, key, cached)
    if cached.broken and on_broken == "error":  # found by an earlier run that skipped them
        raise ValueError(next(iter(cached.broken.values())))
    return cached


def _without(listed: FolderImages, broken: dict[str, str]) -> FolderImages:
    """The images without those that are broken, and without classes of which none is left."""
    if not broken:
        return listed
    kept = [index for index, name in enumerate(listed.names.tolist()) if name not in broken]
    classes = [listed.class_names[label] for label in listed.labels[kept].tolist()]
    return list_files(listed.root, listed.names[kept].tolist(), classes, listed.decoder)


@dataclass
class _Part:
    """What one task of a process returns."""

    images: np.ndarray  # uint8, those that decode
    changes: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)  # error of each file


def _decode_part(part: FolderImages, keep: bool, skip: bool) -> _Part:
    done = _Part(np.empty((len(part) if keep else 0, part.decoder.channels, *part.decoder.size), dtype=np.uint8))
    position = 0
    for index, name in enumerate(part.names.tolist()):
        try:
            image, changed = part.read(index, part.decoder.read)
        except ValueError as error:
            if not skip:
                raise
            done.broken[name] = str(error)
            continue
        if keep:
            done.images[position] = image
        position += 1
        done.changes.update(changed)
    done.images = done.images[:position]
    return done


def _decode_all(listed: FolderImages, keep: bool, workers: int | None, skip: bool) -> Cached:
    """Decode every image; on forked processes if there is more than one chunk.

    Threads are slower than one process: decoding a small image is mostly Python. Arrays return through pipes rather
    than shared memory, which is small in containers. A task is sent its own files alone.
    """
    starts = range(0, len(listed), CHUNK)
    workers = _default_workers() if workers is None else workers
    if len(listed) >= 20 * CHUNK:
        rank_zero_info(f"{str(listed.root)!r}: decoding {len(listed):,} images once, on {max(1, workers)} processes")
    images = torch.empty(len(listed) if keep else 0, listed.decoder.channels, *listed.decoder.size, dtype=torch.uint8)
    changes, broken, position = Counter[str](), dict[str, str](), 0
    parts = (listed.subset(torch.arange(start, min(start + CHUNK, len(listed)))) for start in starts)
    with warnings.catch_warnings(), ExitStack() as stack:
        parallel: Callable[..., Iterable[_Part]] = map
        if workers > 1 and len(starts) > 1:
            warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)  # the children run no torch code
            parallel = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))).map
        for part in parallel(partial(_decode_part, keep=keep, skip=skip), parts):
            if keep:
                images[position : position + len(part.images)] = torch.from_numpy(part.images)
            position += len(part.images)
            changes.update(part.changes)
            broken |= part.broken
    if broken and keep:
        images = images[:position].clone()  # a view would be saved whole
    return Cached(images, dict(changes), broken)


def _default_workers() -> int:
    """Cores that this process may use; 1 if a child process cannot be forked safely."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(16, len(os.sched_getaffinity(0)))


# ---- the line in the log


def _report(
    split: Split, listing: Listing, listed: FolderImages, cached: Cached | None, in_memory: bool, note: str
) -> None:
    """Log what was found and what is done to it; reads the headers of some files."""
    suffixes = Counter(os.path.splitext(name)[1].lower().lstrip(".") or "no suffix" for name in listed.names.tolist())
    images = f"{_counted(suffixes)} images" if len(suffixes) == 1 else f"{len(listed):,} images ({_counted(suffixes)})"
    parts = [f"{images} of {_classes(listed)}", *_sizes(listed)]
    size = len(listed) * listed.decoder.channels * listed.decoder.size[0] * listed.decoder.size[1]
    kept = (
        f"decoded into memory ({_memory(size)})" if in_memory else "decoded batch by batch (larger than max_memory_gib)"
    )
    parts.append(f"{kept}, {note}" if note else kept)
    if cached is None and not listed.checked:
        parts.append("not opened yet: a broken file ends the run when it is read (on_broken: skip checks all at start)")
    elif cached is not None and cached.changes:
        parts.append(f"converted: {_counted(cached.changes)}")
    left_out = what_was_left_out(listing, {} if cached is None else cached.broken)
    if left_out:
        parts.append(f"left out: {'; '.join(left_out)}")
    rank_zero_info(f"{split} split in {str(listed.root)!r}: {'; '.join(parts)}")


def _memory(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{-(-size // 2**20):,} MiB"


def _classes(listed: FolderImages) -> str:
    if len(listed.class_names) == 1:
        return f"1 class ({listed.class_names[0]!r})"
    counts = torch.bincount(listed.labels)
    few, many = int(counts.argmin()), int(counts.argmax())
    sizes = f"{counts[few]:,} ({listed.class_names[few]!r}) to {counts[many]:,} ({listed.class_names[many]!r}) each"
    if counts[few] == counts[many]:
        sizes = f"{counts[few]:,} each"
    return f"{len(listed.class_names):,} classes, {sizes}"


def _sizes(listed: FolderImages) -> list[str]:
    """Sizes of some of the files, from their headers, and what resizing does to them."""
    chosen = sorted({round(index) for index in np.linspace(0, len(listed) - 1, min(SAMPLE, len(listed)))})
    sides = np.array([_header(listed, index) for index in chosen])  # (files, 2)
    short, long = sides.min(1), sides.max(1)
    of = "" if len(chosen) == len(listed) else f" in {len(chosen)} of them"
    height, width = listed.decoder.size
    if (sides == (width, height)).all() and listed.decoder.crop_fraction == 1:
        return [f"{width} x {height} pixels{of}, used at this size"]
    hint = f" (enlarged: image_size {short.max()} is faster)" if 2 * short.max() <= min(height, width) else ""
    square = f"{_range(short)} pixels square{of}"
    found = f"shorter side {_range(short)} pixels, longer side {_range(long)}{of}"
    return [square if (short == long).all() else found, f"{_resizing(listed.decoder)}{hint}"]


def _header(listed: FolderImages, index: int) -> tuple[int, int]:
    """Width and height of a file as stored."""
    path = listed.path(index)
    try:
        with Image.open(listed.file(index), formats=FORMATS) as image:
            return image.size
    except OSError as error:
        if error.errno is not None:
            raise
        with named_as_broken(listed.advice):
            raise ValueError(f"{str(path)!r} does not decode as an image: {error}") from error


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _resizing(decoder: Preprocessing) -> str:
    height, width = decoder.size
    rule = {
        "crop": f"shorter side resized to {round(min(height, width) / decoder.crop_fraction)}, centre cropped",
        "squash": "both sides resized",
        "pad": f"longer side resized, padded with {decoder.background}",
    }[decoder.resize]
    return f"{rule} to {width} x {height}"


def what_was_left_out(listing: Listing, broken: Collection[str] = ()) -> list[str]:
    """Phrases for the log.

    Args:
        listing: Tells what is not in it.
        broken: Names of files that do not decode.
    """
    found = [_counted(listing.left_out)] if listing.left_out else []
    kinds = {"empty class folder": listing.empty, "missing file": listing.missing, "broken file": broken}
    return found + [
        f"{len(names):,} {kind}{'s' * (len(names) > 1)} ({name_list(names)})" for kind, names in kinds.items() if names
    ]


def _counted(counts: dict[str, int], most: int = 8) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[most:])
    return ", ".join(f"{count:,} {name}" for name, count in ranked[:most]) + (f", {rest:,} others" if rest else "")
