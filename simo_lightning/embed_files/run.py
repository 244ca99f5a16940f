"""Embeddings of image files on disk, written to a file: any number of images, on several processes."""

import hashlib
import json
import multiprocessing as mp
import os
import queue
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from simo_lightning.checkpoints import TrainingClasses
from simo_lightning.data.loader import default_workers, keep_batch
from simo_lightning.data.lock import only_one_process
from simo_lightning.embed_files.classes import known_means, read_classes
from simo_lightning.embed_files.listing import ImageList, describe_left_out, write_list
from simo_lightning.embed_files.parts import WRITERS, Part, Parts
from simo_lightning.embedder import Embedder, EmbeddingPrecision
from simo_lightning.embeddings_file import read_info, sha256_of
from simo_lightning.extras import import_extra
from simo_lightning.preprocessing import Preprocessing

_PART = 1024  # images that are lost at most when the command is killed, of each process
_FORMAT = 1


class EmbeddedFiles(NamedTuple):
    """What :func:`embed_files` has done.

    Attributes:
        path: The file.
        images: Number of embeddings in it.
        broken: Number of image files that could not be read.
        embedded: Images that this call has embedded; the others were there from an earlier one.
        seconds: That it took to embed them, without loading the model and joining the parts.
        notes: One line each about what was left out.
    """

    path: Path
    images: int
    broken: int
    embedded: int
    seconds: float
    notes: list[str]


class _Settings(NamedTuple):
    """What a process needs to embed."""

    checkpoint: Path
    options: dict[str, Any]
    classes: TrainingClasses | None
    scores: bool
    shares: bool
    num_workers: int
    threads: int


