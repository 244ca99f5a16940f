"""The images of one split of a stream."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simo_lightning.data.labels import Relabelled
from simo_lightning.data.packing import verify_files
from simo_lightning.data.sources import ImageSource, JoinedImages
from simo_lightning.preprocessing import Decoder, PictureSize, Preprocessing
from simo_lightning.streaming.store import STREAM_FILE, Chunks, Location, StoredFile
from simo_lightning.streaming.write import INDEX, LABELS, LAYOUT


@dataclass(frozen=True)
class Stream:
    """What ``stream.json`` says.

    Attributes:
        location: Folder of the stream.
        class_names: One name per class.
        coarse: Classes of each coarse class; None if the stream has none.
        bundle_size: Images of a class that lie together.
        splits: Files of each split.
        fingerprint: Number below 2^48 that tells this content from any other.
    """

    location: Location
    class_names: list[str]
    coarse: dict[str, list[str]] | None
    bundle_size: int
    splits: dict[str, list[StoredFile]]
    fingerprint: int

    def images(self, split: str, decoder: Preprocessing, cache_dir: Path, max_bytes: int) -> StreamImages:
        """The images of a split; its index and labels are read, but no chunk.

        Args:
            split: One of ``splits``.
            decoder: Reads an image file.
            cache_dir: Folder for copies of chunks that lie in a bucket.
            max_bytes: Largest size of all copies together.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If a file is not the one that ``stream.json`` describes, or its layout is another one.
        """
        files = {Path(file.name).name: file for file in self.splits[split]}
        index = json.loads(self._verified(files[INDEX]))
        config = index["config"]
        if config["data_format"] != ["bytes", "int", "bytes"] or config["compression"] or config["encryption"]:
            raise ValueError(
                f"{self.location.where(files[INDEX].name)!r} must describe items (image, label, path) without "
                f"compression and encryption, got {config['data_format']}"
            )
        labels = np.load(io.BytesIO(self._verified(files[LABELS])), allow_pickle=False)
        counts = [chunk["chunk_size"] for chunk in index["chunks"]]
        chunks = [files[chunk["filename"]] for chunk in index["chunks"]]
        store = Chunks(self.location, chunks, counts, cache_dir, max_bytes)
        ends = np.cumsum(counts, dtype=np.int64)
        places = np.arange(len(labels), dtype=np.int32)
        return StreamImages(store, ends, places, torch.from_numpy(labels).long(), self.class_names, decoder)

    def _verified(self, file: StoredFile) -> bytes:
        content = self.location.read(file.name)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise ValueError(f"{self.location.where(file.name)!r} is not the file that {STREAM_FILE} describes")
        return content


def open_stream(url: str | Path, storage_options: dict[str, Any] | None = None) -> Stream:
    """Read the description of a stream that :func:`write_stream` wrote.

    Args:
        url: Local folder, or ``s3://bucket/prefix``.
        storage_options: Arguments of ``boto3.client("s3")``.

    Returns:
        The stream.

    Raises:
        FileNotFoundError: If there is none, or it was not written to its end.
        OSError: If it cannot be read.
        ValueError: If it is damaged or of a newer version.
    """
    location = Location(url, storage_options)
    try:
        content = location.read(STREAM_FILE)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data_dir must be a folder that write_stream has written to its end, found no {STREAM_FILE} in "
            f"{location.url!r}"
        ) from error
    try:
        found = json.loads(content)
        if found["layout"] > LAYOUT:
            raise ValueError(f"it has layout {found['layout']}, this version reads up to {LAYOUT}")
        splits = {
            split: [
                StoredFile(f"{split}/{name}", file["bytes"], file["sha256"]) for name, file in part["files"].items()
            ]
            for split, part in found["splits"].items()
        }
        names, coarse, bundle = list(found["class_names"]), found["coarse"], int(found["bundle_size"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{location.where(STREAM_FILE)!r} cannot be read: {error!r}") from error
    fingerprint = int(hashlib.sha256(content).hexdigest()[:12], 16)
    return Stream(location, names, coarse, bundle, splits, fingerprint)


def verify_stream(folder: str | Path, workers: int | None = None, progress: bool = False) -> tuple[int, int]:
    """Compare each file of a stream in a local folder with its digest.

    Args:
        folder: That :func:`write_stream` has written.
        workers: Files that are read at a time; None: one per core, at most 16.
        progress: Whether to show a progress bar.

    Returns:
        Number of files and their bytes.

    Raises:
        FileNotFoundError: As :func:`open_stream`.
        ValueError: If files are missing or have changed; the message names them.
    """
    splits = open_stream(folder).splits.values()
    files = {file.name: {"bytes": file.size, "sha256": file.sha256} for split in splits for file in split}
    return verify_files(Path(folder).expanduser().absolute(), files, workers, progress)


@dataclass(frozen=True, eq=False)
class StreamImages:
    """Labelled images in the chunks of a stream, decoded batch by batch in the loader's workers.

    Args:
        store: Reads the chunks.
        ends: Number of images up to the end of each chunk, int64.
        places: Position of each image in the split, int32 ``(N,)``.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        decoder: Reads an image file.
    """

    store: Chunks
    ends: np.ndarray
    places: np.ndarray
    labels: Tensor
    class_names: list[str]
    decoder: Preprocessing

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = np.empty((len(indices), self.decoder.channels, *self.decoder.size), dtype=np.uint8)
        chunks, items = self._locate(indices)
        self.store.fetch(dict.fromkeys(chunks))
        for position, place in enumerate(zip(chunks, items, strict=True)):
            images[position] = self.decoder.read(_ImageFile(self.store, *place))[0]
        return torch.from_numpy(images), self.labels[torch.as_tensor(list(indices), dtype=torch.int64)]

    @property
    def chunks(self) -> np.ndarray:
        """Chunk that holds each image, int32 ``(N,)``."""
        sizes = np.diff(self.ends, prepend=0)
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[self.places]

    def fetch(self, indices: Sequence[int]) -> None:
        """Bring the chunks of these images near, several at once."""
        self.store.fetch(dict.fromkeys(self._locate(indices)[0]))

    def picture(self, index: int, size: PictureSize = None) -> Image.Image:
        """One whole picture, upright and in mode RGB, before it is resized; see ``FolderImages.picture``."""
        return Decoder(self.decoder.background, self.decoder.max_value)(
            _ImageFile(self.store, *self._place(index)), size
        )[0]

    def path(self, index: int) -> str:
        """Where an image lies, for messages."""
        return self.store.where(*self._place(index))

    def subset(self, indices: Tensor) -> StreamImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return replace(self, places=self.places[indices.numpy()], labels=self.labels[indices])

    def _locate(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """Chunk of each image, and its number there."""
        places = self.places[np.asarray(indices, dtype=np.int64)]
        chunks = np.searchsorted(self.ends, places, side="right")
        items = places - np.concatenate([[0], self.ends])[chunks]
        return chunks.tolist(), items.tolist()

    def _place(self, index: int) -> tuple[int, int]:
        (chunk,), (item,) = self._locate([index])
        return chunk, item


class _ImageFile(io.BytesIO):
    """An image file in memory, with a name for messages."""

    def __init__(self, store: Chunks, chunk: int, item: int) -> None:
        super().__init__(store.image(chunk, item))
        self._where = store, chunk, item

    @property
    def name(self) -> str:
        store, chunk, item = self._where
        return store.where(chunk, item)


def stream_of(source: ImageSource) -> tuple[StreamImages, np.ndarray]:
    """The stream below a source that relabels it or chooses from it, and the index there of each image."""
    if isinstance(source, StreamImages):
        return source, np.arange(len(source), dtype=np.int32)
    if isinstance(source, Relabelled):
        return stream_of(source.source)
    if isinstance(source, JoinedImages) and len(source.sources) == 1:
        stream, index = stream_of(source.sources[0])
        return stream, index if source.index is None else index[source.index.numpy()]
    raise TypeError(f"source must be images of a stream, got {type(source).__name__}")
