"""Chosen images with the images whose embeddings are nearest to theirs."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.plotting.canvas import WIDTH, check_labels, new_figure, shorten

_WRONG = "#D55E00"
_MARGIN, _GAP = 0.08, 0.07  # inches, at the edges and between images
_QUERY_GAP = 0.2  # inches more, between the query and its neighbours
_TEXT = 0.2  # inches, of a line of 10 pt
_CHARACTER = 0.09  # inches, of a letter of 10 pt


def neighbors_figure(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """Chosen images on the left, on the right those nearest to them, the nearest first, each over its class.

    A neighbour of another class than the query's has a thick frame and its name in the frame's colour, with a cross.

    Args:
        images: uint8 ``(Q, 1 + K, channels, height, width)``, grey or RGB; the query first. Up to six neighbours leave
            room for their names.
        labels: Classes, ``(Q, 1 + K)``.
        class_names: Names of all classes.

    Returns:
        Figure with one line per query.

    Raises:
        ValueError: If the shapes, or the labels and the number of names, do not fit.

    Example:
        >>> import torch
        >>> images = torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8)
        >>> figure = neighbors_figure(images, torch.tensor([[0, 0, 1]]), ["cat", "dog"])
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['cat', 'cat', '✗ dog']
    """
    _check(images, labels, class_names)
    queries, columns = labels.shape
    side = (WIDTH - 2 * _MARGIN - _QUERY_GAP - (columns - 1) * _GAP) / columns
    tall = side * images.shape[3] / images.shape[4]
    row = tall + _TEXT + 0.12
    height = _TEXT + 0.15 + queries * row
    figure = new_figure(height, layout=None)
    first = _MARGIN + side + _GAP + _QUERY_GAP
    for text, left in (("Image", _MARGIN), ("Nearest neighbours", first)):
        figure.text(left / WIDTH, 1 - 0.08 / height, text, va="top", fontsize=11)
    longest = max(3, int(side / _CHARACTER))
    for query in range(queries):
        for column in range(columns):
            left = _MARGIN + column * (side + _GAP) + (_QUERY_GAP if column else 0)
            bottom = height - _TEXT - 0.15 - query * row - tall
            axes = figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, tall / height))
            picture = images[query, column].permute(1, 2, 0).cpu().numpy()  # (height, width, channels)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            wrong = bool(labels[query, column] != labels[query, 0])
            for spine in axes.spines.values():
                spine.set(linewidth=3.0 if wrong else 0.6, color=_WRONG if wrong else "0.6")
            name = ("✗ " if wrong else "") + class_names[int(labels[query, column])]
            axes.set_xlabel(shorten(name, longest), color=_WRONG if wrong else "black", labelpad=3)
    return figure


def describe_neighbors(labels: Tensor, class_names: Sequence[str]) -> str:
    """What :func:`neighbors_figure` shows, in one sentence for those who do not see it.

    Args:
        labels: As there.
        class_names: As there.

    Returns:
        How many neighbours share their query's class, and which other classes stand out.

    Raises:
        ValueError: If the shape, or the labels and the number of names, do not fit.

    Example:
        >>> import torch
        >>> describe_neighbors(torch.tensor([[0, 0, 1]]), ["cat", "dog"])
        '1 image with its 2 nearest neighbours each: 1 of 2 neighbours share the class. Most often wrong: dog for cat.'
    """
    if labels.ndim != 2 or labels.shape[1] < 2:
        raise ValueError(f"labels must have shape (Q, 1 + K) with K at least 1, got {tuple(labels.shape)}")
    check_labels(labels, class_names)
    query, found = labels[:, :1].cpu(), labels[:, 1:].cpu()
    right = int((query == found).sum())
    text = (
        f"{len(labels)} image{'s' * (len(labels) != 1)} with {'their' if len(labels) != 1 else 'its'} {found.shape[1]} "
        f"nearest neighbours each: {right} of {found.numel()} neighbours share the class."
    )
    pairs = [(own, other) for own, others in zip(query, found, strict=True) for other in others if other != own]
    wrong = [(class_names[int(own)], class_names[int(other)]) for own, other in pairs]
    if not wrong:
        return text
    own, other = max(wrong, key=wrong.count)
    return f"{text} Most often wrong: {other} for {own}."


def _check(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if images.ndim != 5 or images.shape[1] < 2 or images.shape[2] not in (1, 3) or str(images.dtype) != "torch.uint8":
        raise ValueError(
            f"images must be uint8 of shape (Q, 1 + K, 1 or 3, height, width) with K at least 1, "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:2]:
        raise ValueError(f"labels must have shape {tuple(images.shape[:2])} to match images, got {tuple(labels.shape)}")
    check_labels(labels, class_names)