def embed_files(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    classes: str | Path | None = None,
    scores: bool = False,
    shares: bool = False,
    data_dir: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    precision: EmbeddingPrecision = "32",
    devices: int = 1,
    progress: bool = False,
) -> EmbeddedFiles:
    """Embed image files and write the embeddings to a file.

    The work is done in parts of about 1,024 images, which are kept in the folder ``<out>.parts`` until all are there.
    If the call is stopped, the same one continues with the parts that are missing, and the file becomes the same.
    Memory does not grow with the number of images. Image files that cannot be read are listed in ``<out>.broken.csv``.

    A Parquet file has a row per image with the columns:

    - path: as given or found.
    - embedding: list of D float32.
    - class and score: the class whose mean has the largest cosine, and that cosine. Only if class means are known.
    - scores: cosine with the mean of each class, list of C float32, nan for a class without a mean.
    - shares and rest: as in :meth:`Embedder.shares <simo_lightning.embedder.Embedder.shares>`, list of C float32 and
      float32.

    Its metadata hold under the key "simo_lightning" a JSON object with the checkpoint and its SHA-256 digest, the
    preprocessing and the names of the classes in the order of scores and shares. An .npz file has the arrays paths,
    embeddings, classes, score, scores, shares, rest, class_names and info, the JSON object, and no pickled object.

    Args:
        checkpoint: File.
        images: Files, folders, patterns and tables; see :func:`find_images`.
        out: File that ends in .parquet or .npz.
        classes: Labelled images or embeddings whose class means replace those of the checkpoint; see
            :func:`read_classes`.
        scores: Whether to write the cosine with every class mean.
        shares: Whether to write the orthogonal decomposition.
        data_dir: Folder of the relative paths in a table; None: that of the table.
        batch_size: Images that are embedded at a time.
        num_workers: Processes that read image files for each process that embeds; None: one per core.
        device: "auto", "cpu", "cuda", "cuda:1" and the like.
        precision: "32", or "bf16" for autocast.
        devices: Processes that embed; each on a GPU of its own, or on its share of the cores.
        progress: Whether to show a progress bar.

    Returns:
        What was done.

    Raises:
        FileExistsError: If ``out`` exists and holds something else than this call would write.
        FileNotFoundError: If there is no such checkpoint or image, or no image at all.
        ModuleNotFoundError: If a Parquet file is asked for and pyarrow is not installed.
        OSError: If a folder cannot be read, or ``out`` not be written.
        ValueError: If an argument is out of range, the checkpoint cannot be read, class means are needed and not known,
            another call writes to ``out``, parts of a call with other arguments are there, or no image can be read.
    """
    out, checkpoint = Path(out).expanduser(), Path(checkpoint).expanduser()
    _check(out, devices, num_workers)
    options: dict[str, Any] = {"device": device, "precision": precision, "batch_size": batch_size}
    embedder = Embedder.load(checkpoint, **options)
    if embedder.preprocessing.channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3 to read image files, got {embedder.preprocessing.channels}")
    _check_devices(embedder.device, devices)
    threads = torch.get_num_threads() if devices == 1 else max(1, torch.get_num_threads() // devices)
    workers = default_workers(most=16 * devices) // devices if num_workers is None else num_workers
    embedder.num_workers = workers
    notes = []
    if classes is not None:
        embedder.classes = read_classes(classes, embedder, sha256_of(checkpoint))
    if not known_means(embedder.classes):
        if scores or shares:
            raise ValueError(
                f"class means must be known for scores and shares, but checkpoint {checkpoint} holds none: pass classes"
            )
        notes.append("no column class: the checkpoint holds no class means, and no --classes are given")
    settings = _Settings(checkpoint, options, embedder.classes, scores, shares, workers, threads)
    folder = out.with_name(out.name + ".parts")
    had_folder = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with only_one_process(folder / "lock", f"out {str(out)!r}"):
        try:
            part_size = batch_size * max(1, round(_PART / batch_size))
            listed = write_list(folder / "new_images", images, part_size, data_dir)
            notes += [f"not taken{describe_left_out(listed.left_out)}"] if listed.left_out else []
            info = _info(embedder, settings, listed)
            if out.exists():
                return _as_it_is(out, info, folder, notes)
            listed, info = _continue(folder, out, listed, info)
        except Exception:
            if not had_folder:
                shutil.rmtree(folder)
            raise
        parts = Parts(folder, listed.parts)
        embedded, seconds = _embed_missing(parts, listed, settings, embedder, devices, progress)
        broken_list = out.with_name(out.name + ".broken.csv")
        broken = parts.write_broken(broken_list)
        if broken == listed.count:
            shutil.rmtree(folder)
            raise ValueError(f"none of {broken:,} images can be read; {broken_list} lists the reasons")
        WRITERS[out.suffix](parts, folder / "joined", {**info, "rows": listed.count - broken, "broken": broken})
        (folder / "joined").replace(out)
        shutil.rmtree(folder)
    return EmbeddedFiles(out, listed.count - broken, broken, embedded, seconds, notes)


def _check(out: Path, devices: int, num_workers: int | None) -> None:
    if out.suffix not in WRITERS:
        raise ValueError(f"out must end in {' or '.join(WRITERS)}, got {str(out)!r}")
    if out.suffix == ".parquet":
        import_extra("pyarrow.parquet")
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")


def _check_devices(device: torch.device, devices: int) -> None:
    if device.type == "cpu" or devices == 1:
        return
    if device.index is not None:
        raise ValueError(f"device must be a kind such as {device.type!r} for {devices} devices, got {str(device)!r}")
    if devices > torch.accelerator.device_count():
        raise ValueError(f"devices must be at most {torch.accelerator.device_count()}, as there are, got {devices}")


def _info(embedder: Embedder, settings: _Settings, listed: ImageList) -> dict[str, Any]:
    """What the embeddings depend on, in plain data."""
    classes = embedder.classes
    means = b"" if classes is None or classes.means is None else classes.means.numpy().tobytes()
    return {
        "format": _FORMAT,
        "checkpoint": str(settings.checkpoint),
        "checkpoint_sha256": sha256_of(settings.checkpoint),
        "preprocessing": asdict(embedder.preprocessing),
        "class_names": None if classes is None else classes.names,
        "class_means_sha256": hashlib.sha256(means).hexdigest(),
        "scores": settings.scores,
        "shares": settings.shares,
        "batch_size": embedder.batch_size,
        "precision": embedder.precision,
        "device": embedder.device.type,
        "images": listed.count,
        "images_sha256": listed.sha256,
    }


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What differs between two calls; None if nothing does. A checkpoint may lie elsewhere."""
    new = json.loads(json.dumps(new))
    for key in (key for key in new if key != "checkpoint"):
        if old.get(key) != new[key]:
            name = {
                "checkpoint_sha256": "another checkpoint",
                "images_sha256": "other images",
                "class_means_sha256": "other class means",
                "class_names": "other classes",
                "preprocessing": "another preprocessing",
            }.get(key)
            return name or f"{key} {old.get(key)}, not {new[key]}"
    return None


def _as_it_is(out: Path, info: dict[str, Any], folder: Path, notes: list[str]) -> EmbeddedFiles:
    """The file is there already, and is what would be written."""
    try:
        old = read_info(out)
        difference = _difference(old, info)
    except ValueError:
        difference = "something else"
    if difference is not None:
        raise FileExistsError(f"out {str(out)!r} exists, made with {difference}: remove it, or give another name")
    shutil.rmtree(folder)
    return EmbeddedFiles(out, old["rows"], old["broken"], 0, 0.0, notes)


def _continue(folder: Path, out: Path, listed: ImageList, info: dict[str, Any]) -> tuple[ImageList, dict[str, Any]]:
    """Take the place of the list and arguments of an earlier call, if they are the same."""
    stored = folder / "info.json"
    if stored.exists():
        old = json.loads(stored.read_text())
        difference = _difference(old, info)
        if difference is not None:
            raise ValueError(
                f"out {str(out)!r} was begun with {difference}: finish it with the same arguments, or remove the "
                f"folder {str(folder)!r} to start anew"
            )
        info = old
    listed.file.replace(folder / "images")
    if not stored.exists():
        (folder / "new_info").write_text(json.dumps(info))
        (folder / "new_info").replace(stored)
    return ImageList(folder / "images", listed.count, listed.sha256, listed.offsets, listed.left_out), info


def _embed_missing(
    parts: Parts, listed: ImageList, settings: _Settings, embedder: Embedder, devices: int, progress: bool
) -> tuple[int, float]:
    """Embed what is missing; returns the number of images and the seconds."""
    missing = parts.missing()
    done = listed.count - sum(len(listed.part(number)) for number in missing)
    bar = tqdm(
        total=listed.count, initial=done, unit=" images", disable=not progress, smoothing=0.05, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60.0,
    )  # fmt: skip
    with bar:
        start = time.perf_counter()
        if devices == 1 or len(missing) < 2:
            _embed_parts(embedder, parts, listed, missing, settings, bar.update)
        else:
            del embedder
            shares = [missing[rank::devices] for rank in range(min(devices, len(missing)))]
            _in_processes(parts, listed, shares, settings, bar.update)
        return listed.count - done, time.perf_counter() - start


def _embed_parts(
    embedder: Embedder,
    parts: Parts,
    listed: ImageList,
    numbers: Iterable[int],
    settings: _Settings,
    count: Callable[[int], Any],
) -> None:
    """Embed and write parts of a list in this process; ``count`` is called with the number of images of each batch."""
    loader = DataLoader(
        _Files(embedder.preprocessing),
        batch_sampler=_batches(listed, numbers, embedder.batch_size),  # type: ignore[arg-type]
        collate_fn=keep_batch,
        num_workers=settings.num_workers,
        pin_memory=embedder.device.type == "cuda",
    )
    for number, batches in groupby(loader, key=lambda batch: batch.part):
        embeddings, paths, broken = [], [], []
        for batch in batches:
            if batch.paths:
                embeddings.append(embedder.embed(batch.pixels))
            paths += batch.paths
            broken += batch.broken
            count(len(batch.paths) + len(batch.broken))
        parts.write(number, Part(_columns(embedder, paths, embeddings, settings), broken))


class _Batch(NamedTuple):
    part: int
    paths: list[str]
    pixels: Tensor
    broken: list[tuple[str, str]]


def _batches(listed: ImageList, numbers: Iterable[int], size: int) -> Iterator[tuple[int, list[str]]]:
    """Number of the part and paths of each batch, read when they are needed."""
    for number in numbers:
        paths = listed.part(number)
        for start in range(0, len(paths), size):
            yield number, paths[start : start + size]


class _Files(Dataset[Any]):
    """Reads batches of image files."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __getitems__(self, batch: tuple[int, list[str]]) -> _Batch:
        part, paths = batch
        pixels = np.empty((len(paths), self.preprocessing.channels, *self.preprocessing.size), dtype=np.uint8)
        readable: list[str] = []
        broken: list[tuple[str, str]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about files that it reads all the same
            for path in paths:
                try:
                    path.encode()
                    pixels[len(readable)] = self.preprocessing.read(path)[0]
                    readable.append(path)
                except UnicodeEncodeError:
                    broken.append((os.fsencode(path).decode("utf-8", "backslashreplace"), "its name is not UTF-8"))
                except (OSError, ValueError) as error:
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                    broken.append((path, " ".join(reason.split())))
        return _Batch(part, readable, torch.from_numpy(pixels[: len(readable)]), broken)


def _columns(embedder: Embedder, paths: list[str], parts: list[Tensor], settings: _Settings) -> dict[str, np.ndarray]:
    """Columns of a part, from the embeddings of its batches."""
    embeddings = torch.cat(parts).cpu() if parts else torch.zeros(0, 0)
    columns = {"path": np.array(paths, dtype=np.str_), "embedding": embeddings.numpy()}
    if not known_means(embedder.classes) or not parts:
        return columns
    assert embedder.classes is not None
    scores = embedder.scores(embeddings)
    best = scores.max(dim=1)
    columns["class"] = np.array(embedder.classes.names, dtype=np.str_)[best.indices.numpy()]
    columns["score"] = best.values.numpy()
    if settings.scores:
        columns["scores"] = scores.masked_fill(scores.isinf(), torch.nan).numpy()
    if settings.shares:
        shares, rest = embedder.shares(embeddings)
        columns["shares"], columns["rest"] = shares.float().numpy(), rest.float().numpy()
    return columns


def _in_processes(
    parts: Parts,
    listed: ImageList,
    shares: list[list[int]],
    settings: _Settings,
    count: Callable[[int], Any],
) -> None:
    """Embed each share of the parts in a process of its own."""
    context = mp.get_context("spawn")
    messages = context.Queue()
    arguments = [(rank, parts, listed, numbers, settings, messages) for rank, numbers in enumerate(shares)]
    processes = [context.Process(target=_embed_in_process, args=each) for each in arguments]
    try:
        for process in processes:
            process.start()
        running = len(processes)
        while running:
            try:
                message = messages.get(timeout=1)
            except queue.Empty:
                failed = [each for each in processes if each.exitcode not in (None, 0)]
                if failed:
                    raise RuntimeError(f"a process that embeds ended with status {failed[0].exitcode}") from None
                continue
            if isinstance(message, Exception):
                raise message
            if message is None:
                running -= 1
            else:
                count(message)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _embed_in_process(
    rank: int, parts: Parts, listed: ImageList, numbers: list[int], settings: _Settings, messages: Any
) -> None:
    """Embed parts; numbers of images, an error, or None at the end go to ``messages``."""
    try:
        torch.set_num_threads(settings.threads)
        embedder = Embedder.load(settings.checkpoint, **settings.options)
        if embedder.device.type != "cpu":
            embedder = Embedder.load(
                settings.checkpoint, **{**settings.options, "device": f"{embedder.device.type}:{rank}"}
            )
        embedder.classes = settings.classes
        parent = mp.parent_process()

        def count(images: int) -> None:
            if parent is None or not parent.is_alive():  # killed: the next start does the rest
                os._exit(1)
            messages.put(images)

        _embed_parts(embedder, parts, listed, numbers, settings, count)
        messages.put(None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        messages.put(error)
