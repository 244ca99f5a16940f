"""What all figures share: their width, the text they draw, and the checks of names and labels."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor

# A phone shows 390 px of 1/96 in, 4.06 in: text of matplotlib's 10 pt is then 8.1 pt high. Heights are free.
WIDTH = 5.0  # inches
DPI = 160  # 800 px wide
MOST_NAMES = 25  # classes that an axis names
MOST_CLASSES = 500  # classes that have a row of their own, each more than a pixel high
MOST_POINTS = 20_000
_LONGEST_NAME = 14  # characters

# Properties of every text that comes from outside: matplotlib would read "$" as a formula, TeX also "\", "%" and "_".
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}


def new_figure(height: float, layout: str | None = "compressed") -> Figure:
    """Empty figure of the common width, `height` in inches, not registered with pyplot."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]


def printable(text: str) -> str:
    r"""The text on one line: white space becomes single spaces, unprintable characters become their codes.

    Unprintable are control and format characters, and bytes of a file name that are not UTF-8 (which Python keeps as
    lone surrogates). The result can be encoded as UTF-8.

    Example:
        >>> printable("tabby\n\x00cat")
        'tabby \\x00cat'
    """
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _code(character) for character in text)


def drawable(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name as a figure shows it: printable, characters without a glyph as codes, the middle cut out if too long.

    Draw it with the properties ``LITERAL``.

    Example:
        >>> drawable("hippopotamus", 8)
        'hippo…us'
    """
    text = "".join(character if _has_glyph(character) else _code(character) for character in printable(name))
    if len(text) <= longest:
        return text
    tail = longest // 4  # names that share their beginning often differ at their end
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"


def set_title(axes: Axes, title: str, size: int = 11) -> None:
    """Set a title, literally; it may have several lines."""
    axes.set_title("\n".join(drawable(line, longest=200) for line in title.splitlines()), fontsize=size, **LITERAL)


def every_nth(count: int, most: int) -> range:
    """The first of `count` indices and every n-th after it, with the smallest n that gives at most `most`.

    Example:
        >>> list(every_nth(7, 3))
        [0, 3, 6]
    """
    return range(0, count, max(1, -(-count // most)))


def share(part: int, whole: int) -> str:
    """How much of the data a figure shows, for example ``500 of 10,000``."""
    return f"{part:,} of {whole:,}" if part < whole else f"{whole:,}"


def subset(count: int) -> Tensor:
    """Indices (ascending) of the points in use: all of at most 20,000, else 20,000 at random, always the same.

    Example:
        >>> len(subset(1_000_000))
        20000
    """
    if count <= MOST_POINTS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST_POINTS].sort().values


def axis_names(class_names: Sequence[str]) -> tuple[range, list[str]]:
    """Indices of the at most 25 classes that an axis names, and their names."""
    places = every_nth(len(class_names), MOST_NAMES)
    return places, [drawable(class_names[place]) for place in places]


def remove_ticks(axes: Axes) -> None:
    """Take the ticks off where the coordinates mean nothing."""
    axes.set_xticks([])
    axes.set_yticks([])


def on_cpu(name: str, value: Tensor) -> Tensor:
    """The argument of that name, detached, on the CPU; ValueError if it is no tensor."""
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
