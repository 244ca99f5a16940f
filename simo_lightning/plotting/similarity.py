"""Cosines between class means, as a heat map."""

from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting.canvas import check_names, named_places, new_figure
from simo_lightning.plotting.colors import ink_on

_MOST_NUMBERS = 10  # classes, up to which a heat map says its numbers


def class_similarity_figure(means: ClassMoments | Tensor, class_names: Sequence[str]) -> Figure:
    """Heat map of the cosines between class means, on a fixed scale from -1 to 1.

    Args:
        means: Class moments, or class means ``(C, D)``; classes without rows, of ``nan`` mean, are grey.
        class_names: C names.

    Returns:
        Figure whose title says the mean absolute cosine of two different classes.

    Raises:
        ValueError: If there are not as many names as classes.

    Example:
        >>> figure = class_similarity_figure(torch.eye(3), ["cat", "dog", "ship"])
        >>> figure.axes[0].get_title()
        'Cosine between class means (mean |cos| 0.000)'
    """
    cosines = class_cosines(means)
    check_names(class_names, len(cosines))
    figure = new_figure(5.6)
    axes = figure.add_subplot()
    image = draw_cosines(axes, cosines)
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=30, pad=0.02)
    mean = float(_pairs(cosines)[2].abs().mean())
    axes.set_title(f"Cosine between class means (mean |cos| {mean:.3f})", fontsize=11)
    _name_ticks(axes, class_names)
    if len(cosines) <= _MOST_NUMBERS:
        _write_numbers(axes, image, cosines)
    return figure


def describe_similarity(means: ClassMoments | Tensor, class_names: Sequence[str]) -> str:
    """What :func:`class_similarity_figure` shows, in one sentence for those who do not see it.

    Args:
        means: As there.
        class_names: As there.

    Returns:
        The number of classes with embeddings, and the pair whose cosine is largest in size, with it.

    Raises:
        ValueError: If there are not as many names as classes.

    Example:
        >>> describe_similarity(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), ["cat", "dog"])
        'Cosines between the means of 2 classes: mean size 0.60, largest 0.60 between cat and dog.'
    """
    cosines = class_cosines(means)
    check_names(class_names, len(cosines))
    present = int((~cosines.diagonal().isnan()).sum())
    first, second, values = _pairs(cosines)
    if len(values) == 0:
        return f"Cosines between the means of {present} class{'es' * (present != 1)}: there is no pair."
    most = int(values.abs().argmax())
    pair = f"{class_names[int(first[most])]} and {class_names[int(second[most])]}"
    return (
        f"Cosines between the means of {present} classes: mean size {float(values.abs().mean()):.2f}, "
        f"largest {float(values[most]):.2f} between {pair}."
    )


def class_cosines(means: ClassMoments | Tensor) -> Tensor:
    """Cosines between class means.

    Args:
        means: Class moments, or class means ``(C, D)``.

    Returns:
        ``(C, C)`` in [-1, 1], float64 on the CPU; ``nan`` for classes without rows, and where a mean is zero.

    Example:
        >>> class_cosines(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    means = (means.means if isinstance(means, ClassMoments) else means).detach().cpu().double()
    unit = means / means.norm(dim=1, keepdim=True)
    return (unit @ unit.mT).clamp(-1, 1)


def draw_cosines(axes: Axes, cosines: Tensor) -> AxesImage:
    """Heat map without names.

    Args:
        axes: To draw on.
        cosines: ``(C, C)``; ``nan`` is grey.

    Returns:
        The image, from -1 (blue) over 0 (white) to 1 (red).
    """
    return axes.imshow(cosines.numpy(), cmap=colormaps["RdBu_r"].with_extremes(bad="0.75"), vmin=-1, vmax=1)


def _pairs(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two classes and the cosine of every pair of different classes that has one."""
    first, second = torch.triu_indices(len(cosines), len(cosines), offset=1)
    defined = ~cosines[first, second].isnan()
    first, second = first[defined], second[defined]
    return first, second, cosines[first, second]


def _name_ticks(axes: Axes, class_names: Sequence[str]) -> None:
    """Names on both axes; of too many classes only some."""
    places, names = named_places(class_names)
    upright = max(map(len, names), default=0) <= (3 if len(names) <= 10 else 1)
    axes.set_xticks(places, names, rotation=0 if upright else 90)
    axes.set_yticks(places, names)
    axes.tick_params(length=0)


def _write_numbers(axes: Axes, image: AxesImage, cosines: Tensor) -> None:
    """Two digits per cell, no leading zero: ten columns then fit a telephone."""
    for row, values in enumerate(cosines.tolist()):
        for column, value in enumerate(values):
            if value == value:
                text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")
                ink = ink_on([float(channel) for channel in image.to_rgba(value)])
                axes.text(column, row, text, ha="center", va="center", color=ink)
