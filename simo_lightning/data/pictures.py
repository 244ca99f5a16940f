"""Training pictures that are augmented one by one, in the workers of a loader, each with draws of its own."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from simo_lightning.data.augment import BatchAugment
from simo_lightning.data.photo_augment import Crop, PhotoAugment, in_channels
from simo_lightning.data.sources import ImageSource, JoinedImages, whole_picture
from simo_lightning.preprocessing import Preprocessing

# Dataclasses of which a config may give another class by class_path
set_parsing_settings(subclasses_enabled=[BatchAugment, PhotoAugment])

PictureAugment: TypeAlias = PhotoAugment | Callable[[Image.Image], Any]  # one picture at a time, in the workers
Augment: TypeAlias = BatchAugment | PictureAugment  # or whole batches, on their device


def check_augment(augment: Any) -> None:
    """Refuse what is neither ``BatchAugment``, a callable on one picture, "auto" nor None.

    Raises:
        ValueError: If it is none of these, or a class in place of an instance, or a callable that one picture is not
            enough for.
    """
    if augment is None or isinstance(augment, BatchAugment | PhotoAugment) or augment == "auto":
        return
    known = "augment must be BatchAugment, PhotoAugment, a callable on one picture, 'auto' or None"
    if isinstance(augment, type):
        raise ValueError(f"{known}, got the class {augment.__name__}, not an instance of it")
    if not callable(augment):
        raise ValueError(f"{known}, got {augment!r}")
    try:
        signature = inspect.signature(augment)
    except ValueError:  # a function written in C
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"{known}, got {_name(augment)}, which takes {signature}; an augmentation of whole batches derives from "
            "BatchAugment"
        ) from error


def _name(augment: Any) -> str:
    return getattr(augment, "__name__", None) or type(augment).__name__


def seed_all(seed: int) -> None:
    """Seed the generators that transforms draw from: of torch on the CPU, of NumPy and of Python.

    ``torch.manual_seed`` also seeds those of all devices, which takes a hundred times as long.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the generator that other libraries draw from
    random.seed(seed)


def augment_one(
    source: ImageSource, index: int, augment: PictureAugment, preprocessing: Preprocessing, seeds: Sequence[int]
) -> list[Tensor]:
    """Augmented views of one picture of a source. The global generators are left as the last draw leaves them.

    Args:
        source: Holds the picture.
        index: Its position.
        augment: ``PhotoAugment``, or a callable that takes the whole picture, upright and in mode RGB, and returns a
            picture or a uint8 tensor ``(C, h, w)``, whose size may be any.
        preprocessing: Of the model; brings the result of other callables to its size.
        seeds: One for each view.

    Returns:
        uint8 ``(channels, height, width)`` for each view.

    Raises:
        RuntimeError: If the callable raises; the message names it and the file.
        ValueError: If the callable returns anything else; the message names it.
    """
    if isinstance(augment, PhotoAugment):
        return _photo(source, index, augment, preprocessing, seeds)
    picture = whole_picture(source, index)
    views = []
    for seed in seeds:
        seed_all(seed)
        try:
            result = augment(picture.copy() if len(seeds) > 1 else picture)
        except Exception as error:
            raise RuntimeError(
                f"augment {_name(augment)} failed on {_where(source, index)}, a picture of {picture.width} x "
                f"{picture.height}: {type(error).__name__}: {error}"
            ) from error
        views.append(_fitted(result, augment, preprocessing))
    return views


def _where(source: Any, index: int) -> str:
    """The file of a picture, or its position where it has none."""
    while True:
        if callable(getattr(source, "path", None)):
            return repr(str(source.path(index)))
        if isinstance(source, JoinedImages):
            source, index = source.locate(index)
        elif any(hasattr(source, name) for name in ("files", "source")):
            source = getattr(source, "files", None) or source.source
        else:
            return f"image {index} of {getattr(source, 'where', 'the training split')}"


def _photo(
    source: ImageSource, index: int, augment: PhotoAugment, preprocessing: Preprocessing, seeds: Sequence[int]
) -> list[Tensor]:
    """All views of a file from one decoding, as small as the smallest crop allows."""
    crops: list[tuple[Crop, Tensor]] = []
    whole: list[tuple[int, int]] = []

    def needed(width: int, height: int) -> tuple[int, int]:
        whole.append((width, height))
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            crops.append((augment.draw_crop(width, height), torch.get_rng_state()))
        sizes = [augment.smallest(width, height, crop, preprocessing) for crop, _ in crops]
        return max(size[0] for size in sizes), max(size[1] for size in sizes)

    picture = whole_picture(source, index, needed)
    views = []
    for crop, state in crops:
        torch.set_rng_state(state)  # as after the draw of the crop
        views.append(augment(picture, preprocessing, crop.scaled(whole[0], picture.size)))
    return views


def _fitted(result: Any, augment: Any, preprocessing: Preprocessing) -> Tensor:
    """What a callable returned, at the size of the model."""
    height, width = preprocessing.size
    if isinstance(result, Image.Image):
        if result.size != (width, height):
            return torch.from_numpy(np.array(preprocessing.square(result)))
        return F.pil_to_tensor(in_channels(result, preprocessing.channels))
    if isinstance(result, Tensor) and result.dtype == torch.uint8 and result.shape[:-2] == (preprocessing.channels,):
        return preprocessing.fit(result.as_subclass(Tensor)[None])[0]
    got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    advice = ""
    if isinstance(result, Tensor) and result.is_floating_point():
        advice = "; leave out the conversion to float and the normalisation, which the model does itself"
    raise ValueError(
        f"augment must return a picture or a uint8 tensor ({preprocessing.channels}, h, w), "
        f"got {got} from {_name(augment)}{advice}"
    )


class AugmentedPictures:
    """Training images of a loader: each picture of a batch is augmented on its own, with draws of its own.

    Args:
        source: Pictures and labels.
        augment: ``PhotoAugment``, or a callable that takes the whole picture, upright and in mode RGB, and returns a
            picture or a uint8 tensor ``(C, h, w)`` of any size.
        preprocessing: Of the model.
        views: V, number of augmented views of each picture.
    """

    def __init__(
        self, source: ImageSource, augment: PictureAugment, preprocessing: Preprocessing, views: int = 1
    ) -> None:
        self.source, self.augment, self.preprocessing, self.views = source, augment, preprocessing, views

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch.

        Args:
            indices: N positions; their attribute ``draw`` is the seed of the batch (:class:`DrawnIndices`). View v of
                the picture in place n is drawn from number n V + v of the seeds that NumPy's SeedSequence makes of it.

        Returns:
            uint8 ``(N, V, channels, height, width)`` and labels ``(N,)``.
        """
        draw: int = indices.draw  # type: ignore[attr-defined]
        numbers = np.random.SeedSequence(draw).generate_state(len(indices) * self.views, np.uint64)
        seeds = (numbers >> np.uint64(1)).reshape(len(indices), self.views).tolist()
        channels, size = self.preprocessing.channels, self.preprocessing.size
        images = torch.empty(len(indices), self.views, channels, *size, dtype=torch.uint8)
        with isolate_rng(include_cuda=False):
            for place, index in enumerate(indices):
                views = augment_one(self.source, index, self.augment, self.preprocessing, seeds[place])
                for view, image in enumerate(views):
                    images[place, view] = image
        return images, self.source.labels[torch.as_tensor(list(indices), dtype=torch.int64)]
