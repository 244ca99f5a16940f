"""Query images and their nearest neighbours."""

from collections import Counter
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.plotting import canvas

_WRONG = "#D55E00"
_CHARACTER = 0.077  # inches, width of a character of 9 pt
_LINES = 3  # of a name


def neighbors_figure(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """Query images on the left, their neighbours on the right, nearest first, each above the name of its class.

    A neighbour of another class than the query's has a thick border and a cross before its name.

    Args:
        images: uint8 ``(Q, 1 + K, channels, height, width)``, grey or RGB; the query first. Names take up to three lines.
        labels: Class of each image, ``(Q, 1 + K)``.
        class_names: Names of all classes.

    Returns:
        Figure with one row per query.

    Raises:
        ValueError: If shapes do not match, or a label has no name.

    Example:
        >>> images = torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8)
        >>> figure = neighbors_figure(images, torch.tensor([[0, 0, 1]]), ["cat", "dog"])
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['cat', 'cat', '✗ dog']
    """
    images, labels = canvas.on_cpu("images", images), canvas.on_cpu("labels", labels)
    _check(images, labels, class_names)
    queries, columns = labels.shape
    side = (canvas.WIDTH - 0.08 * columns) / (columns + 0.2)  # inches, approximately, of an image
    longest = max(5, int(side / _CHARACTER))
    shown = {canvas.wrapped(f"✗ {class_names[label]}", longest, _LINES) for label in labels.unique().tolist()}
    lines = max(name.count("\n") for name in shown) + 1
    height = side * images.shape[3] / images.shape[4] + 0.2 + 0.15 * lines
    figure = canvas.new_figure(0.4 + queries * height)
    figure.suptitle("Images and their nearest neighbours", fontsize=11)
    panels = figure.subplots(queries, columns + 1, squeeze=False, width_ratios=[1, 0.2, *[1] * (columns - 1)])
    for spacer in panels[:, 1]:
        spacer.remove()
    for query, row in enumerate(panels):
        for column, axes in enumerate((row[0], *row[2:])):
            axes.imshow(images[query, column].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)  # (H, W, C)
            canvas.remove_ticks(axes)
            wrong = bool(labels[query, column] != labels[query, 0])
            for spine in axes.spines.values():
                spine.set(linewidth=3.0 if wrong else 0.6, color=_WRONG if wrong else "0.6")
            mark, color = ("✗ ", _WRONG) if wrong else ("", "black")
            name = canvas.wrapped(mark + class_names[int(labels[query, column])], longest, _LINES)
            axes.set_xlabel(name, color=color, labelpad=3, fontsize=9, **canvas.LITERAL)
    return figure


def describe_neighbors(labels: Tensor, class_names: Sequence[str]) -> str:
    """Alternative text of :func:`neighbors_figure`.

    Args:
        labels: As for the figure.
        class_names: As for the figure.

    Returns:
        How many neighbours share the class of their query, and the most frequent confusion.

    Raises:
        ValueError: If the shape is not ``(Q, 1 + K)``, or a label has no name.

    Example:
        >>> describe_neighbors(torch.tensor([[0, 0, 1]]), ["cat", "dog"])
        '1 image with its 2 nearest neighbours each: 1 of 2 neighbours share the class. Most often wrong: dog for cat.'
    """
    labels = canvas.on_cpu("labels", labels)
    if labels.ndim != 2 or labels.shape[1] < 2:
        raise ValueError(f"labels must have shape (Q, 1 + K) with K at least 1, got {tuple(labels.shape)}")
    canvas.check_labels(labels, class_names)
    wrong = Counter((row[0], other) for row in labels.tolist() for other in row[1:] if other != row[0])
    neighbors = labels[:, 1:].numel()
    text = (
        f"{len(labels)} image{'s' * (len(labels) != 1)} with {'their' if len(labels) != 1 else 'its'} "
        f"{labels.shape[1] - 1} nearest neighbours each: {neighbors - wrong.total()} of {neighbors} neighbours share "
        "the class."
    )
    if not wrong:
        return text
    own, other = (canvas.printable(class_names[label]) for label in wrong.most_common(1)[0][0])
    return f"{text} Most often wrong: {other} for {own}."


def _check(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if images.ndim != 5 or images.shape[1] < 2 or images.shape[2] not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8 of shape (Q, 1 + K, 1 or 3, height, width) with K at least 1, "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:2]:
        raise ValueError(f"labels must have shape {tuple(images.shape[:2])} to match images, got {tuple(labels.shape)}")
    canvas.check_labels(labels, class_names)
