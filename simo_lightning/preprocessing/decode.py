"""An image file as 8-bit RGB, whatever its format, depth, orientation or transparency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, UnidentifiedImageError

try:
    from PIL import AvifImagePlugin  # noqa: F401  # since Pillow 11.3

    AVIF: tuple[str, ...] = ("AVIF",)
except ImportError:
    AVIF = ()

# without those whose decoder starts a program
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", *AVIF)
UPRIGHT = {  # EXIF orientation to the transpose that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
PROFILE_OF = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's mode to the colours of an ICC profile
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF tag and its value for inverted grey
# Smallest width and height that are needed of a picture, or a function of its own width and height that returns them
PictureSize = tuple[int, int] | Callable[[int, int], tuple[int, int]] | None


@dataclass(frozen=True)
class Decoder:
    """Reads image files as RGB pictures: upright, 8 bits a channel, opaque.

    - EXIF orientation is applied. Of an animation or a multi-page file the first picture is read.
    - 16 bits per channel become 8 by keeping the upper byte, ``value // 256``.
    - 32-bit integers, signed integers and floats have no nominal range: each image is scaled from its own minimum and
      maximum to 0..255. NaN and infinite pixels become 0 and are left out of the range.
    - Transparent pixels are composited on ``background``.
    - CMYK, YCbCr and CIELAB become RGB. An embedded colour profile, such as Display P3 of a telephone, is applied: the
      result is sRGB. Profiles that are sRGB, within two levels of 255, change nothing.

    Args:
        background: Colour behind transparent pixels, a name or ``#rrggbb``.
        max_value: In grey images of more than 8 bits 0..``max_value`` is scaled to 0..255 and larger values become 255:
            4095 for 12-bit data in 16-bit files, 1 for floats in 0..1. None: the rules above.

    Raises:
        ValueError: If an argument is out of range or not a colour.

    Example:
        >>> Decoder(background="black", max_value=4095).max_value
        4095
    """

    background: str = "white"
    max_value: float | None = None

    def __post_init__(self) -> None:
        if self.max_value is not None and not 0 < self.max_value < float("inf"):
            raise ValueError(f"max_value must be positive and finite, got {self.max_value}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(f"background must be a colour's name or #rrggbb, got {self.background!r}") from error

    def __call__(self, path: str | Path | BinaryIO, size: PictureSize = None) -> tuple[Image.Image, list[str]]:
        """Read one file.

        Args:
            path: The file; or an open one that can seek, whose ``name``, if it has one, is used in messages.
            size: Smallest width and height that are needed; a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size
                as long as it is not smaller than that. A function is called once with the width and height of the
                upright picture, which are known before it is decoded, and returns them. None: at its full size.

        Returns:
            The picture in mode RGB, and one phrase for each conversion made.

        Raises:
            OSError: If the file cannot be read; the message names it.
            ValueError: If the file is not an image in one of ``FORMATS``, or is damaged; the message names it.
        """
        changes: list[str] = []
        try:
            with Image.open(path, formats=FORMATS) as image:
                return self._rgb(image, size, changes), changes
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many exception types on damaged files
            if isinstance(error, OSError) and error.errno is not None:  # from the file system, not the decoder
                raise OSError(error.errno, error.strerror, str(path)) from error
            name = str(getattr(path, "name", path)) if not isinstance(path, Path) else str(path)
            reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{name!r} does not decode as an image: {reason}") from error

    def _rgb(self, image: Any, size: PictureSize, changes: list[str]) -> Image.Image:
        """The whole picture, upright, in RGB; a large JPEG at 1/2, 1/4 or 1/8 of its size."""
        if getattr(image, "is_animated", False):
            changes.append("first picture of several")
        stored = (
            str(image.tile[0][3]) if image.tile else ""
        )  # such as "RGB;16B"; emptied by loading, which getexif may do
        turn = None
        try:
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # the EXIF parser raises many exception types on damaged data
            changes.append("damaged EXIF, taken as upright")
        upright_when_loaded = image.format == "TIFF"
        _draft(image, size, turn in SIDEWAYS and not upright_when_loaded)
        image.load()
        if turn is not None:
            changes.append("turned upright by EXIF")
        if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"):
            changes.append("grey")
        if image.mode[0] in "IF":
            image = self._eight_bits(image, stored, changes)
        elif ";16" in stored:
            changes.append("16-bit, upper byte kept")
        profile = image.info.get("icc_profile")
        image = self._opaque(_in_srgb(self._layer(image, stored), profile, changes), changes)
        if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
            changes.append(image.mode)
        if image.mode == "LAB":
            lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        image = _as_rgb(image)
        return image if turn is None or upright_when_loaded else image.transpose(turn)

    def _eight_bits(self, image: Any, stored: str, changes: list[str]) -> Image.Image:
        """Grey of more than 8 bits as mode L, or LA if one value is transparent."""
        values = np.asarray(image)
        if "I;32N" in stored:  # unsigned in the file; Pillow stores it as int32
            values = values.view(np.uint32)
        depth = _depth(image, stored)
        if depth in ("12-bit", "16-bit") and self.max_value is None:
            grey = values >> (4 if depth == "12-bit" else 8)
            changes.append(f"{depth}, upper byte kept")
            if depth == "16-bit" and int(values.max()) < 4096:
                changes.append("16-bit without a value above 4,095, nearly black (12-bit data? set max_value to 4095)")
        else:
            finite = np.isfinite(values)
            if not finite.all():
                changes.append("NaN or infinite pixels set to 0")
            low, high = 0.0, self.max_value
            if high is None:
                if not finite.any():
                    raise ValueError("no pixel is finite")
                low, high = float(values[finite].min()), float(values[finite].max())
            scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
            grey = np.where(finite, scaled, 0).round().clip(0, 255)
            own = "its own range" if self.max_value is None else f"0..{self.max_value:g}"
            changes.append(f"{depth}, scaled from {own}")
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow inverts only at 8 bits
            grey = 255 - grey
        result = Image.fromarray(grey.astype(np.uint8))
        transparent = image.info.get("transparency")
        if transparent is not None:
            result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return result

    def _layer(self, image: Any, stored: str) -> Any:
        """The image with an alpha channel if a colour or entries of its palette are transparent."""
        transparent = image.info.get("transparency")
        if transparent is None:
            return image.convert("RGBA") if image.mode in ("PA", "La", "RGBa") else image
        if isinstance(transparent, tuple) and ";16" in stored:
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        if stored in ("L;2", "L;4"):  # pixels are scaled to 0..255, the transparent value is not
            image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[stored]
        return image.convert("RGBA")

    def _opaque(self, image: Any, changes: list[str]) -> Any:
        """Composite the image on the background if any pixel is transparent."""
        if image.mode not in ("LA", "RGBA"):
            return image
        layer = image.convert("RGBA")
        if layer.getextrema()[3][0] == 255:
            return layer
        changes.append(f"transparency on {self.background}")
        canvas = Image.new("RGBA", layer.size, ImageColor.getrgb(self.background)[:3])
        canvas.alpha_composite(layer)
        return canvas


def _as_rgb(image: Any) -> Any:
    """The image in mode RGB; a decoded JPEG is not copied (other formats may be mapped to their file)."""
    return image if image.mode == "RGB" and image.format == "JPEG" else image.convert("RGB")


def _draft(image: Any, size: PictureSize, sideways: bool) -> None:
    """Have a JPEG decoded at the smallest of its sizes that is not smaller than the upright ``size``."""
    step = -1 if sideways else 1
    if callable(size):
        size = size(*image.size[::step])
    if size is not None:
        image.draft("RGB", size[::step])


def _in_srgb(image: Any, profile: bytes | None, changes: list[str]) -> Any:
    """The image in sRGB if an embedded colour profile says that it is not."""
    if profile is None:
        return image
    image = image.convert("RGB") if image.mode == "P" else image
    colours = {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)
    if colours not in PROFILE_OF:
        return image
    try:
        transform = _to_srgb(profile, colours)
        if transform is None:
            return image
        result = transform.apply(image.convert(colours))
    except Exception:  # ImageCms raises several exception types on damaged profiles
        changes.append("damaged colour profile, not applied")
        return image
    changes += ["colour profile applied"] + ["CMYK"] * (colours == "CMYK")
    if colours != image.mode:
        result.putalpha(image.getchannel("A"))
    return result


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform of a colour profile to sRGB; None if it is of other colours than ``mode``, or sRGB itself."""
    own = ImageCms.ImageCmsProfile(BytesIO(profile))
    if own.profile.xcolor_space.strip() != PROFILE_OF[mode]:
        return None
    transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    colours = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    before = Image.fromarray(colours)
    after = transform.apply(before)
    difference = np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))
    return None if np.abs(difference).max() <= 2 else transform


def _depth(image: Any, stored: str) -> str:
    """Bits per channel in the file, of an image that Pillow reads as integers or floats."""
    if ";16S" in stored or ";16BS" in stored:
        return "signed 16-bit"
    at_most_16 = "16" in image.mode or image.format in ("PNG", "PPM")
    if image.mode == "F" or not at_most_16:
        return "32-bit"
    return "12-bit" if "I;12" in stored else "16-bit"
