"""Records of images as Arrow files, the form in which ``datasets.Dataset.save_to_disk`` of Hugging Face writes them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from simo_lightning.data.lock import only_one_process
from simo_lightning.data.packed import FORMAT, INFO, SPLITS, read_info
from simo_lightning.data.reading import OnBroken
from simo_lightning.data.records import PackedFiles, Record, checked_bytes
from simo_lightning.data.sources import name_list
from simo_lightning.extras import import_extra

BATCH_BYTES, BATCH_ROWS = 2**24, 1000  # at which a record batch is complete: what a process holds in memory
LOCK = ".lock"
CHUNK = 2**20  # bytes that are hashed at a time


class _Shard(NamedTuple):
    """One file of images.

    Attributes:
        name: Relative to the packed folder.
        records: Its images.
    """

    name: str
    records: Sequence[Record]


def write_arrow(
    records: Sequence[Record],
    class_names: Sequence[str],
    dest: Path,
    workers: int,
    options: dict[str, Any],
    progress: bool = False,
) -> PackedFiles:
    """Write a folder that ``datasets.load_from_disk`` opens as a ``DatasetDict``.

    Each split has the columns image (the bytes of the file), path, label (ClassLabel) and, if there are coarse classes,
    coarse (ClassLabel). ``pack.json`` holds the options, and size and SHA-256 digest of each other file.

    Args:
        records: Images, split by split.
        class_names: Names of the classes.
        dest: Folder.
        workers: Processes.
        options: "shard_size" in MB and "on_broken", and others that are stored.
        progress: Whether to show a progress bar.

    Returns:
        What was done.

    Raises:
        FileExistsError: As :func:`pack_images`.
        OSError: As :func:`pack_images`.
        ValueError: As :func:`pack_images`.
    """
    datasets = import_extra("datasets")
    features = {
        "image": datasets.Image(),
        "path": datasets.Value("string"),
        "label": datasets.ClassLabel(names=list(class_names)),
    }
    coarse_names = sorted({record.coarse for record in records if record.coarse is not None})
    if coarse_names:
        features["coarse"] = datasets.ClassLabel(names=coarse_names)
    shards, digest = _divide(records, round(options["shard_size"] * 1e6))
    info = {"format": FORMAT, **options, "images": len(records), "images_sha256": digest}
    _check_dest(dest)
    dest.mkdir(parents=True, exist_ok=True)
    with only_one_process(dest / LOCK, f"dest {str(dest)!r}"):
        _begin(dest, info)
        missing = [shard for shard in shards if shard.name not in _found(dest, shards)]
        start = time.perf_counter()
        _write_missing(shards, missing, dest, datasets.Features(features), options["on_broken"], workers, progress)
        seconds = time.perf_counter() - start
        files = _found(dest, shards)
        _complete(dest, info, files, datasets.Features(features))
    broken = [name for file in files.values() for name in file["broken"]]
    return PackedFiles(
        dest,
        images=sum(file["images"] for file in files.values()),
        files=len(files),
        size=sum(file["bytes"] for file in files.values()),
        written=sum(files[shard.name]["images"] for shard in missing),
        seconds=seconds,
        notes=[f"left out {len(broken):,} broken files ({name_list(broken)})"] if broken else [],
    )


def _divide(records: Sequence[Record], size: int) -> tuple[list[_Shard], str]:
    """Files of at most ``size`` bytes of images each, and a digest of all that packing depends on."""
    digest, shards = hashlib.sha256(), []
    for split, group in groupby(records, key=lambda record: record.split):
        parts: list[list[Record]] = []
        held = size
        for record in group:
            status = os.stat(record.file)
            line = f"{(*record[1:], status.st_size, status.st_mtime_ns)}\n"
            try:
                record.path.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"names of files must be UTF-8, got {os.fsencode(record.file)!r}") from error
            digest.update(line.encode())
            if held + status.st_size > size:
                parts.append([])
                held = 0
            parts[-1].append(record)
            held += status.st_size
        shards += [
            _Shard(f"{split}/data-{number:05d}-of-{len(parts):05d}.arrow", part) for number, part in enumerate(parts)
        ]
    return shards, digest.hexdigest()


def _check_dest(dest: Path) -> None:
    """Refuse a folder that holds something else."""
    if dest.exists() and not dest.is_dir():
        raise FileExistsError(f"dest must be a folder, got the file {str(dest)!r}")
    if dest.is_dir() and not (dest / INFO).is_file():
        others = sorted({path.name for path in dest.iterdir()} - {LOCK})
        if others:
            raise FileExistsError(
                f"dest must be new, empty or packed before, but {str(dest)!r} holds {name_list(others)}"
            )


def _begin(dest: Path, info: dict[str, Any]) -> None:
    """Write the options, or compare them with those of an earlier call, and remove what it left half-written."""
    if not (dest / INFO).is_file():
        _write_json(dest / INFO, info)
    old = read_info(dest)
    for key, value in info.items():
        if old.get(key) != value:
            other = "other images" if key == "images_sha256" else f"{key} {old.get(key)}, not {value}"
            if "files" in old:
                raise FileExistsError(f"dest {str(dest)!r} was packed with {other}: remove it, or give another name")
            raise ValueError(
                f"dest {str(dest)!r} was begun with {other}: finish it with the same arguments, or remove it to start "
                "anew"
            )
    for pattern in (".*.part", "*/.*.part"):
        for left in dest.glob(pattern):
            left.unlink()


def _note(dest: Path, name: str) -> Path:
    """File beside a file of images that tells what it holds, until ``pack.json`` does."""
    path = dest / name
    return path.with_name(f".{path.name}.json")


def _found(dest: Path, shards: Sequence[_Shard]) -> dict[str, dict[str, Any]]:
    """What the complete files of images hold, by their names."""
    stored, found = read_info(dest).get("files", {}), {}
    for name in (shard.name for shard in shards):
        note = json.loads(_note(dest, name).read_text()) if _note(dest, name).is_file() else stored.get(name)
        if note and (dest / name).is_file() and (dest / name).stat().st_size == note["bytes"]:
            found[name] = note
    return found


def _write_missing(
    shards: Sequence[_Shard],
    missing: Sequence[_Shard],
    dest: Path,
    features: Any,
    on_broken: OnBroken,
    workers: int,
    progress: bool,
) -> None:
    """Write files of images in several processes."""
    total, left = (sum(len(shard.records) for shard in some) for some in (shards, missing))
    context = mp.get_context("fork" if sys.platform == "linux" else "spawn")
    counter, stop = context.Value("q", 0), context.Event()
    bar = tqdm(
        total=total, initial=total - left, unit=" images", disable=not progress, smoothing=0.05, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60.0,
    )  # fmt: skip
    for split in dict.fromkeys(shard.records[0].split for shard in missing):
        (dest / split).mkdir(exist_ok=True)
    with warnings.catch_warnings(), bar:
        warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)  # the children run no torch code
        pool = ProcessPoolExecutor(max(1, min(workers, len(missing))), context, _start_worker, (counter, stop))
        try:
            coarse = {name: label for label, name in enumerate(getattr(features.get("coarse"), "names", []))}
            given = {"schema": features.arrow_schema, "coarse": coarse, "skip": on_broken == "skip"}
            write = partial(_write_shard, dest=dest, **given)
            shown = 0
            running: set[Future[None]] = {pool.submit(write, shard) for shard in missing}
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                counted = counter.value
                bar.update(counted - shown)
                shown = counted
                for each in done:
                    each.result()
        except ValueError as error:  # raised here, not by the pool: the command then prints one line
            raise ValueError(str(error)) from error
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that packs was killed, perhaps for want of memory: use fewer workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


_counter: Any = None  # images that the processes have written
_stop: Any = None  # event: another process has failed


def _start_worker(counter: Any, stop: Any) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed, which would wait for work for ever."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Hashed:
    """A file that is written, and its digest."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_shard(shard: _Shard, dest: Path, schema: Any, coarse: dict[str, int], skip: bool) -> None:
    """Write one file of images under another name, then a note of what it holds, then rename the file."""
    import pyarrow as pa

    path, broken = dest / shard.name, dict[str, str]()
    partly = path.with_name(f".{path.name}.{os.getpid()}.part")
    images = 0
    try:
        with partly.open("xb") as file:
            hashed = _Hashed(file)
            with pa.ipc.new_stream(hashed, schema) as stream:
                for rows in _batches(shard.records, coarse, skip, broken):
                    stream.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                    images += len(rows)
            file.flush()
            os.fsync(file.fileno())
            note = {"bytes": file.tell(), "sha256": hashed.digest.hexdigest(), "images": images, "broken": broken}
        _write_json(_note(dest, shard.name), note)
        partly.replace(path)
    except OSError as error:
        if error.filename is not None or error.errno is None:  # of an image
            raise
        raise OSError(error.errno, f"{error.strerror}; the same command goes on", str(path)) from error
    finally:
        partly.unlink(missing_ok=True)


