"""Write labelled image files as chunks of litdata, arranged so that balanced batches need few chunks at a time."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simo_lightning.data.loader import default_workers
from simo_lightning.data.records import checked_bytes
from simo_lightning.data.sources import Split, name_list
from simo_lightning.extras import import_extra

STREAM, INDEX, LABELS = "stream.json", "index.json", "labels.npy"
LAYOUT = 1  # increase when the files change in a way that older versions cannot read
MOST_BYTES = 2**32 - 1  # a chunk holds the offsets of its items as uint32


@dataclass(frozen=True, slots=True)
class Record:
    """An image file of a stream.

    Args:
        path: The file, relative to the argument ``root`` or absolute.
        label: Index of its class in ``class_names``.
        split: One of the package's splits, such as "train".
        coarse: Name of the coarse class of its class; None: there is none.
    """

    path: str | Path
    label: int
    split: Split = "train"
    coarse: str | None = None


def write_stream(
    records: Iterable[Record],
    class_names: Sequence[str],
    destination: str | Path,
    root: str | Path = ".",
    bundle_size: int = 32,
    chunk_bytes: int = 64 * 2**20,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> None:
    """Write image files as a stream: litdata's chunks, one folder for each split, and one file that describes them.

    The images of each class are shuffled and cut into bundles of ``bundle_size``; what remains joins the last one. The
    bundles of all classes are then laid out such that those of each class are spread evenly over the split, and chunks
    are filled with whole bundles. A few neighbouring chunks thus hold many classes, and many images of each.

    - ``DESTINATION/stream.json``: class names, coarse classes, and the size and SHA-256 of every other file.
    - ``DESTINATION/<split>/index.json`` and ``chunk-0-<number>.bin``: a data set of litdata, which
      ``litdata.StreamingDataset("DESTINATION/<split>")`` reads: tuples of the unchanged bytes of the image file, the
      label and the path in UTF-8.
    - ``DESTINATION/<split>/labels.npy``: int32, the label of every image in this order.

    The files depend on the records, the images and the arguments alone, not on ``workers``. ``stream.json`` is written
    last: without it a stream is not complete.

    Args:
        records: The images: path, label, split and coarse class.
        class_names: One name per class.
        destination: Folder, new or empty. To stream from an object store, copy it there as it is.
        root: Folder to which paths are relative.
        bundle_size: Images of a class that lie together. Training reads least if this is a multiple of its K.
        chunk_bytes: A chunk is closed before it exceeds this size, unless a single bundle does.
        seed: Of the arrangement, non-negative.
        workers: Processes that read and write; null: one for each core, at most 16.
        progress: Whether to show a progress bar.
        check: Whether to decode each image once, so that a file that is not an image is found now.

    Raises:
        FileExistsError: If ``destination`` is not empty.
        OSError: If a file cannot be read or written; the message names it.
        ModuleNotFoundError: If litdata is missing (extra ``stream``).
        ValueError: If there is no record, a label is out of range, a class has several coarse classes, or another
            argument is out of range, or a file does not decode.
    """
    if bundle_size < 2:
        raise ValueError(f"bundle_size must be at least 2 images, got {bundle_size}")
    if not 0 < chunk_bytes <= MOST_BYTES:
        raise ValueError(f"chunk_bytes must lie in 1..{MOST_BYTES}, got {chunk_bytes}")
    if seed < 0:
        raise ValueError(f"seed must be non-negative, got {seed}")
    import_extra("litdata.streaming.writer")
    by_split: dict[Split, list[Record]] = {}
    for record in records:
        if not 0 <= record.label < len(class_names):
            raise ValueError(
                f"label must lie in 0..{len(class_names) - 1}, an index into class_names, got {record.label} for "
                f"{str(record.path)!r}"
            )
        by_split.setdefault(record.split, []).append(record)
    if not by_split:
        raise ValueError("records must hold at least one image, got none")
    described: dict[str, Any] = {
        "layout": LAYOUT,
        "class_names": list(class_names),
        "coarse": _coarse(by_split.values(), class_names),
        "bundle_size": bundle_size,
        "splits": {},
    }
    target = Path(destination).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise FileExistsError(f"destination must be a new or empty folder, got {str(target)!r}, which is not empty")
    for split, images in by_split.items():
        labels = np.array([record.label for record in images], dtype=np.int32)
        order, bundles = arrange(labels, bundle_size, np.random.default_rng([seed, *split.encode()]))
        paths = [str(images[number].path) for number in order]
        write = partial(_write_split, paths, labels[order], bundles, Path(root), target / split, chunk_bytes, check)
        described["splits"][split] = write(workers, tqdm(total=len(paths), desc=split, disable=not progress))
    _write(target / STREAM, json.dumps(described, indent=1, ensure_ascii=False).encode())


def arrange(labels: np.ndarray, bundle_size: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An order of images in which bundles of each class are spread evenly.

    Args:
        labels: Class index of each image, ``(N,)``.
        bundle_size: Images of a bundle; the last one of a class also has the remainder.
        random: Draws the order.

    Returns:
        The order, int64 ``(N,)``, and the number of the bundle of each place in it, ascending, ``(N,)``. Bundle j of
        the n of a class lies at a random place in the j-th n-th of the order.

    Example:
        >>> order, bundles = arrange(np.array([0, 0, 0, 0, 1, 1, 1]), 2, np.random.default_rng(0))
        >>> np.bincount(bundles).tolist(), sorted(order.tolist())
        ([2, 3, 2], [0, 1, 2, 3, 4, 5, 6])
    """
    counts = np.bincount(labels)
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    per_class = np.maximum(counts // bundle_size, 1)  # (C,) bundles
    number = np.minimum(within // bundle_size, np.repeat(per_class, counts) - 1)  # of each image's bundle in its class
    bundle = np.repeat(np.cumsum(per_class) - per_class, counts) + number
    owner = np.repeat(np.arange(len(counts)), per_class)  # class of each bundle
    place = (np.arange(len(owner)) - (np.cumsum(per_class) - per_class)[owner] + random.random(len(owner))) / per_class[
        owner
    ]
    rank = np.empty(len(owner), dtype=np.int64)
    rank[np.argsort(place, kind="stable")] = np.arange(len(owner))
    order = np.argsort(rank[bundle], kind="stable")
    _, bundles = np.unique(rank[bundle][order], return_inverse=True)
    return by_class[order], bundles


def _coarse(splits: Iterable[Iterable[Record]], class_names: Sequence[str]) -> dict[str, list[str]] | None:
    """Classes of each coarse class; None if there are none."""
    found: dict[int, str | None] = {}
    for record in (record for records in splits for record in records):
        if found.setdefault(record.label, record.coarse) != record.coarse:
            both = name_list({str(found[record.label]), str(record.coarse)})
            raise ValueError(f"coarse must be the same for all images of a class, got {both} for {record.path!r}")
    joined: dict[str, list[str]] = {}
    for label, coarse in sorted(found.items()):
        if coarse is not None:
            joined.setdefault(coarse, []).append(class_names[label])
    return joined or None


def _write_split(
    paths: list[str],
    labels: np.ndarray,
    bundles: np.ndarray,
    root: Path,
    folder: Path,
    chunk_bytes: int,
    check: bool,
    workers: int | None,
    bar: Any,
) -> dict[str, Any]:
    """Write one split; return what ``stream.json`` says of it."""
    folder.mkdir()
    sizes = np.array([os.stat(root / path).st_size for path in paths], dtype=np.int64)
    sizes += np.array([24 + len(os.fsencode(path)) for path in paths])  # offset, three lengths and the label
    tasks = [
        (number, paths[part], labels[part].tolist()) for number, part in enumerate(_chunks(sizes, bundles, chunk_bytes))
    ]
    chunks: list[dict[str, Any]] = []
    workers = default_workers() if workers is None else workers
    with warnings.catch_warnings(), ExitStack() as stack, bar:
        parallel: Callable[..., Iterable[Any]] = map
        if workers > 1 and len(tasks) > 1:
            warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)  # the children run no torch code
            parallel = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))).map
        for written in parallel(partial(_write_chunk, root, folder, check), tasks):
            chunks.append(written)
            bar.update(written["chunk_size"])
    np.save(folder / LABELS, labels, allow_pickle=False)
    files = {chunk["filename"]: {"bytes": chunk["chunk_bytes"], "sha256": chunk.pop("sha256")} for chunk in chunks}
    configs = [chunk.pop("config") for chunk in chunks]
    config = configs[0]
    stamp = hashlib.sha256("".join(file["sha256"] for file in files.values()).encode()).hexdigest()
    config["chunk_size"] = None  # which only told the writer when to close a chunk
    index = {"chunks": chunks, "config": config, "updated_at": stamp}  # litdata names its cache by it
    _write(folder / INDEX, json.dumps(index, sort_keys=True).encode())
    for name in (INDEX, LABELS):
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"images": len(paths), "files": files}


