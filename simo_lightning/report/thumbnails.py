"""Small copies of images as data URIs: one by one, and many in one picture that CSS cuts."""

import base64
import io
import math
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

_SIDES = (64, 56, 48, 40, 32, 24, 16)  # pixels of the longer side, largest first
_QUALITY = 80  # of WebP, of 100
_SPRITE_QUALITY = 60
_SAMPLE = 400  # images from which the size of all is estimated


class Sprite(NamedTuple):
    """Many small images in one picture.

    Attributes:
        uri: The picture as a data URI, WebP.
        columns: Images in a row; image i is in row ``i // columns`` and column ``i % columns``.
        rows: Rows.
        width: Pixels of one image.
        height: Pixels of one image.
    """

    uri: str
    columns: int
    rows: int
    width: int
    height: int


def image_uri(image: Tensor) -> str:
    """An image as a data URI.

    Args:
        image: uint8 ``(C, H, W)``, grey or RGB.

    Returns:
        ``data:image/webp;base64,...``.

    Example:
        >>> image_uri(torch.zeros(3, 8, 8, dtype=torch.uint8))[:23]
        'data:image/webp;base64,'
    """
    return _uri(_encode(image))


def make_sprite(images: Tensor, most_bytes: int = 5_500_000) -> Sprite:
    """One picture of all images, as large as the number of bytes allows.

    Args:
        images: uint8 ``(N, C, H, W)``, grey or RGB, at least one. They are not enlarged.
        most_bytes: Of the data URI. Images of 64 pixels, or else of 56, 48, 40, 32, 24 or 16 are taken, the largest
            with which it is reached; the smallest may exceed it.

    Returns:
        The sprite.

    Raises:
        ValueError: If there is no image.

    Example:
        >>> sprite = make_sprite(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        >>> sprite.columns, sprite.rows, sprite.width
        (3, 2, 8)
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    sample = images[:: max(1, len(images) // _SAMPLE)]
    sides = [side for side in _SIDES if side < max(images.shape[2:])]
    if max(images.shape[2:]) <= _SIDES[0]:
        sides.insert(0, max(images.shape[2:]))
    for side in sides:
        expected = len(_encode(_grid(_shrunk(sample, side)), _SPRITE_QUALITY)) * 4 / 3 * len(images) / len(sample)
        if expected > most_bytes and side != sides[-1]:
            continue
        small = _shrunk(images, side)
        uri = _uri(_encode(_grid(small), _SPRITE_QUALITY))
        if len(uri) <= most_bytes or side == sides[-1]:
            break
    columns = _columns(len(images))
    return Sprite(uri, columns, -(-len(images) // columns), small.shape[3], small.shape[2])


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _shrunk(images: Tensor, side: int) -> Tensor:
    """The images with a longer side of `side` pixels."""
    longest = max(images.shape[2:])
    if longest <= side:
        return images
    size = [max(1, round(length * side / longest)) for length in images.shape[2:]]
    parts = [interpolate(part.float(), size=size, mode="area") for part in images.split(2048)]
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def _grid(images: Tensor) -> Tensor:
    """The images (N, C, H, W) side by side, in rows of the same number: (C, rows * H, columns * W)."""
    count, channels, height, width = images.shape
    columns = _columns(count)
    rows = -(-count // columns)
    cells = images.new_zeros(rows * columns, channels, height, width)
    cells[:count] = images
    return (
        cells.view(rows, columns, channels, height, width)
        .permute(2, 0, 3, 1, 4)
        .reshape(channels, rows * height, columns * width)
    )


def _encode(image: Tensor, quality: int = _QUALITY) -> bytes:
    pixels = image.permute(1, 2, 0).numpy()  # (H, W, C)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    file = io.BytesIO()
    picture.convert("RGB").save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()


def _uri(code: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(code).decode('ascii')}"