def _batches(
    records: Sequence[Record], coarse: dict[str, int], skip: bool, broken: dict[str, str]
) -> Iterator[list[dict[str, Any]]]:
    """Rows of one record batch after the other; adds those that do not decode to ``broken``."""
    rows: list[dict[str, Any]] = []
    held = 0
    for record in records:
        if _stop.is_set():
            raise RuntimeError("stopped, since another process has failed")
        try:
            content = checked_bytes(record.file)
        except ValueError as error:
            if not skip:
                raise
            broken[record.path] = str(error)
        else:
            image = {"bytes": content, "path": None}
            above = None if record.coarse is None else coarse[record.coarse]
            rows.append({"image": image, "path": record.path, "label": record.label, "coarse": above})
            held += len(content)
        with _counter.get_lock():
            _counter.value += 1
        if held >= BATCH_BYTES or len(rows) == BATCH_ROWS:
            yield rows
            rows, held = [], 0
    if rows:
        yield rows


def _complete(dest: Path, info: dict[str, Any], files: dict[str, dict[str, Any]], features: Any) -> None:
    """Write the files that describe the others; that without which a folder is no ``DatasetDict`` is the last."""
    import datasets

    described = dict(files)
    splits = list(dict.fromkeys(name.split("/")[0] for name in files))
    for split in splits:
        names = [name.split("/")[1] for name in files if name.startswith(f"{split}/")]
        state = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": info["images_sha256"][:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        _write_json(dest / split / "state.json", state)
        datasets.DatasetInfo(features=features).write_to_directory(dest / split)
        written = [f"{split}/{name}" for name in ("state.json", "dataset_info.json")]
        described |= {name: size_and_digest(dest / name) for name in written}
    _write_json(dest / INFO, {**info, "files": described})
    _write_json(dest / SPLITS, {"splits": splits})
    for name in files:
        _note(dest, name).unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partly = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partly.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partly.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the same command goes on", str(path)) from error
    finally:
        partly.unlink(missing_ok=True)


def size_and_digest(path: Path, count: Callable[[int], Any] = lambda size: None) -> dict[str, Any]:
    """Bytes of a file and their SHA-256 digest; ``count`` is called with the number of bytes that were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            count(len(data))
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