def _chunks(sizes: np.ndarray, bundles: np.ndarray, chunk_bytes: int) -> Iterator[slice]:
    """Parts of whole bundles, each of at most ``chunk_bytes`` or one bundle."""
    begins = np.flatnonzero(np.diff(bundles, prepend=-1))
    start, filled = 0, 4 + 4  # number of items, and one offset more than items
    for begin, size in zip(begins.tolist(), np.add.reduceat(sizes, begins).tolist(), strict=True):
        if begin > start and filled + size > chunk_bytes:
            yield slice(start, begin)
            start, filled = begin, 4 + 4
        filled += size
        if filled > MOST_BYTES:
            raise ValueError(f"a bundle must be smaller than 4 GiB, got {filled:,} bytes: use a smaller bundle_size")
    yield slice(start, len(sizes))


def _write_chunk(root: Path, folder: Path, check: bool, task: tuple[int, list[str], list[int]]) -> dict[str, Any]:
    """Write one chunk by litdata's writer; return its entry in the index, with litdata's config and the SHA-256."""
    from litdata.streaming.writer import BinaryWriter

    number, paths, labels = task
    with tempfile.TemporaryDirectory(dir=folder) as own:
        writer = BinaryWriter(own, chunk_size=len(paths))
        for place, (path, label) in enumerate(zip(paths, labels, strict=True)):
            content = checked_bytes(root / path, "remove it") if check else (root / path).read_bytes()
            writer[place] = (content, label, os.fsencode(path))
        (written,) = writer.done()
        (described,) = Path(own).glob("*.json")
        index = json.loads(described.read_bytes())
        (info,) = index["chunks"]
        info["filename"] = f"chunk-0-{number}.bin"
        os.replace(written, folder / info["filename"])
    digest = hashlib.sha256((folder / info["filename"]).read_bytes()).hexdigest()
    return {**info, "config": index["config"], "sha256": digest}


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
