"""Augmentation of photographs one by one, by torchvision.transforms.v2 on the whole picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from simo_lightning.preprocessing import Preprocessing

ERASED = {1: (117.0,), 3: (124.0, 116.0, 104.0)}  # the mean of ImageNet, by number of channels

DEFAULT = Preprocessing()


class Crop(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, before: tuple[int, int], now: tuple[int, int]) -> Crop:
        """The same part of a picture of another size; both sizes are width and height."""
        if before == now:
            return self
        x, y = now[0] / before[0], now[1] / before[1]
        top, left = round(self.top * y), round(self.left * x)
        bottom, right = round((self.top + self.height) * y), round((self.left + self.width) * x)
        return Crop(top, left, max(1, bottom - top), max(1, right - left))


@dataclass(frozen=True)
class PhotoAugment:
    """Random resized crop, horizontal flip, a policy of operations, colour jitter and random erasing, in this order.

    Each picture is augmented on its own, in the workers of the loader. The crop is drawn from the size in the header of
    the file, so that a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop is still as large as the
    model's input. All parts are those of torchvision.transforms.v2.

    Args:
        scale: Smallest and largest area of the crop, as a share of the picture, in (0, 1].
        ratio: Smallest and largest aspect ratio of the crop, width over height, positive.
        flip: Probability in [0, 1] of a horizontal flip.
        policy: trivial: TrivialAugmentWide, one random operation of random strength; rand: RandAugment, two operations
            of medium strength; null: none.
        brightness: Strength s in [0, 1]: pixels times a factor uniform in 1 - s .. 1 + s; 0 = off.
        contrast: The same for the difference from the mean grey of the picture; 0 = off.
        saturation: The same for the difference from the grey of the pixel; 0 = off.
        hue: Largest shift of the hue in [0, 0.5], as a share of the colour circle; 0 = off. It takes longer than all
            other parts together.
        erasing: Probability in [0, 1] that a rectangle of 2 to 33 % of the area is filled with the mean colour of
            ImageNet.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> augment = PhotoAugment(scale=(0.5, 1.0), policy="trivial")
        >>> images = augment(Image.new("RGB", (400, 300)), Preprocessing(image_size=224))
        >>> images.shape, images.dtype
        (torch.Size([3, 224, 224]), torch.uint8)

    Source:
        Crop: Szegedy et al., arXiv 1409.4842, with a smallest area of 0.2 as in Khosla et al., arXiv 2004.11362, in
        place of 0.08; Müller & Hutter, arXiv 2103.10158; Cubuk et al., arXiv 1909.13719; Zhong et al., arXiv
        1708.04896.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: Literal["trivial", "rand"] | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # from a list in a config
        _check_range("scale", self.scale, most=1.0)
        _check_range("ratio", self.ratio, most=float("inf"))
        for name in ("flip", "brightness", "contrast", "saturation", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], got {self.hue}")
        if self.policy not in ("trivial", "rand", None):
            raise ValueError(f"policy must be 'trivial', 'rand' or None, got {self.policy!r}")

    def draw_crop(self, width: int, height: int) -> Crop:
        """Draw a crop from torch's global generator.

        Args:
            width: Of the whole picture, in pixels.
            height: Of the whole picture, in pixels.

        Returns:
            The rectangle.
        """
        shape = torch.empty(1, height, width, device="meta")
        return Crop(**_parts(self, (1, 1), "bilinear", 3).crop.make_params([shape]))

    def __call__(
        self, picture: Image.Image, preprocessing: Preprocessing = DEFAULT, crop: Crop | None = None
    ) -> Tensor:
        """Augment one picture with draws from torch's global generator.

        Args:
            picture: The whole picture.
            preprocessing: Of the model: its image size, channels and interpolation; by default 224 pixels, RGB.
            crop: The crop in pixels of ``picture``; None: it is drawn first.

        Returns:
            uint8 ``(channels, height, width)`` at the size of the model.
        """
        height, width = preprocessing.size
        parts = _parts(self, (height, width), preprocessing.interpolation, preprocessing.channels)
        if crop is None:
            crop = self.draw_crop(*picture.size)
        cropped = F.resized_crop(picture, *crop, [height, width], parts.crop.interpolation)
        image: Tensor = F.pil_to_tensor(in_channels(parts.colours(cropped), preprocessing.channels))
        return parts.erase(image) if self.erasing else image

    def smallest(self, width: int, height: int, crop: Crop, preprocessing: Preprocessing) -> tuple[int, int]:
        """Smallest width and height of the whole picture at which the crop is as large as the model's input."""
        high, wide = preprocessing.size
        scale = min(1.0, max(wide / crop.width, high / crop.height))
        return -int(-width * scale // 1), -int(-height * scale // 1)  # rounded up


def _check_range(name: str, values: Sequence[float], most: float) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
        limit = f", at most {most:g}" if most < float("inf") else ""
        raise ValueError(f"{name} must be two positive numbers in ascending order{limit}, got {list(values)}")


class _Parts(NamedTuple):
    crop: v2.RandomResizedCrop
    colours: Callable[[Image.Image], Image.Image]
    erase: v2.RandomErasing


@lru_cache(maxsize=32)
def _parts(augment: PhotoAugment, size: tuple[int, int], interpolation: str, channels: int) -> _Parts:
    """The transforms of torchvision, made once."""
    method = v2.InterpolationMode(interpolation)
    steps: list[Any] = [v2.RandomHorizontalFlip(augment.flip)] if augment.flip else []
    if augment.policy is not None:
        steps.append((v2.TrivialAugmentWide if augment.policy == "trivial" else v2.RandAugment)(interpolation=method))
    jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    crop = v2.RandomResizedCrop(size, augment.scale, augment.ratio, method)
    colours = v2.Compose(steps) if steps else v2.Identity()
    return _Parts(crop, colours, v2.RandomErasing(augment.erasing, value=ERASED[channels]))


def in_channels(picture: Image.Image, channels: int) -> Image.Image:
    """The picture in mode RGB, or L for one channel."""
    mode = "RGB" if channels == 3 else "L"
    return picture if picture.mode == mode else picture.convert(mode)  # which copies one of the same mode
