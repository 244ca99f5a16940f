"""What all figures share: a width that a phone can show, class names that fit, and the checks of names and labels."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# A telephone shows 390 px of 1/96 in, 4.06 in: text of matplotlib's 10 pt is then 8.1 pt high. Heights are free.
WIDTH = 5.0  # inches
DPI = 160  # 800 px wide
MOST_NAMES = 25  # classes, up to which an axis names every one
_LONGEST_NAME = 14  # characters


def new_figure(height: float, layout: str | None = "compressed") -> Figure:
    """Empty figure of the common width.

    Args:
        height: In inches.
        layout: Of matplotlib; None: the caller places its axes.

    Returns:
        The figure, known to no pyplot.
    """
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]


def shorten(name: str, longest: int = _LONGEST_NAME) -> str:
    """Name that fits.

    Args:
        name: Any.
        longest: Characters.

    Returns:
        The name, its end replaced by an ellipsis where it is longer.

    Example:
        >>> shorten("hippopotamus", 6)
        'hippo…'
    """
    return name if len(name) <= longest else name[: longest - 1] + "…"


def named_places(class_names: Sequence[str]) -> tuple[range, list[str]]:
    """Which classes an axis names, and how: all of a few, every n-th of many.

    Args:
        class_names: C names.

    Returns:
        Indices of at most 25 classes, evenly apart, and their names, shortened.

    Example:
        >>> named_places(["a", "b"])
        (range(0, 2), ['a', 'b'])
    """
    step = 1 + (len(class_names) - 1) // MOST_NAMES
    places = range(0, len(class_names), max(step, 1))
    return places, [shorten(class_names[place]) for place in places]


def bare(axes: Axes) -> None:
    """Take the ticks off, where the numbers mean nothing.

    Args:
        axes: To change.
    """
    axes.set_xticks([])
    axes.set_yticks([])


def check_names(class_names: Sequence[str], num_classes: int) -> None:
    """Raise unless there is one name per class.

    Args:
        class_names: The names.
        num_classes: C.

    Raises:
        ValueError: With both numbers.
    """
    if len(class_names) != num_classes:
        raise ValueError(f"class_names must name {num_classes} classes, got {len(class_names)} names")


def check_labels(labels: Tensor, class_names: Sequence[str]) -> None:
    """Raise unless every label has a name.

    Args:
        labels: Integers of any shape.
        class_names: C names.

    Raises:
        ValueError: With the range of the labels.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(
            f"labels must be in 0..{len(class_names) - 1} for {len(class_names)} class_names, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
