"""Image files of all formats and depths, compared with Pillow, the definition of the format, or NumPy."""

import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torchvision
from PIL import ExifTags, Image, ImageCms, ImageFilter, ImageOps, features

from simo_lightning.preprocessing import Preprocessing

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
    with pytest.raises(ValueError, match=r"x\.png' does not decode as an image: cannot identify"):
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
