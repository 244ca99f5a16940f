"""Heat map of the cosines between class means."""

from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import canvas

_MOST_NUMBERS = 10  # classes, up to which every cell shows its number
_DARK = 0.68  # absolute cosine above which white text contrasts more with the cell than black text


def class_similarity_figure(means: ClassMoments | Tensor, class_names: Sequence[str]) -> Figure:
    """Heat map of the cosines between class means, on a fixed scale from -1 to 1.

    Of more than 500 classes every n-th is shown, and the title gives their number.

    Args:
        means: Class moments, or class means ``(C, D)``; classes without embeddings (``nan`` means) are grey.
        class_names: C names.

    Returns:
        Figure whose title gives the mean absolute cosine between different classes shown.

    Raises:
        ValueError: If the means are not ``(C, D)``, or the number of names is not C.

    Example:
        >>> figure = class_similarity_figure(torch.eye(3), ["cat", "dog", "ship"])
        >>> figure.axes[0].get_title()
        'Cosine between class means (mean |cos| 0.000)'
    """
    cosines, names = _shown(means, class_names)
    figure = canvas.new_figure(5.6)
    axes = figure.add_subplot()
    image = draw_cosines(axes, cosines)
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=30, pad=0.02)
    title = f"Cosine between class means (mean |cos| {float(_pairs(cosines)[2].abs().mean()):.3f})"
    if len(names) < len(class_names):
        title += f"\n{canvas.share(len(names), len(class_names))} classes"
    canvas.set_title(axes, title)
    indices, texts = canvas.axis_names(names)
    horizontal = max(map(len, texts), default=0) <= (3 if len(texts) <= 10 else 1)
    axes.set_xticks(indices, texts, rotation=0 if horizontal else 90, **canvas.LITERAL)
    axes.set_yticks(indices, texts, **canvas.LITERAL)
    axes.tick_params(length=0)
    if len(cosines) <= _MOST_NUMBERS:
        _write_numbers(axes, cosines)
    return figure


def describe_similarity(means: ClassMoments | Tensor, class_names: Sequence[str]) -> str:
    """Alternative text of :func:`class_similarity_figure`.

    Args:
        means: As for the figure.
        class_names: As for the figure.

    Returns:
        One sentence: the number of classes, the mean absolute cosine and the pair with the largest one.

    Raises:
        ValueError: As for the figure.

    Example:
        >>> describe_similarity(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), ["cat", "dog"])
        'Cosines between the means of 2 classes: mean size 0.60, largest 0.60 between cat and dog.'
    """
    cosines, names = _shown(means, class_names)
    present = int((~cosines.diagonal().isnan()).sum())
    count = canvas.share(present, len(class_names)) if len(names) < len(class_names) else present
    head = f"Cosines between the means of {count} class{'es' * (count != 1)}"
    first, second, values = _pairs(cosines)
    if len(values) == 0:
        return f"{head}: there is no pair."
    most = int(values.abs().argmax())
    pair = " and ".join(canvas.printable(names[int(index[most])]) for index in (first, second))
    return f"{head}: mean size {float(values.abs().mean()):.2f}, largest {float(values[most]):.2f} between {pair}."


def class_cosines(means: ClassMoments | Tensor) -> Tensor:
    """Cosines between class means.

    Args:
        means: Class moments, or class means ``(C, D)``.

    Returns:
        ``(C, C)`` in [-1, 1], float64 on the CPU; ``nan`` for classes without embeddings or with a zero mean.

    Raises:
        ValueError: If the means are not ``(C, D)``.

    Example:
        >>> class_cosines(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    means = _means(means).detach().cpu().double()
    unit = means / means.norm(dim=1, keepdim=True)
    return (unit @ unit.mT).clamp(-1, 1)


def draw_cosines(axes: Axes, cosines: Tensor) -> AxesImage:
    """Heat map ``(C, C)`` without names, from -1 (blue) over 0 (white) to 1 (red); ``nan`` is grey."""
    return axes.imshow(cosines.numpy(), cmap=colormaps["RdBu_r"].with_extremes(bad="0.75"), vmin=-1, vmax=1)


def _means(means: ClassMoments | Tensor) -> Tensor:
    if isinstance(means, ClassMoments):
        return means.means
    means = canvas.on_cpu("means", means)
    if means.ndim != 2:
        raise ValueError(f"means must have shape (C, D), got {tuple(means.shape)}")
    return means


def _shown(means: ClassMoments | Tensor, class_names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Cosines and names of the classes that the heat map shows."""
    means = _means(means)
    canvas.check_names(class_names, len(means))
    shown = canvas.every_nth(len(means), canvas.MOST_CLASSES)
    return class_cosines(means[list(shown)]), [class_names[index] for index in shown]


def _pairs(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two classes and the cosine of every pair of different classes with a defined cosine."""
    first, second = torch.triu_indices(len(cosines), len(cosines), offset=1)
    defined = ~cosines[first, second].isnan()
    first, second = first[defined], second[defined]
    return first, second, cosines[first, second]


def _write_numbers(axes: Axes, cosines: Tensor) -> None:
    """Two decimals per cell without a leading zero, so that ten columns fit a phone."""
    for row, values in enumerate(cosines.tolist()):
        for column, value in enumerate(values):
            if value == value:
                text = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")
                axes.text(column, row, text, ha="center", va="center", color="white" if abs(value) > _DARK else "black")
