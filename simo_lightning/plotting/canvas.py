"""Size, text and argument checks of all figures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor

# A phone is 390 px of 1/96 in = 4.06 in wide: matplotlib's 10 pt text is then 8.1 pt high. Heights vary.
WIDTH = 5.0  # inches
DPI = 160  # 800 px wide
MOST_NAMES = 25  # tick labels of classes
MOST_CLASSES = 500  # rows of classes, each more than a pixel high
MOST_POINTS = 20_000
NAME_HEIGHT = 0.2  # inches, height of a line of 10 pt
_LONGEST_NAME = 14  # characters

# Text properties for names from users: matplotlib would read "$" as a formula, and TeX also "\", "%" and "_".
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}


def new_figure(height: float) -> Figure:
    """Empty figure of the common width, `height` in inches, not registered with pyplot."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="compressed")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG to the path, and as SVG beside it; the same figure gives the same files."""
    figure.savefig(path)
    with rc_context({"svg.hashsalt": "simo_lightning"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def printable(text: str) -> str:
    r"""The text on one line, white space as single spaces and unprintable characters as codes.

    Unprintable are control and format characters and the bytes of a file name that are not UTF-8 (in Python lone
    surrogates). The result can be encoded as UTF-8.

    Example:
        >>> printable("tabby\n\x00cat")
        'tabby \\x00cat'
    """
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _code(character) for character in text)


def drawable(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name as drawn: printable, characters without a glyph as codes, shortened in the middle if too long.

    Use with the text properties ``LITERAL``.

    Example:
        >>> drawable("hippopotamus", 8)
        'hippo…us'
    """
    text = "".join(character if _has_glyph(character) else _code(character) for character in printable(name))
    if len(text) <= longest:
        return text
    tail = longest // 4  # names with the same beginning often differ at the end
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"


def wrapped(name: str, width: int, most: int = 3) -> str:
    """The name as drawn, over up to `most` lines of at most `width` characters; what is left is cut in the middle.

    Lines end after a space, a hyphen, an underscore or a slash where there is one.

    Example:
        >>> wrapped("Royal-Gala-Apple", 8).split("\\n")
        ['Royal-', 'Gala-', 'Apple']
    """
    lines = wrapped_lines(drawable(name, longest=10_000), width)
    if len(lines) > most:
        lines = wrapped_lines(drawable(name, longest=max(2, most * width - width // 2)), width)[:most]
    return "\n".join(lines)


def wrapped_lines(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in re.findall(r"[^\s_/-]*[\s_/-]?", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.strip() for line in lines if line.strip()] or [""]


def set_title(axes: Axes, title: str, size: int = 11) -> None:
    """Set a title, which may have several lines, without formulas."""
    axes.set_title("\n".join(drawable(line, longest=200) for line in title.splitlines()), fontsize=size, **LITERAL)


def every_nth(count: int, most: int) -> range:
    """Every n-th of `count` indices from 0, with the smallest n that gives at most `most`.

    Example:
        >>> list(every_nth(7, 3))
        [0, 3, 6]
    """
    return range(0, count, max(1, -(-count // most)))


def share(part: int, whole: int) -> str:
    """Part of the data that a figure shows, for example ``500 of 10,000``."""
    return f"{part:,} of {whole:,}" if part < whole else f"{whole:,}"


def subset(count: int) -> Tensor:
    """Indices (ascending) of the points drawn: all of at most 20,000, otherwise 20,000 at random, the same every time.

    Example:
        >>> len(subset(1_000_000))
        20000
    """
    if count <= MOST_POINTS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST_POINTS].sort().values


def axis_names(class_names: Sequence[str]) -> tuple[range, list[str]]:
    """Indices and names of the classes with a tick label, at most 25."""
    indices = every_nth(len(class_names), MOST_NAMES)
    return indices, [drawable(class_names[index]) for index in indices]


def remove_ticks(axes: Axes) -> None:
    """Remove the ticks of axes without meaningful coordinates."""
    axes.set_xticks([])
    axes.set_yticks([])


def on_cpu(name: str, value: Tensor) -> Tensor:
    """The argument called `name`, detached, on the CPU; ValueError if it is not a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    return value.detach().cpu()


def check_names(class_names: Sequence[str], num_classes: int | None = None) -> None:
    """Raise ValueError unless the names are strings and, if `num_classes` is given, one per class."""
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be a sequence of strings, got {class_names!r:.100}")
    if num_classes is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names must name {num_classes} classes, got {len(class_names)} names")


def check_labels(labels: Tensor, class_names: Sequence[str]) -> None:
    """Raise ValueError unless every label has a name."""
    check_names(class_names)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(
            f"labels must be in 0..{len(class_names) - 1} for {len(class_names)} class_names, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


def _code(character: str) -> str:
    return ascii(character)[1:-1]  # "\x00", "\u732b"


def _has_glyph(character: str) -> bool:
    """Whether a font of matplotlib's setting ``font.family`` has the character; matplotlib caches both calls."""
    if character.isascii():
        return True
    fonts = (get_font(findfont(FontProperties(family=[family]))) for family in rcParams["font.family"])
    return any(font.get_char_index(ord(character)) for font in fonts)
