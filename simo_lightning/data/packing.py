"""Image files packed into a few large files, with their labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from simo_lightning.data.arrow import size_and_digest, write_arrow
from simo_lightning.data.loader import default_workers
from simo_lightning.data.packed import complete_info
from simo_lightning.data.reading import OnBroken
from simo_lightning.data.records import PackedFiles, list_records
from simo_lightning.data.sources import name_list

# Writers by format, called as write_arrow is
FORMATS: dict[str, Callable[..., PackedFiles]] = {"arrow": write_arrow}


def pack_images(
    source: str | Path,
    dest: str | Path,
    format: str = "arrow",
    data_dir: str | Path | None = None,
    class_level: int | None = None,
    on_broken: OnBroken = "error",
    shard_size: float = 500.0,
    workers: int | None = None,
    progress: bool = False,
) -> PackedFiles:
    """Pack image files into a few large files.

    They hold the original bytes in the order in which :class:`ImageFolderPairDataModule` lists the images. Given the
    packed folder in place of ``source``, it trains the same. Each image is decoded once, to check it. If the call is
    stopped, the same one keeps the files that are complete and makes the others; the result has the same bytes.

    Args:
        source: Folder of class folders, with or without folders of splits; or a manifest (.csv or .parquet).
        dest: Folder to write: new, empty, or of the same call before.
        format: "arrow": a folder that ``datasets.load_from_disk`` of Hugging Face opens.
        data_dir: Folder of the relative paths of a manifest; None: that of the manifest.
        class_level: Which folder above an image names its class; see :class:`ImageFolderPairDataModule`.
        on_broken: "error": a file that is not an image ends the call, with its name. "skip": it is left out.
        shard_size: Images of a file in MB (10^6 bytes); a larger image has a file of its own.
        workers: Processes that read and write; None: one per core, at most 16.
        progress: Whether to show a progress bar.

    Returns:
        What was done.

    Raises:
        FileExistsError: If ``dest`` holds something else, or was packed from other images or with other arguments.
        FileNotFoundError: If there is no such source, or no image in it.
        ModuleNotFoundError: If the library of the format is not installed.
        OSError: If a file cannot be read or written; the message names it.
        ValueError: If an argument is out of range, a file is not an image and ``on_broken`` is "error", ``dest`` was
            begun with other images or arguments, or another process writes to it.
    """
    source, dest = Path(source).expanduser().absolute(), Path(dest).expanduser().absolute()
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if on_broken not in ("error", "skip"):
        raise ValueError(f"on_broken must be 'error' or 'skip', got {on_broken!r}")
    if not 0 < shard_size < math.inf:
        raise ValueError(f"shard_size must be positive and finite, got {shard_size}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if source.is_dir() and dest.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"dest must lie outside of the folder that is packed, got {str(dest)!r}")
    records, class_names, notes = list_records(source, data_dir, class_level, on_broken == "skip")
    options = {"class_level": class_level, "on_broken": on_broken, "shard_size": shard_size}
    done = FORMATS[format](records, class_names, dest, workers or default_workers() or 1, options, progress)
    return done._replace(notes=[*notes, *done.notes])


def verify_packed(folder: str | Path, workers: int | None = None, progress: bool = False) -> tuple[int, int]:
    """Compare each file of a packed folder with its digest.

    Args:
        folder: That :func:`pack_images` has written.
        workers: Files that are read at a time; None: one per core, at most 16.
        progress: Whether to show a progress bar.

    Returns:
        Number of files and their bytes.

    Raises:
        ValueError: If packing has not ended, or files are missing or have changed; the message names them.
    """
    root = Path(folder).expanduser().absolute()
    return verify_files(root, complete_info(root)["files"], workers, progress)


def verify_files(
    root: Path, files: dict[str, dict[str, Any]], workers: int | None = None, progress: bool = False
) -> tuple[int, int]:
    """Compare files with their sizes and SHA-256 digests.

    Args:
        root: Folder.
        files: "bytes" and "sha256" of each file, by its name relative to ``root``.
        workers: As for :func:`verify_packed`.
        progress: As for :func:`verify_packed`.

    Returns:
        Number of files and their bytes.

    Raises:
        ValueError: If files are missing or have changed; the message names them.
    """
    changed = []
    size = sum(file["bytes"] for file in files.values())
    with tqdm(total=size, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True) as bar:

        def check(name: str) -> None:
            path = root / name
            found = size_and_digest(path, bar.update) if path.is_file() else {}
            if found != {key: files[name][key] for key in ("bytes", "sha256")}:
                changed.append(name)

        with ThreadPoolExecutor(workers or default_workers() or 1) as pool:  # hashing releases the interpreter's lock
            list(pool.map(check, files))
    if changed:
        raise ValueError(
            f"{len(changed):,} of {len(files):,} files in {str(root)!r} are missing or have changed: "
            f"{name_list(changed)}"
        )
    return len(files), size
