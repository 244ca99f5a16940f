"""``simo pack``."""

import os
import time
from pathlib import Path
from typing import Literal

from simo_lightning.data import pack_images, verify_packed
from simo_lightning.data.records import PackedFiles, list_records

POSITIONAL = {"source": None, "dest": "?"}


def run(
    source: str,
    dest: str | None = None,
    format: Literal["arrow", "litdata"] = "arrow",
    data_dir: str | None = None,
    class_level: int | None = None,
    on_broken: Literal["error", "skip"] = "error",
    shard_size: float | None = None,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> None:
    """Pack image files into a few large files.

    Args:
        source: Folder of class folders, with or without folders of splits; or a table (.csv or .parquet) with the
            columns path and label. With --verify and no DEST: the packed folder.
        dest: Folder to write. The same command continues one that was stopped (arrow), or must begin anew (litdata).
        format: arrow, a folder for ImageFolderPairDataModule that datasets.load_from_disk of Hugging Face opens;
            litdata, a folder for StreamPairDataModule, to be streamed from an object store.
        data_dir: Folder of the relative paths in a table. Default: that of the table.
        class_level: Which folder above an image names its class, as for --data.class_level.
        on_broken: error, a file that is not an image ends the command; skip, it is left out (arrow only).
        shard_size: Largest size of a file in MB. Default: 500 for arrow, 64 for litdata.
        workers: Processes. Default: one per core, at most 16.
        verify: Compare each file with its digest; without DEST do nothing else.
        progress: Show a progress bar.
    """
    if dest is not None:
        try:
            if format == "litdata":
                done = _write_stream(
                    source, dest, data_dir, class_level, on_broken, shard_size or 64, workers, progress
                )
            else:
                done = pack_images(
                    source, dest, format, data_dir, class_level, on_broken, shard_size or 500, workers, progress
                )
        except KeyboardInterrupt:
            print("stopped" if format == "litdata" else "stopped; the same command continues")
            raise
        for note in done.notes:
            print(note)
        rate = "all were there already"
        if done.written:
            rate = f"{done.written:,} in {done.seconds:.1f} s, {done.written / done.seconds:,.0f} images/s"
        print(f"{done.images:,} images in {done.path} ({done.files:,} files, {done.size / 1e6:,.1f} MB; {rate})")
    elif not verify:
        raise ValueError("dest must be given unless a packed folder is verified (--verify)")
    if verify:
        folder = source if dest is None else dest
        files, size = _verify(folder, workers, progress)
        print(f"{files:,} files of {size / 1e6:,.1f} MB in {folder} are as they were packed")


def _write_stream(
    source: str,
    dest: str,
    data_dir: str | None,
    class_level: int | None,
    on_broken: str,
    shard_size: float,
    workers: int | None,
    progress: bool,
) -> PackedFiles:
    from simo_lightning.streaming import Record, open_stream, write_stream

    if on_broken != "error":
        raise ValueError(f"on_broken must be 'error' for litdata, whose files are laid out first, got {on_broken!r}")
    path, target = Path(source).expanduser().absolute(), Path(dest).expanduser().absolute()
    images, class_names, notes = list_records(path, data_dir, class_level)
    root = path if path.is_dir() else Path(data_dir or path.parent).expanduser().absolute()
    records = [Record(os.path.relpath(one.file, root), one.label, one.split, one.coarse) for one in images]
    start = time.perf_counter()
    write_stream(
        records, class_names, target, root, chunk_bytes=round(shard_size * 1e6), workers=workers, progress=progress
    )
    files = [file for split in open_stream(target).splits.values() for file in split]
    seconds = time.perf_counter() - start
    return PackedFiles(target, len(records), len(files), sum(file.size for file in files), len(records), seconds, notes)


def _verify(folder: str, workers: int | None, progress: bool) -> tuple[int, int]:
    from simo_lightning.streaming import verify_stream

    stream = Path(folder, "stream.json").expanduser().is_file()
    return (verify_stream if stream else verify_packed)(folder, workers, progress)
