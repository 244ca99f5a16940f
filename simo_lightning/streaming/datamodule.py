"""The data module of streams in a local folder or an object store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from simo_lightning.data.datamodule import PairDataModule
from simo_lightning.data.pictures import Augment, AugmentedPictures
from simo_lightning.data.sampler import ClassBalancedSampler
from simo_lightning.data.sources import ImageSource, Split, channel_statistics, stratified_subset
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.streaming.images import Stream, StreamImages, open_stream, stream_of
from simo_lightning.streaming.sampler import StreamSampler
from simo_lightning.streaming.store import Location, parse_size

EXTRA_SPLITS: tuple[Split, ...] = ("query", "gallery", "unknown")
SAMPLE = 2000  # images of which mean and standard deviation are computed


class StreamPairDataModule(PairDataModule):
    """Images that :func:`write_stream` has written, read from a local folder or streamed from an S3 store.

    Memory does not grow with the images: of each, training keeps its label, its place and its position in the order of
    the epoch. Chunks are copied to ``cache_dir`` when a batch needs them, and verified. The training batches are those
    of :class:`StreamSampler`; validation and test are read in the order of the stream.

    Args:
        data_dir: Local folder, or ``s3://BUCKET/PREFIX``; extra ``stream``.
        samples_per_class: K, number of images of each class in a batch. Training reads the fewest chunks if it divides
            the ``bundle_size`` of the stream, 32 unless it was written with another one.
        window: Number of chunks from which the images of a batch are drawn. A larger window mixes the images better and
            needs a larger cache.
        cache_dir: Folder on a local disk for the copies of chunks, which all processes of the node share; null:
            ``simo_lightning/streams`` in the user's cache folder.
        max_cache_size: Largest size of the copies, such as 100GB or a number of bytes. Above the size of the stream,
            each chunk is fetched once in all epochs.
        storage_options: Arguments of ``boto3.client("s3")``, such as {endpoint_url: "https://HOST"}. The configuration
            is stored with the run: leave keys to the environment or to ``~/.aws``.
        image_size: Side in pixels; images of other sizes are resized by the shorter side and centre-cropped. null:
            that of the model, or 224.
        background: Colour behind transparent pixels, a name or #rrggbb; null: that of the model, or white.
        max_value: Grey value that becomes white in grey images of more than 8 bits; null: see ``Decoder``.
        coarse: As for ``PairDataModule``; "stream": the coarse classes that the stream has.
        augment: As for ``PairDataModule``.
        val_fraction: As for ``PairDataModule``. A validation split of the stream itself is read faster: images that are
            held out here lie in all chunks.
        **kwargs: Further arguments of ``PairDataModule``. ``class_sampling`` must be "natural".

    Raises:
        FileNotFoundError: If there is no stream.
        ModuleNotFoundError: If boto3 is missing.
        OSError: If a file cannot be read, after several tries, or ``cache_dir`` is full.
        ValueError: If an argument is out of range, the cache is too small for the window, or a file has changed.
    """

    def __init__(
        self,
        data_dir: str | Path,
        samples_per_class: int = 16,
        window: int = 8,
        cache_dir: str | Path | None = None,
        max_cache_size: int | str = "100GB",
        storage_options: dict[str, Any] | None = None,
        image_size: int | None = None,
        background: str | None = None,
        max_value: float | None = None,
        coarse: dict[str, list[str]] | Literal["stream"] | None = None,
        augment: Augment | Literal["auto"] | None = "auto",
        val_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            samples_per_class=samples_per_class,
            coarse=None if isinstance(coarse, str) else coarse,
            augment=augment,
            val_fraction=val_fraction,
            **kwargs,
        )
        if window < 1:
            raise ValueError(f"window must be at least 1 chunk, got {window}")
        if isinstance(coarse, str) and coarse != "stream":
            raise ValueError(f"coarse must be a dict, 'stream' or None, got {coarse!r}")
        if self.class_sampling != "natural":
            raise ValueError(
                "class_sampling must be 'natural' for a stream, of which an epoch reads each chunk once, "
                f"got {self.class_sampling!r}"
            )
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.data_dir, self.window, self.storage_options = data_dir, window, storage_options
        self.cache_dir = Path(cache_dir or Path(home, "simo_lightning", "streams")).expanduser().absolute()
        self.max_cache_size = max_cache_size
        self.image_size, self.background, self.max_value = image_size, background, max_value
        self._max_bytes = parse_size(max_cache_size)
        self._coarse_from = coarse if isinstance(coarse, str) else None
        self._stream: Stream | None = None
        # raises early if one of them is out of range
        Preprocessing(**{**self._preprocessing_arguments(), "mean": None, "std": None})
        Location(data_dir)

    @property
    def extra_splits(self) -> tuple[Split, ...]:  # type: ignore[override]
        """Which of the splits "query", "gallery" and "unknown" there are."""
        return tuple(split for split in EXTRA_SPLITS if split in self._opened().splits)

    def _opened(self) -> Stream:
        if self._stream is None:
            self._stream = open_stream(self.data_dir, self.storage_options)
        return self._stream

    def load(self, split: Split) -> ImageSource | None:
        """The images of one split; None if the stream has no such split."""
        stream = self._opened()
        if split not in stream.splits:
            return None
        images = stream.images(split, self.preprocessing, self.cache_dir, self._max_bytes)
        if split == "train" and self._coarse_from is not None:
            if stream.coarse is None:
                raise ValueError(
                    f"coarse 'stream' requires a stream with coarse classes, {stream.location.url!r} has none"
                )
            self.coarse = stream.coarse
        size = sum(file.size for file in images.store.files)
        classes = np.count_nonzero(np.bincount(images.labels.numpy()))
        rank_zero_info(
            f"{split} split in {stream.location.url!r}: {len(images):,} images of {classes:,} classes in "
            f"{len(images.ends):,} chunks, {size / 2**30:,.2f} GiB"
        )
        return images

    def _train_sampler(self) -> ClassBalancedSampler:
        images, index = stream_of(self._training)
        self._check_cache(images)
        bundle, settings = self._opened().bundle_size, self._sampling()
        if bundle % self.samples_per_class:
            rank_zero_info(
                f"samples_per_class {self.samples_per_class} does not divide the stream's bundles of {bundle} images: "
                "some groups take images from distant chunks, which are fetched again unless the cache holds them"
            )
        del settings["class_sampling"]
        sampler = StreamSampler(self._training.labels, images.chunks[index], self.window, **settings)
        sampler.identity = {"window": self.window, "stream": self._opened().fingerprint}
        return sampler

    def _check_cache(self, images: StreamImages) -> None:
        """ValueError if the cache cannot hold the chunks that training reads at one time."""
        if not images.store.location.is_remote:
            return
        ranks = 1 if self.trainer is None else max(1, self.trainer.num_devices)
        largest = max(file.size for file in images.store.files)
        total = sum(file.size for file in images.store.files)
        needed = min(total, (self.window + 2) * largest * ranks)
        if needed > self._max_bytes:
            raise ValueError(
                f"max_cache_size must hold window + 2 = {self.window + 2} chunks of {largest:,} bytes for each of "
                f"{ranks} processes, {needed:,} bytes, got {self.max_cache_size!r}"
            )

    def _training_dataset(self) -> Any:
        images = super()._training_dataset()
        return FetchedPictures(images, *stream_of(self._training)) if isinstance(images, AugmentedPictures) else images

    def _statistics(self, train: ImageSource) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the first images of the stream, which bundles of all classes share."""
        if self._computed is None or self._computed[0] is not train:
            first = train.subset(torch.arange(min(SAMPLE, len(train))))
            self._computed = (train, channel_statistics(first, self.split_seed))
        return self._computed[1]

    def _limited(self, source: ImageSource, limit: int | None) -> ImageSource:
        """At most ``limit`` images, the classes in proportion; the first of each class, which lie in few chunks."""
        if limit is None or limit >= len(source):
            return source
        labels = source.labels
        taken = torch.bincount(
            labels[stratified_subset(labels, limit, self.split_seed)], minlength=int(labels.max()) + 1
        )
        return source.subset(first_of_each_class(labels, taken))


class FetchedPictures:
    """A data set that brings all chunks of a batch near, several at once, before its pictures are read one by one.

    Args:
        pictures: The data set.
        images: Images of the stream.
        index: The image there that each of ``pictures`` is, ``(N,)``.
    """

    def __init__(self, pictures: AugmentedPictures, images: StreamImages, index: np.ndarray) -> None:
        self.pictures, self.images, self.index = pictures, images, index.astype(np.int32)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.images.fetch(self.index[list(indices)].tolist())
        return self.pictures.__getitems__(indices)


def first_of_each_class(labels: Tensor, taken: Tensor) -> Tensor:
    """Indices, ascending, of the first ``taken[c]`` images of each class c.

    Example:
        >>> first_of_each_class(torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1, 2]))
        tensor([0, 1, 3])
    """
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[within < taken[labels[order]]].sort().values
