"""Augmentation of whole batches on their own device, with parameters drawn for each image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision


@dataclass(frozen=True)
class BatchAugment:
    """Zoom, crop, horizontal flip, colour jitter, grey and cutout, in this order, drawn independently for every image.

    Args:
        crop_padding: Pixels added on every side before a random crop of the original size; 0 = no crop.
        padding_mode: "reflect" pads with reflected pixels, "zeros" with zeros.
        flip: Probability in [0, 1] of a horizontal flip.
        brightness: Strength s in [0, 1]: pixels times a factor uniform in 1 - s .. 1 + s; 0 = off.
        contrast: The same for the difference from the mean grey of the image; 0 = off.
        saturation: The same for the difference from the grey of the pixel; 0 = off; no effect on one channel.
        cutout: Side in pixels of a square at a random pixel that is filled with the image's mean; 0 = off.
        zoom: Smallest area, as a share in (0, 1] of the image, of a random rectangle (aspect ratio 3:4 to 4:3) that is
            resized to the full image; uniform in zoom .. 1; 1 = off.
        grey: Probability in [0, 1] of conversion to grey.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> augment = BatchAugment(crop_padding=0, flip=1.0)
        >>> augment(torch.tensor([[[[1, 2, 3]]]], dtype=torch.uint8), torch.Generator())
        tensor([[[[3, 2, 1]]]], dtype=torch.uint8)

    Source:
        Crop and flip as usual for CIFAR; jitter as torchvision's ``ColorJitter``, in a fixed order; cutout by
        DeVries & Taylor, arXiv 1708.04552, who fill with the data's mean; zoom as torchvision's ``RandomResizedCrop``,
        but a side longer than the image's is clipped instead of drawn again.
    """

    crop_padding: int = 4
    padding_mode: Literal["reflect", "zeros"] = "reflect"
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    cutout: int = 0
    zoom: float = 1.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 pixels, got {getattr(self, name)}")
        for name in ("flip", "brightness", "contrast", "saturation", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.zoom <= 1:
            raise ValueError(f"zoom must lie in (0, 1], got {self.zoom}")
        if self.padding_mode not in ("reflect", "zeros"):
            raise ValueError(f"padding_mode must be 'reflect' or 'zeros', got {self.padding_mode!r}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: ``(N, C, H, W)``, uint8 in 0..255 or float in 0..1.
            generator: Random generator of the parameters, on the device of ``images``.

        Returns:
            Tensor of the same shape, dtype and range; ``images`` are not changed.

        Raises:
            ValueError: If ``images`` are not ``(N, C, H, W)``, or ``crop_padding`` is too large to reflect.
        """
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
        if self.padding_mode == "reflect" and self.crop_padding >= min(images.shape[-2:]):
            raise ValueError(f"crop_padding must be less than the image's side to reflect it, got {self.crop_padding} "
                             f"for {tuple(images.shape[-2:])} pixels")  # fmt: skip
        draws = torch.rand(8, len(images), generator=generator, device=generator.device).to(images.device)
        if self.zoom < 1 or self.grey:  # drawn last, so that the other draws do not depend on them
            more = torch.rand(5, len(images), generator=generator, device=generator.device).to(images.device)
        if self.zoom < 1:
            images = self._zoom(images, more[:4])
        if self.crop_padding or self.flip:
            images = self._crop_and_flip(images, draws[0], draws[1], draws[2] < self.flip)
        if self.brightness or self.contrast or self.saturation:
            images = self._jitter(images, draws[3:6])
        if self.grey:
            images = torch.where((more[4] < self.grey).view(-1, 1, 1, 1), _as(images, _grey(images.float())), images)
        return self._cut(images, draws[6], draws[7]) if self.cutout else images

    def _zoom(self, images: Tensor, draws: Tensor) -> Tensor:
        """Random rectangle of each image, resized to the full image by bilinear interpolation."""
        area = self.zoom + (1 - self.zoom) * draws[0]
        ratio = (math.log(4 / 3) * (2 * draws[1] - 1)).exp()  # width over height
        sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).clamp(max=1)  # (2, N) of 1: x, y
        centres = (1 - sides) * (2 * draws[2:4] - 1)  # (2, N) in -1..1
        theta = torch.diag_embed(sides.T)  # (N, 2, 2)
        grid = affine_grid(torch.cat([theta, centres.T[:, :, None]], dim=2), list(images.shape), align_corners=False)
        return _as(images, grid_sample(images.float(), grid, padding_mode="border", align_corners=False))

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flipped: Tensor) -> Tensor:
        """Crop and flip by one gather, with row and column indices of each image."""
        _, channels, height, width = images.shape
        padding = self.crop_padding
        rows = _whole(top, 2 * padding + 1)[:, None] + torch.arange(height, device=images.device)  # (N, H), padded
        columns = torch.arange(width, device=images.device)
        columns = torch.where(flipped[:, None], columns.flip(0), columns) + _whole(left, 2 * padding + 1)[:, None]
        if self.padding_mode == "reflect":  # the index is reflected and nothing is padded
            rows, columns = _reflect(rows - padding, height), _reflect(columns - padding, width)
        else:
            images = pad(images, (padding,) * 4)
        pixels = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)  # (N, H * W)
        return images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).unflatten(2, (height, width))

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        """Brightness, contrast, saturation; each step clamps to the range."""
        top = 1.0 if images.is_floating_point() else 255.0
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [1 + s * (2 * draw.view(-1, 1, 1, 1) - 1) for s, draw in zip(strengths, draws, strict=True)]
        pixels = images if images.is_floating_point() else images.float()
        if self.brightness:
            pixels = (pixels * factors[0]).clamp(0, top)
        if self.contrast:
            mean = _grey(pixels).mean(dim=(1, 2, 3), keepdim=True)
            pixels = torch.lerp(mean, pixels, factors[1].to(pixels.dtype)).clamp(0, top)
        if self.saturation and images.shape[1] > 1:
            pixels = torch.lerp(_grey(pixels), pixels, factors[2].to(pixels.dtype)).clamp(0, top)
        return _as(images, pixels)

    def _cut(self, images: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Fill a square around the drawn pixel, clipped to the image, with the mean of each channel."""
        height, width = images.shape[-2:]
        inside = []
        for centre, size in ((_whole(row, height), height), (_whole(column, width), width)):
            first = (centre - self.cutout // 2)[:, None]
            pixels = torch.arange(size, device=images.device)
            inside.append((pixels >= first) & (pixels < first + self.cutout))  # (N, size)
        mean = images.mean(dim=(2, 3), keepdim=True, dtype=torch.float32)
        return torch.where((inside[0][:, :, None] & inside[1][:, None, :])[:, None], _as(images, mean), images)


def _as(images: Tensor, pixels: Tensor) -> Tensor:
    """Float pixels in the dtype of ``images``, rounded if that is an integer."""
    return (pixels if images.is_floating_point() else pixels.round()).to(images.dtype)


def _whole(draw: Tensor, count: int) -> Tensor:
    """Uniform draws in [0, 1) as integers 0..count - 1 (float32 may round ``draw * count`` up to ``count``)."""
    return (draw * count).long().clamp(max=count - 1)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside 0..size - 1 reflected at the border pixel, which is not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _grey(pixels: Tensor) -> Tensor:
    """Grey of each pixel, ``(N, 1, H, W)``: luma of three channels, otherwise the mean of the channels."""
    if pixels.shape[1] != 3:
        return pixels.mean(dim=1, keepdim=True)
    red, green, blue = pixels.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]
