"""Images of a batch as pixels that can be shown."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def as_pixels(images: Tensor, datamodule: Any = None, largest_side: int = 64) -> Tensor:
    """Images as uint8, for display.

    Args:
        images: ``(N, C, H, W)``, uint8 or normalised floats.
        datamodule: With ``mean`` and ``std`` of each channel on the scale 0..1, or without.
        largest_side: In pixels; larger images are made smaller.

    Returns:
        uint8 of the same shape, or smaller where a side is over ``largest_side``.

    Example:
        >>> as_pixels(torch.tensor([[[[-1.0, 0.0, 1.0]]]])).tolist()
        [[[[0, 128, 255]]]]
    """
    pixels = images.float()
    mean, std = getattr(datamodule, "mean", None), getattr(datamodule, "std", None)
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    elif mean is not None and std is not None and len(mean) == len(std) == images.shape[1]:
        scale, center = (pixels.new_tensor(list(values)).view(1, -1, 1, 1) for values in (std, mean))
        pixels = pixels * scale + center
    else:
        low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp(min=torch.finfo(pixels.dtype).tiny)
    longest = max(pixels.shape[2:])
    if longest > largest_side:
        size = [max(1, side * largest_side // longest) for side in pixels.shape[2:]]
        pixels = interpolate(pixels, size=size, mode="area")
    return (pixels.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def are_images(images: Any, count: int) -> bool:
    """Whether a value is that many images ``(N, C, H, W)``, grey or RGB."""
    return isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3) and len(images) == count
