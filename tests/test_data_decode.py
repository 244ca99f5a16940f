"""Image files of all formats and depths, compared with Pillow, the definition of the format, or NumPy."""

import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torchvision
from PIL import ExifTags, Image, ImageCms, ImageFilter, ImageOps, features

from simo_lightning.preprocessing import FORMATS, Preprocessing

SIZE = 24
RAMP = np.linspace(3_000, 55_000, SIZE * SIZE).reshape(SIZE, SIZE).round().astype(np.uint16)


def photo(width: int = SIZE, height: int = SIZE, blur: float = 3, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ImageOps.autocontrast(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(blur)))


def decoded(
    image: Image.Image | bytes, path: Path, decoder: Preprocessing | None = None, **save: Any
) -> tuple[Any, list[str]]:
    """int ``(H, W, 3)`` and what was converted."""
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **save)
    pixels, changes = (decoder or Preprocessing(SIZE)).read(path)
    assert (pixels.dtype, pixels.shape[0]) == (np.uint8, 3)
    return pixels.transpose(1, 2, 0).astype(int), changes


def png(depth: int, colour: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of SIZE x SIZE by its specification: Pillow writes no 16-bit colour and no tRNS of 2 bits."""
    header = (b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, depth, colour, 0, 0, 0))
    data = (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in (header, *chunks, data, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))
    return b"".join(parts)


# ---- depth


@pytest.mark.parametrize("name", ["x.png", "x.tif", "big_endian.tif"])
def test_16_bit_grey_keeps_the_upper_byte(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(RAMP)
    if name.startswith("big"):
        image = Image.frombytes("I;16B", image.size, RAMP.astype(">u2").tobytes())
    pixels, changes = decoded(image, tmp_path / name)
    assert (pixels == (RAMP // 256)[..., None]).all()
    assert (pixels.min(), pixels.max()) == (11, 214)
    assert changes == ["grey", "16-bit, upper byte kept"]


def test_16_bit_grey_of_pgm(tmp_path: Path) -> None:
    header = f"P5 {SIZE} {SIZE} 65535\n".encode()
    assert (decoded(header + RAMP.astype(">u2").tobytes(), tmp_path / "x.pgm")[0] == (RAMP // 256)[..., None]).all()


@pytest.mark.parametrize("channels, colour", [(3, 2), (4, 6), (2, 4)])
def test_16_bit_colour_keeps_the_upper_byte(tmp_path: Path, channels: int, colour: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, channels)).astype(">u2")
    if channels != 3:
        values[..., -1] = 65535  # opaque
    pixels, changes = decoded(png(16, colour, [row.tobytes() for row in values]), tmp_path / "x.png")
    assert (pixels == (values // 256)[..., : 3 if channels > 2 else 1]).all()
    assert "16-bit, upper byte kept" in changes


def tiff(bits: int, channels: int, pixels: bytes, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF file of SIZE x SIZE by its specification: Pillow writes no 12 bits and no 16-bit colour."""
    tags = {256: SIZE, 257: SIZE, 258: bits, 259: 1, 262: 2 if channels == 3 else 1, 277: channels, 278: SIZE}
    values = {tag: struct.pack("<HI", 3, 1) + struct.pack("<HH", value, 0) for tag, value in tags.items()}
    first = 8 + 2 + 12 * 10 + 4  # behind header, directory of 10 entries and the offset of the next one
    values[273] = struct.pack("<HII", 4, 1, first + 6)
    values[279] = struct.pack("<HII", 4, 1, len(pixels))
    values[339] = struct.pack("<HI", 3, 1) + struct.pack("<HH", sample_format, 0)
    if channels == 3:
        values[258] = struct.pack("<HII", 3, 3, first)
    entries = b"".join(struct.pack("<H", tag) + values[tag] for tag in sorted(values))
    directory = struct.pack("<H", len(values)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", bits, bits, bits) + pixels


def test_12_bit_tiff_keeps_the_upper_8_bits(tmp_path: Path) -> None:
    values = RAMP // 16  # 187..3437
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = pairs[:, 0] << 12 | pairs[:, 1]  # two pixels in three bytes
    content = tiff(12, 1, np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8).tobytes())
    pixels, changes = decoded(content, tmp_path / "x.tif")
    assert (pixels == (values // 16)[..., None]).all()
    assert changes == ["grey", "12-bit, upper byte kept"]
    pixels, changes = decoded(content, tmp_path / "x.tif", Preprocessing(SIZE, max_value=3437))
    assert (pixels[..., 0] == (values / 3437 * 255).round()).all()
    assert changes == ["grey", "12-bit, scaled from 0..3437"]


def test_16_bit_colour_tiff_keeps_the_upper_byte(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype("<u2")
    pixels, changes = decoded(tiff(16, 3, values.tobytes()), tmp_path / "x.tif")
    assert (pixels == values // 256).all()
    assert changes == ["16-bit, upper byte kept"]


def test_signed_16_bit_tiff_is_scaled_from_the_range_of_the_file(tmp_path: Path) -> None:
    values = RAMP.astype(np.int32) - 30_000
    pixels, changes = decoded(tiff(16, 1, values.astype("<i2").tobytes(), sample_format=2), tmp_path / "x.tif")
    assert np.abs(pixels[..., 0] - (values - values.min()) / (values.max() - values.min()) * 255).max() <= 0.5 + 1e-9
    assert changes == ["grey", "signed 16-bit, scaled from its own range"]


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow was built without JPEG 2000")
@pytest.mark.parametrize("name", ["x.jp2", "x.j2k"])
def test_jpeg_2000(tmp_path: Path, name: str) -> None:
    pixels, changes = decoded(photo(), tmp_path / name)
    assert (pixels == np.asarray(photo())).all()  # lossless by default
    assert changes == []
    pixels, changes = decoded(Image.fromarray(RAMP), tmp_path / name)
    assert (pixels == (RAMP // 256)[..., None]).all()
    assert changes == ["grey", "16-bit, upper byte kept"]


def test_16_bit_file_of_12_bit_data_is_reported_and_can_be_stretched(tmp_path: Path) -> None:
    values = (RAMP // 16).astype(np.uint16)  # 187..3437
    assert any("set max_value to 4095" in change for change in decoded(Image.fromarray(values), tmp_path / "x.png")[1])
    pixels, changes = decoded(Image.fromarray(values), tmp_path / "x.png", Preprocessing(SIZE, max_value=4095))
    assert (pixels[..., 0] == (values / 4095 * 255).round()).all()
    assert changes == ["grey", "16-bit, scaled from 0..4095"]
    clipped = decoded(Image.fromarray(values), tmp_path / "x.png", Preprocessing(SIZE, max_value=1000))[0]
    assert (clipped[values >= 1000] == 255).all()


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.int32) - 20_000,
        RAMP.astype(np.int32) * 30_000,
        (RAMP / 65535).astype(np.float32),
        -RAMP.astype("f"),
    ],
    ids=["int32", "large", "float", "negative"],
)
def test_32_bits_are_scaled_from_the_range_of_the_file(tmp_path: Path, values: np.ndarray) -> None:
    pixels, changes = decoded(Image.fromarray(values), tmp_path / "x.tif")
    exact = values.astype(np.float64)
    expected = (exact - exact.min()) / (exact.max() - exact.min()) * 255
    assert np.abs(pixels[..., 0] - expected).max() <= 0.5 + 1e-9
    assert changes == ["grey", "32-bit, scaled from its own range"]


def test_floats_with_max_value_nan_and_a_constant(tmp_path: Path) -> None:
    values = (RAMP / 65535).astype(np.float32)
    pixels = decoded(Image.fromarray(values), tmp_path / "x.tif", Preprocessing(SIZE, max_value=1))[0]
    assert np.abs(pixels[..., 0] - values * 255).max() <= 0.5 + 1e-4
    values[0, 0], values[1, 1] = np.nan, np.inf
    pixels, changes = decoded(Image.fromarray(values), tmp_path / "x.tif")
    assert (pixels[0, 0, 0], pixels[1, 1, 0], pixels[-1, -1, 0]) == (0, 0, 255)
    assert "NaN or infinite pixels set to 0" in changes
    assert decoded(Image.fromarray(np.full((SIZE, SIZE), 7, np.float32)), tmp_path / "x.tif")[0].max() == 0
    Image.fromarray(np.full((SIZE, SIZE), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif' does not decode as an image: no pixel is finite"):
        Preprocessing(SIZE).read(tmp_path / "x.tif")


def test_16_bit_tiff_with_white_as_zero_is_inverted(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.tif")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    entry = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert content[entry] == 1  # black is zero
    content[entry] = 0
    assert (decoded(bytes(content), tmp_path / "x.tif")[0] == 255 - (RAMP // 256)[..., None]).all()


def test_one_bit_and_palette_are_black_white_and_the_colours(tmp_path: Path) -> None:
    mask = RAMP > 30_000
    assert (decoded(Image.fromarray(mask), tmp_path / "x.png")[0][..., 0] == mask * 255).all()
    palette = photo().quantize(16)
    pixels, changes = decoded(palette, tmp_path / "x.png")
    assert (pixels == np.asarray(palette.convert("RGB"))).all()
    assert changes == []


# ---- colour


@pytest.mark.parametrize("mode, name", [("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("YCbCr", "x.tif"), ("LAB", "x.tif")])
def test_other_colour_spaces_become_rgb(tmp_path: Path, mode: str, name: str) -> None:
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 refuses the YCbCr TIFF that it writes as truncated")
    original = photo().point(lambda value: 64 + value // 2)  # dark colours suffer from 8 bits of CIELAB
    image = original.convert(mode) if mode != "LAB" else to_lab(original)
    save = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}
    pixels, changes = decoded(image, tmp_path / name, **save)
    assert np.abs(pixels - np.asarray(original).astype(int)).max() <= 6  # rounding of the other space and of JPEG
    assert changes == [mode]


def test_cmyk_jpeg_of_adobe_is_not_negative(tmp_path: Path) -> None:
    """Adobe stores 255 - ink."""
    ink = np.zeros((SIZE, SIZE, 4), np.uint8)
    ink[: SIZE // 2, :, 0], ink[SIZE // 2 :, :, 1] = 255, 255  # all cyan above, all magenta below
    image = Image.frombytes("CMYK", (SIZE, SIZE), ink.tobytes())
    pixels, changes = decoded(image, tmp_path / "x.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()
    assert np.abs(pixels[: SIZE // 2 - 8] - (0, 255, 255)).max() <= 6
    assert np.abs(pixels[SIZE // 2 + 8 :] - (255, 0, 255)).max() <= 6
    assert changes == ["CMYK"]


@pytest.mark.parametrize("name", ["x.tif", "x.pbm", "x.bmp", "x.gif"])
def test_one_bit_in_each_format(tmp_path: Path, name: str) -> None:
    mask = RAMP > 30_000
    assert (decoded(Image.fromarray(mask), tmp_path / name)[0] == mask[..., None] * 255).all()


def test_one_bit_where_one_is_black(tmp_path: Path) -> None:
    """PBM by its definition, and a TIFF that says that white is zero, as those of fax machines."""
    mask = RAMP > 30_000
    bits = np.packbits(mask, axis=1).tobytes()
    expected = np.where(mask, 0, 255)[..., None]
    assert (decoded(f"P4 {SIZE} {SIZE}\n".encode() + bits, tmp_path / "x.pbm")[0] == expected).all()
    content = bytearray(tiff(1, 1, bits))
    entry = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert (decoded(bytes(content), tmp_path / "x.tif")[0] == 255 - expected).all()
    content[entry] = 0
    assert (decoded(bytes(content), tmp_path / "x.tif")[0] == expected).all()


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow before 11.3, or built without AVIF")
def test_avif(tmp_path: Path) -> None:
    pixels, changes = decoded(photo(), tmp_path / "x.avif", quality=100, subsampling="4:4:4")
    assert np.abs(pixels - np.asarray(photo()).astype(int)).max() <= 4
    assert changes == []


# ---- colour profiles


def tag(kind: bytes, content: bytes) -> bytes:
    return kind + bytes(4) + content


def xyz(*values: float) -> bytes:
    return tag(b"XYZ ", struct.pack(">3i", *(round(value * 65536) for value in values)))


def profile(colours: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, by its specification: Pillow can make none but sRGB."""
    tags = {
        b"desc": tag(b"desc", struct.pack(">I", 5) + b"test\0" + bytes(78)),
        b"cprt": tag(b"text", b"none\0"),
        b"wtpt": xyz(0.9642, 1, 0.8249),
        **tags,
    }
    table, content, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(content), len(data))
        content += data
    header = struct.pack(">I4sI4s4s4s", place + len(content), b"test", 0x02400000, b"mntr", colours, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)  # D50
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


# Linear RGB to XYZ, both adapted to D50 by Bradford's method: columns are red, green, blue
P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def display_p3(gamma: float = 2.2) -> bytes:
    curve = tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)))
    curves = {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return profile(b"RGB ", b"XYZ ", {f"{c}XYZ".encode(): xyz(*P3_TO_XYZ[:, i]) for i, c in enumerate("rgb")} | curves)


def as_srgb(values: np.ndarray, gamma: float = 2.2) -> np.ndarray:
    """0..255 in the colours of ``display_p3`` as 0..255 in sRGB, by the definitions, in float64."""
    linear = (values / 255) ** gamma @ (np.linalg.inv(SRGB_TO_XYZ) @ P3_TO_XYZ).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jpg", "x.webp", "x.avif"])
def test_a_colour_profile_is_applied(tmp_path: Path, name: str) -> None:
    save: dict[str, Any] = {} if name in ("x.png", "x.tif") else {"quality": 100, "subsampling": "4:4:4"}
    if name == "x.webp":
        save = {"lossless": True}
    plain, _ = decoded(photo(), tmp_path / f"plain{name[1:]}", **save)
    pixels, changes = decoded(photo(), tmp_path / name, icc_profile=display_p3(), **save)
    assert changes == ["colour profile applied"]
    assert np.abs(pixels - as_srgb(plain)).max() <= 2
    assert np.abs(pixels - plain).max() > 20
    theirs = ImageCms.profileToProfile(
        Image.fromarray(plain.astype(np.uint8)), BytesIO(display_p3()), ImageCms.createProfile("sRGB")
    )
    assert (pixels == np.asarray(theirs)).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_profile_with_transparency_orientation_and_a_palette(tmp_path: Path, orientation: int) -> None:
    image, colours, alpha = transparent("RGBA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels, changes = decoded(image, tmp_path / "x.png", icc_profile=display_p3(), exif=exif)
    share = alpha[..., None] / 255
    expected = share * as_srgb(colours) + (1 - share) * 255
    assert np.abs(pixels - (expected if orientation == 1 else np.rot90(expected, -1))).max() <= 3
    assert {"colour profile applied", "transparency on white"} <= set(changes)
    palette = photo().quantize(16)
    pixels, _ = decoded(palette, tmp_path / "y.png", icc_profile=display_p3())
    assert np.abs(pixels - as_srgb(np.asarray(palette.convert("RGB")))).max() <= 2
    clear, index = bytes([0, *[255] * 15]), np.asarray(palette)[..., None]
    pixels, _ = decoded(palette, tmp_path / "z.png", icc_profile=display_p3(), transparency=clear)
    assert np.abs(pixels - np.where(index == 0, 255, as_srgb(np.asarray(palette.convert("RGB"))))).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_applied(tmp_path: Path, mode: str) -> None:
    grey = profile(b"GRAY", b"XYZ ", {b"kTRC": tag(b"curv", struct.pack(">IH", 1, 256))})  # linear
    values = np.asarray(photo().convert("L"))
    image = Image.fromarray(values)
    if mode == "LA":
        image.putalpha(Image.new("L", image.size, 128))
    pixels, changes = decoded(image, tmp_path / "x.png", icc_profile=grey)
    linear = values / 255
    srgb = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected = srgb if mode == "L" else srgb * 128 / 255 + 127
    assert np.abs(pixels - expected[..., None]).max() <= 2
    assert changes[:2] == ["grey", "colour profile applied"]


def test_a_cmyk_profile_is_applied(tmp_path: Path) -> None:
    """A profile in which one ink is grey of half the lightness, and two are black."""
    grid = np.array([[inks >> shift & 1 for shift in (3, 2, 1, 0)] for inks in range(16)])
    lab = np.stack([np.array([255, 128, 0, 0, 0])[grid.sum(1)], np.full(16, 128), np.full(16, 128)], 1).astype(np.uint8)
    ramp = bytes(range(256))
    table = tag(b"mft1", bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    table += ramp * 4 + lab.tobytes() + ramp * 3
    icc = profile(b"CMYK", b"Lab ", {b"A2B0": table})
    image = Image.new("CMYK", (SIZE, SIZE), (255, 0, 0, 0))
    pixels, changes = decoded(image, tmp_path / "x.tif", icc_profile=icc)
    assert changes == ["colour profile applied", "CMYK"]
    assert np.abs(pixels - 119).max() <= 2  # L* = 50 in sRGB; without the profile cyan
    theirs = ImageCms.profileToProfile(image, BytesIO(icc), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert (pixels == np.asarray(theirs)).all()


def test_a_profile_that_is_srgb_of_other_colours_or_damaged_changes_nothing(tmp_path: Path) -> None:
    plain, _ = decoded(photo(), tmp_path / "x.png")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = profile(b"GRAY", b"XYZ ", {b"kTRC": tag(b"curv", struct.pack(">IH", 1, 256))})
    damaged = ["damaged colour profile, not applied"]
    for icc, expected in ((srgb, []), (grey, []), (b"no profile", damaged), (display_p3()[:200], damaged)):
        pixels, changes = decoded(photo(), tmp_path / "x.png", icc_profile=icc)
        assert (pixels == plain).all()
        assert changes == expected


def to_lab(image: Image.Image) -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert converted is not None
    return converted


# ---- orientation


@pytest.mark.parametrize("name, scale", [("x.jpg", 1), ("x.jpg", 5), ("x.png", 1), ("x.tif", 1), ("x.webp", 1)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, name: str, orientation: int, scale: int) -> None:
    """Against the definition: which side of the scene the first row and the first column of the file are.

    At scale 5 the JPEG is decoded at a quarter of its size.
    """
    scene = np.asarray(photo(SIZE * scale, SIZE * scale * 3 // 2, blur=3 * scale))
    first = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]  # row 0, column 0
    stored = scene.transpose(1, 0, 2) if first[0] in "LR" else scene  # rows of the file are columns of the scene
    stored = stored[::-1] if first[0] in "BR" else stored
    stored = stored[:, ::-1] if first[1] in "BR" else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    save = {"quality": 95} if name[2:] in ("jpg", "webp") else {}
    pixels, changes = decoded(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / name, exif=exif, **save)
    expected, _ = decoded(Image.fromarray(scene), tmp_path / f"scene.{name[2:]}", **save)
    assert np.abs(pixels - expected).max() <= (0 if name in ("x.png", "x.tif") else 14)  # of the compression
    assert (changes == []) == (orientation == 1)


@pytest.mark.parametrize("name", ["x.png", "x.webp"])  # of JPEG Pillow ignores it itself
def test_damaged_exif_is_reported_and_the_image_read(tmp_path: Path, name: str) -> None:
    plain, _ = decoded(photo(), tmp_path / name)
    pixels, changes = decoded(photo(), tmp_path / name, exif=b"Exif\0\0no TIFF header")
    assert (pixels == plain).all()
    assert changes == ["damaged EXIF, taken as upright"]


# ---- transparency


def transparent(mode: str) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """An image, its colours and its alpha in 0..255."""
    colours = np.asarray(photo(blur=1))
    alpha = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE).round().astype(np.uint8)
    if mode == "LA":
        grey = colours[..., 0]
        return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), np.dstack([grey] * 3), alpha
    return Image.fromarray(np.dstack([colours, alpha])), colours, alpha


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("background, rgb", [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_alpha_is_composited(tmp_path: Path, mode: str, background: str, rgb: tuple[int, int, int]) -> None:
    image, colours, alpha = transparent(mode)
    pixels, changes = decoded(image, tmp_path / "x.png", Preprocessing(SIZE, background=background))
    share = alpha[..., None] / 255
    assert np.abs(pixels - (share * colours + (1 - share) * np.array(rgb))).max() <= 1
    assert changes[-1] == f"transparency on {background}"


def test_a_palette_with_alpha_and_a_gif(tmp_path: Path) -> None:
    image = photo().quantize(8)
    alphas = bytes([0, 128, 255, 255, 255, 255, 255, 255])
    index, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    pixels, _ = decoded(image, tmp_path / "x.png", transparency=alphas)
    share = np.frombuffer(alphas, np.uint8)[index][..., None] / 255
    assert np.abs(pixels - (share * colours + (1 - share) * 255)).max() <= 1
    pixels, _ = decoded(image, tmp_path / "x.gif", transparency=3)
    assert (pixels[index == 3] == 255).all()
    assert (pixels[index != 3] == colours[index != 3]).all()


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_a_transparent_grey_value(tmp_path: Path, depth: int) -> None:
    top = 2**depth - 1
    values = np.random.default_rng(0).integers(0, 4, (SIZE, SIZE)) * (top // 3)
    bits = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1).reshape(SIZE, SIZE, 16)[..., -depth:]
    rows = [np.packbits(row).tobytes() for row in bits.reshape(SIZE, -1)]
    clear = top // 3
    pixels, _ = decoded(png(depth, 0, rows, (b"tRNS", struct.pack(">H", clear))), tmp_path / "x.png")
    expected = np.where(values == clear, 255, values * 255 // top)
    assert (pixels == expected[..., None]).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour(tmp_path: Path, depth: int) -> None:
    values = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE, 3)) * (2**depth - 1)
    rows = [row.astype(np.uint8 if depth == 8 else ">u2").tobytes() for row in values]
    clear = struct.pack(">HHH", 2**depth - 1, 0, 0)
    pixels, changes = decoded(png(depth, 2, rows, (b"tRNS", clear)), tmp_path / "x.png")
    red = (values == (2**depth - 1, 0, 0)).all(-1)
    assert red.any()
    assert (pixels == np.where(red[..., None], 255, (values > 0) * 255)).all()
    assert changes[-1] == "transparency on white"


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    pixels, changes = decoded(photo().convert("RGBA"), tmp_path / "x.png")
    assert (pixels == np.asarray(photo())).all()
    assert changes == []


# ---- several pictures, sizes, damage


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif", "x.mpo.jpg"])
def test_the_first_picture_of_several(tmp_path: Path, name: str) -> None:
    first, second = (Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue"))
    save: dict[str, Any] = {"format": "MPO"} if "mpo" in name else {}
    pixels, changes = decoded(first, tmp_path / name, save_all=True, append_images=[second], **save)
    assert np.abs(pixels - (255, 0, 0)).max() <= 6
    assert changes == ["first picture of several"]


@pytest.mark.parametrize("width, height", [(60, 60), (61, 40), (33, 97), (24, 31), (7, 31), (300, 24)])
def test_the_centre_is_that_of_the_resized_whole(tmp_path: Path, width: int, height: int) -> None:
    image = photo(width, height, blur=1)
    pixels, _ = decoded(image, tmp_path / "x.png")
    scale = SIZE / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - SIZE) // 2, (whole.height - SIZE) // 2
    assert np.abs(pixels - np.asarray(whole).astype(int)[top : top + SIZE, left : left + SIZE]).max() <= 1
    if width == height:
        theirs = torchvision.transforms.Resize(SIZE)(image)
        assert np.abs(pixels - np.asarray(theirs).astype(int)).max() <= 1


def test_a_strip_takes_no_more_memory_than_its_square(tmp_path: Path) -> None:
    """In a process whose memory may grow by 64 MiB; the whole strips, resized, would take 1.2 GB and more."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, [(4_000, 2), (2, 4_000), (60_000, 1)], strict=True):
        Image.new("RGB", size, "red").save(path)
    code = (
        "import resource, sys; from pathlib import Path; from simo_lightning.preprocessing import Preprocessing\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    assert (Preprocessing(224).read(path)[0] == [[[255]], [[0]], [[0]]]).all()"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    content = bytearray(png(1, 0, [b"\0" * 3] * SIZE))
    content[16:33] = header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png' does not decode as an image: .*exceeds limit"):
        Preprocessing(SIZE).read(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore")  # Pillow also warns of some
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.gif", "x.webp", "x.bmp", "x.ppm", "x.jp2"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    photo(64, 64, blur=0.5).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0, 0.01, 0.3, 0.6):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=rf"{name}' does not decode as an image"):
            Preprocessing(SIZE).read(tmp_path / name)


def test_a_file_that_would_start_a_program_is_no_image(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript, whatever the suffix."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"x\.png' does not decode as an image: its format is unknown"):
        Preprocessing(SIZE).read(tmp_path / "x.png")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    assert (
        as_nobody(tmp_path, lambda: Preprocessing(SIZE).read(tmp_path / "x.png"))
        == f"PermissionError {tmp_path / 'x.png'}"
    )


def as_nobody(folder: Path, act: Any) -> str:
    """The error of ``act`` in a process of another user, who may enter ``folder``; root may read everything."""
    for parent in (folder, *folder.parents):
        if os.stat(parent).st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer versions of Python warn of threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            act()
            answer = "no error"
        except BaseException as error:
            answer = f"{type(error).__name__} {getattr(error, 'filename', None) or error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"background": "whitish"}, "background must be a colour's name or #rrggbb, got 'whitish'"),
        ({"max_value": 0}, "max_value must be positive and finite, got 0"),
        ({"max_value": float("nan")}, "max_value must be positive and finite, got nan"),
        ({"max_value": float("inf")}, "max_value must be positive and finite, got inf"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"image_size": 8, **arguments})
