"""simo pack on generated images: its speed and memory, and packed images against the folder that they come from."""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import Row, in_process, memory_mib
from benchmarks.timing_decode import make_photographs
from benchmarks.timing_embed import as_the_command, make_links, timed
from simo_lightning.data import ImageFolderPairDataModule, PackedFiles, pack_images

BATCH, ROUNDS = 64, 7


def pack_case(folder: str, dest: str, images: int, workers: int) -> Row:
    """The whole of ``pack_images``, with the peak memory of its process and of its largest worker."""
    as_the_command()
    done: list[PackedFiles] = []
    row = timed("pack", images, lambda: done.append(pack_images(folder, dest, workers=workers)))
    assert done[0].images == images
    row["pack MB/s"] = done[0].size / 1e6 * row["pack"] / images
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"mb": done[0].size / 1e6, **row, "peak_mib": memory_mib(), "worker_peak_mib": worker}


def images_of(folder: str, size: int) -> Any:
    """The training images as a data module opens them, none in memory."""
    data = ImageFolderPairDataModule(folder, image_size=size, max_memory_gib=0, mean=[0.5] * 3, std=[0.25] * 3)
    return data.load("train")


def open_case(folder: str, name: str, size: int) -> Row:
    """Seconds until labels and names are known, and the memory that they take, without that of the imports."""
    images_of(str(Path(folder).parent / "one"), size)
    import datasets  # noqa: F401  # as for the packed images

    before, start = memory_mib("RssAnon"), time.perf_counter()
    source = images_of(folder, size)
    found = {f"{name} open s": time.perf_counter() - start, f"{name} open MiB": memory_mib("RssAnon") - before}
    assert len(source) == len(source.labels)
    return found


def read_case(folders: dict[str, str], size: int, images: int) -> Row:
    """Random images one by one, decoded and as bytes alone, from the folder and packed in turn, on one thread."""
    as_the_command()
    sources = {name: images_of(folder, size) for name, folder in folders.items()}
    indices = np.random.default_rng(0).integers(0, len(sources["folder"]), images).tolist()

    def decoded(source: Any, chosen: Sequence[int]) -> None:
        for start in range(0, len(chosen), BATCH):
            source.__getitems__(chosen[start : start + BATCH])

    def stored(source: Any, chosen: Sequence[int]) -> None:
        for index in chosen:
            file = source.file(index)
            _ = file.read_bytes() if isinstance(file, Path) else file.read()

    row: Row = {}
    works: dict[str, Callable[[Any, Sequence[int]], None]] = {"decode": decoded, "bytes": stored}
    for what, work in works.items():
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for number in range(ROUNDS + 1):
            for name in list(sources)[:: 1 if number % 2 else -1]:
                start = time.process_time()
                work(sources[name], indices)
                seconds[name].append(time.process_time() - start)
        seconds = {name: values[1:] for name, values in seconds.items()}  # without the first, which warms up
        row |= {f"{name} {what} CPU us": 1e6 * statistics.median(own) / images for name, own in seconds.items()}
        ratios = [one / other for one, other in zip(seconds["folder"], seconds["packed"], strict=True)]
        row[f"{what}: folder / packed"] = statistics.median(ratios)
    return row


def pack(given: argparse.Namespace) -> list[Row]:
    """Photographs of 256 pixels, each a file of its own, and very many tiny images, hard links to 64 files."""
    photographs, tiny, read = (200, 3_000, 128) if given.quick else (4_000, 300_000, 2_048)
    workers, rows = min(16, os.cpu_count() or 1), []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_photographs(base / "one", 2, 8, 8, classes=2)
        make_photographs(base / "256", photographs, 256, 256, classes=10)
        make_photographs(base / "source", 64, 8, 8)
        make_links(base / "8", sorted((base / "source").glob("*/*.jpg")), tiny)
        for size, images in ((256, photographs), (8, tiny)):
            folder, dest = str(base / f"{size}"), str(base / f"packed{size}")
            row: Row = {"pixels": size, "images": images, "workers": workers}
            row |= in_process(pack_case, folder=folder, dest=dest, images=images, workers=workers)
            for kind, path in (("folder", folder), ("packed", dest)):
                row |= in_process(open_case, folder=path, name=kind, size=size)
            row |= in_process(read_case, folders={"folder": folder, "packed": dest}, size=size, images=read)
            rows.append(row)
            print(row, flush=True)
    return rows
