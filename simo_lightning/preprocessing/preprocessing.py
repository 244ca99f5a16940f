"""The preprocessing of a model: from an image file or a uint8 image to what the encoder takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from simo_lightning.preprocessing.decode import Decoder

Resize = Literal["crop", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic"]
_LARGEST_SIDE = 65_535  # in pixels; of a JPEG


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of an encoder. It belongs to the model and is stored in every checkpoint.

    Args:
        image_size: Side of the square input in pixels, or its height and width.
        mean: Mean of each channel on the scale 0..1; None: not known yet, since it is computed from training images.
        std: Standard deviation of each channel on the same scale; with ``mean``.
        channels: 3 for RGB or 1 for grey; image files are read as one of the two. Images in memory may have any number.
        resize: crop: the shorter side is resized and the centre is cropped; squash: both sides are resized, whatever
            the aspect ratio; pad: the longer side is resized and the rest is filled with ``background``.
        crop_fraction: Side of the centre crop as a share of the resized shorter side, in (0, 1]; 0.875 resizes to 256
            and crops 224. For "crop" only.
        interpolation: Of the resizing.
        background: Colour behind transparent pixels and of padding, a name or ``#rrggbb``.
        max_value: Grey value that becomes white in grey files of more than 8 bits; see :class:`Decoder`.

    Raises:
        ValueError: If an argument is out of range, or the numbers of channels differ.

    Example:
        >>> preprocessing = Preprocessing(image_size=32, mean=(0.5,), std=(0.25,), channels=1)
        >>> preprocessing.normalize(torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    image_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int = 3
    resize: Resize = "crop"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bilinear"
    background: str = "white"
    max_value: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list | tuple):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        self._check_statistics()
        if len(self.size) != 2 or not all(type(side) is int and side <= _LARGEST_SIDE for side in self.size):
            raise ValueError(
                f"image_size must be one or two whole numbers up to {_LARGEST_SIDE:,} pixels, got {self.image_size}"
            )
        if min(self.size) < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if self.resize not in ("crop", "squash", "pad"):
            raise ValueError(f"resize must be 'crop', 'squash' or 'pad', got {self.resize!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must lie in (0, 1], got {self.crop_fraction}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}")
        Decoder(self.background, self.max_value)  # raises if one of them is wrong

    def _check_statistics(self) -> None:
        if type(self.channels) is not int or self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std must be given both or neither, got {self.mean} and {self.std}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} must have one value for each of {self.channels} channels, got {list(values)}")
        if self.std is not None and not min(self.std) > 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    def read(self, path: str | Path | BinaryIO) -> tuple[np.ndarray, list[str]]:
        """Read one image file.

        Args:
            path: The file, or an open one that can seek.

        Returns:
            uint8 ``(channels, height, width)``, and one phrase for each conversion made.

        Raises:
            OSError: If the file cannot be read; the message names it.
            ValueError: If the file is not an image, or is damaged; the message names it.
        """
        height, width = self.size
        picture, changes = Decoder(self.background, self.max_value)(path, (width, height))
        return self.square(picture), changes

    def square(self, picture: Image.Image) -> np.ndarray:
        """A whole picture as uint8 ``(channels, height, width)``, resized by the rule of ``resize``."""
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB) to read image files, got {self.channels}")
        pixels = np.asarray(self._crop(picture.convert("RGB" if self.channels == 3 else "L")))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _crop(self, image: Image.Image) -> Image.Image:
        """The centre at the size; only the visible part is resized, so that a long strip needs little memory."""
        (high, wide), (width, height) = self.size, image.size
        if (width, height) == (wide, high) and self.crop_fraction == 1:
            return image
        method = Image.Resampling[self.interpolation.upper()]
        if self.resize == "squash":
            return image.resize((wide, high), method)
        if self.resize == "pad":
            scale = min(wide / width, high / height)
            inner = (max(1, round(width * scale)), max(1, round(height * scale)))
            canvas = Image.new("RGB", (wide, high), self.background).convert(image.mode)
            canvas.paste(image.resize(inner, method), ((wide - inner[0]) // 2, (high - inner[1]) // 2))
            return canvas
        scale = max(wide / width, high / height) / self.crop_fraction
        whole = (max(wide, round(width * scale)), max(high, round(height * scale)))  # of the whole picture, resized
        left, top = (whole[0] - wide) // 2, (whole[1] - high) // 2
        x, y = width / whole[0], height / whole[1]  # pixels of the image per pixel of the result
        box = (left * x, top * y, min((left + wide) * x, width), min((top + high) * y, height))
        return image.resize((wide, high), method, box)

    def fit(self, images: Tensor) -> Tensor:
        """Images of any size at the size of the model, by the same rule as :meth:`read`.

        Args:
            images: uint8 ``(N, channels, H, W)``.

        Returns:
            uint8 ``(N, channels, height, width)``; ``images`` themselves if they have that size.

        Raises:
            ValueError: If they are not uint8 in 0..255 or have another number of channels.
        """
        self.check(images)
        (height, width), (high, wide) = self.size, images.shape[-2:]
        if (high, wide) == (height, width):
            return images
        if self.resize == "squash":
            return self._resized(images, height, width)
        if self.resize == "pad":
            scale = min(width / wide, height / high)
            inner = self._resized(images, max(1, round(high * scale)), max(1, round(wide * scale)))
            colour = Image.new("RGB", (1, 1), self.background).convert("RGB" if self.channels == 3 else "L")
            canvas = torch.from_numpy(np.array(colour)).view(1, -1, 1, 1).to(images.device)
            canvas = canvas.expand(-1, self.channels, -1, -1).repeat(len(images), 1, height, width)
            top, left = (height - inner.shape[2]) // 2, (width - inner.shape[3]) // 2
            canvas[:, :, top : top + inner.shape[2], left : left + inner.shape[3]] = inner
            return canvas
        scale = max(width / wide, height / high) / self.crop_fraction
        whole = self._resized(images, max(height, round(high * scale)), max(width, round(wide * scale)))
        top, left = (whole.shape[2] - height) // 2, (whole.shape[3] - width) // 2
        return whole[:, :, top : top + height, left : left + width]

    def _resized(self, images: Tensor, height: int, width: int) -> Tensor:
        resized: Tensor = F.resize(images, [height, width], InterpolationMode(self.interpolation), antialias=True)
        return resized

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless `images` are uint8 ``(N, channels, H, W)``."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 in 0..255 to be preprocessed, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must have shape (N, {self.channels}, H, W), got {tuple(images.shape)}")

    def normalize(self, images: Tensor) -> Tensor:
        """Scale raw images by ``mean`` and ``std``.

        Args:
            images: uint8 ``(N, channels, H, W)``.

        Returns:
            float32 of the same shape.

        Raises:
            ValueError: As :meth:`check`; or if ``mean`` and ``std`` are not known.
        """
        self.check(images)
        if self.mean is None or self.std is None:
            raise ValueError("mean and std must be known to normalise images, got None")
        return images.float().sub_(_of_channels(self.mean, images.device)).div_(_of_channels(self.std, images.device))

    def __call__(self, images: Tensor) -> Tensor:
        """Inputs of the encoder, float32 ``(N, channels, height, width)``, of uint8 images of any size."""
        return self.normalize(self.fit(images))

    def differences(self, arguments: Mapping[str, Any]) -> list[str]:
        """Names of the fields that have another value than in `arguments`.

        Args:
            arguments: Values by the name of their field. None leaves the value open, and so does None in a field.

        Returns:
            The names, in the order of the fields.

        Example:
            >>> Preprocessing(32, mean=(0.5,) * 3, std=(0.2,) * 3).differences({"image_size": 64, "mean": None})
            ['image_size']
        """
        found = []
        for name in (field.name for field in fields(self)):
            own, other = getattr(self, name), arguments.get(name)
            if own is None or other is None:
                continue
            if name == "image_size":
                own, other = self.size, (other, other) if isinstance(other, int) else other
            if own != (tuple(other) if isinstance(own, tuple) else other):
                found.append(name)
        return found

    def check_arguments(
        self, arguments: Mapping[str, Any], owner: str, whose: str = "the model's preprocessing"
    ) -> None:
        """Raise ValueError if one of the `arguments` of an `owner` has another value; `whose` names this object."""
        for name in self.differences(arguments):
            own, other = (
                list(value) if isinstance(value, tuple) else value for value in (getattr(self, name), arguments[name])
            )
            raise ValueError(f"{name} of {owner} must be that of {whose}, {own}, got {other}: leave it out")


def takes_preprocessing(module: object) -> bool:
    """Whether a module has an attribute ``preprocessing`` that is None or a :class:`Preprocessing`."""
    value = getattr(module, "preprocessing", False)
    return value is None or isinstance(value, Preprocessing)


def encoder_input(images: Tensor, preprocessing: Preprocessing | None, check_range: bool = False) -> Tensor:
    """Images as an encoder takes them.

    Args:
        images: uint8 ``(N, C, H, W)`` of any size, or floats that are already normalised, which are returned as they
            are.
        preprocessing: Of the model; None: not known.
        check_range: Whether to check that the values of float images are possible for normalised ones, give or take
            the width of their range. Floats in 0..255 are found, floats in 0..1 are not.

    Returns:
        Floats.

    Raises:
        ValueError: If the images have another number of channels than the model, a type that is neither uint8 nor
            float, or values out of range; or if they are uint8 and ``preprocessing`` or its mean and std are not known.
    """
    if not images.is_floating_point():
        if images.dtype == torch.uint8 and (preprocessing is None or preprocessing.mean is None):
            raise ValueError(
                "the model does not know the mean and std of its images, so it takes no uint8 images: pass "
                "preprocessing=Preprocessing(image_size, mean, std) to it or to load_from_checkpoint"
            )
        return (preprocessing or Preprocessing())(images)
    if preprocessing is None:
        return images
    if images.ndim != 4 or images.shape[1] != preprocessing.channels:
        raise ValueError(f"images must have shape (N, {preprocessing.channels}, H, W), got {tuple(images.shape)}")
    if check_range and images.numel() and preprocessing.mean is not None and preprocessing.std is not None:
        ends = [
            (end - mean) / std
            for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)
            for end in (0, 1)
        ]
        low, high = (float(end) for end in images.aminmax())
        width = max(ends) - min(ends)
        if low < min(ends) - width or high > max(ends) + width:
            raise ValueError(
                f"float images must be normalised, to about {min(ends):.3g}..{max(ends):.3g}, got {low:.3g}.."
                f"{high:.3g}: pass raw images as uint8"
            )
    return images


@lru_cache(maxsize=64)
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values times 255 as (C, 1, 1), copied to a device once."""
    return 255 * torch.tensor(values, device=device).view(-1, 1, 1)
