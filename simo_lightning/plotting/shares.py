"""Orthogonal shares of one embedding as bars, and their means over the images of each class."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.functional.decomposition import OrthogonalShares
from simo_lightning.plotting import canvas

_ROW = 0.26  # inches, height of a bar
_LONGEST_NAME = 24  # characters
_OWN, _NEXT, _OTHERS, _NONE = "#0072B2", "#E69F00", "0.72", "white"


class ShareRow(NamedTuple):
    """One bar: a class, the other classes together, or the rest."""

    name: str
    value: float
    kind: str = "class"  # or "others" or "rest"


def share_rows(shares: Tensor, rest: Tensor | float, class_names: Sequence[str], most: int = 8) -> list[ShareRow]:
    """The largest shares of one embedding, those of the other classes together, and the rest.

    Args:
        shares: Of each class, ``(C,)``.
        rest: Outside of the span of the class means, a scalar.
        class_names: C names.
        most: Classes with a row of their own, largest first.

    Returns:
        Rows whose values sum to 1.

    Raises:
        ValueError: If a shape is wrong, or the number of names is not C.

    Example:
        >>> [row[:2] for row in share_rows(torch.tensor([0.25, 0.5, 0.125]), 0.125, ["cat", "dog", "owl"], most=2)]
        [('dog', 0.5), ('cat', 0.25), ('1 other class', 0.125), ('no class', 0.125)]
    """
    shares = canvas.on_cpu("shares", shares)
    if shares.ndim != 1:
        raise ValueError(f"shares must have shape (C,), got {tuple(shares.shape)}")
    canvas.check_names(class_names, len(shares))
    order = shares.argsort(descending=True, stable=True).tolist()
    rows = [ShareRow(class_names[index], float(shares[index])) for index in order[:most]]
    others = len(order) - len(rows)
    if others:
        text = f"{others:,} other class{'es' * (others != 1)}"
        rows.append(ShareRow(text, float(shares[order[most:]].sum()), "others"))
    return [*rows, ShareRow("no class", float(rest), "rest")]


def shares_figure(
    shares: Tensor, rest: Tensor | float, class_names: Sequence[str], title: str = "Shares of the embedding"
) -> Figure:
    """Orthogonal shares of one embedding as bars: the largest eight classes, the other classes together, the rest.

    Args:
        shares: Of each class, ``(C,)``; of :func:`~simo_lightning.functional.orthogonal_shares`.
        rest: The share of no class, a scalar.
        class_names: C names.
        title: Of the figure.

    Returns:
        Figure with one bar for each row of :func:`share_rows`, and its value in per cent.

    Raises:
        ValueError: If a shape is wrong, or the number of names is not C.

    Example:
        >>> figure = shares_figure(torch.tensor([0.25, 0.5]), 0.25, ["cat", "dog"])
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [0.5, 0.25, 0.25]
    """
    rows = share_rows(shares, rest, class_names)
    figure = canvas.new_figure(0.9 + _ROW * len(rows))
    axes = figure.add_subplot()
    colors = {"class": _OWN, "others": _OTHERS, "rest": _NONE}
    values = [row.value for row in rows]
    bars = axes.barh(range(len(rows)), values, height=0.75, color=[colors[row.kind] for row in rows])
    bars[-1].set(edgecolor="0.4", hatch="////", linewidth=0.6)
    names = [canvas.drawable(row.name, _LONGEST_NAME) for row in rows]
    axes.set_yticks(range(len(rows)), names, **canvas.LITERAL)
    for index, value in enumerate(values):
        axes.annotate(percent(value), (value, index), (3, 0), textcoords="offset points", va="center", fontsize=9)
    canvas.set_title(axes, title)
    _share_axis(figure, len(rows), most=1.15)
    return figure


def describe_shares(shares: Tensor, rest: Tensor | float, class_names: Sequence[str]) -> str:
    """Alternative text of :func:`shares_figure`.

    Args:
        shares: As for the figure.
        rest: As for the figure.
        class_names: As for the figure.

    Returns:
        One sentence with every row.

    Raises:
        ValueError: As for the figure.

    Example:
        >>> describe_shares(torch.tensor([0.25, 0.5]), 0.25, ["cat", "dog"])
        'Shares of the embedding: dog 50.0 %, cat 25.0 %, no class 25.0 %.'
    """
    rows = share_rows(shares, rest, class_names)
    parts = (f"{canvas.printable(row.name)} {percent(row.value)}" for row in rows)
    return f"Shares of the embedding: {', '.join(parts)}."


def class_shares_figure(decomposed: OrthogonalShares, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """Mean orthogonal shares of the images of each class: which classes its images lean to, and what belongs to none.

    One bar per class, the class with the smallest share of its own on top, in four parts: its own share, that of the
    other class with the largest mean share, which is named at the right, those of all others, and the rest. Of more
    than 25 classes those with the smallest shares of their own are shown, and the title gives their number.

    Args:
        decomposed: Shares ``(N, C)`` and rest ``(N,)``, of :func:`~simo_lightning.functional.orthogonal_shares`.
        labels: Class of each image, ``(N,)``.
        class_names: C names.

    Returns:
        The figure.

    Raises:
        ValueError: If shapes do not match, or a label has no name.

    Example:
        >>> decomposed = OrthogonalShares(torch.tensor([[0.75, 0.25], [0.5, 0.25]]), torch.tensor([0.0, 0.25]))
        >>> figure = class_shares_figure(decomposed, torch.tensor([0, 1]), ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['dog', 'cat']
    """
    means, order = _class_means(decomposed, labels, class_names)
    shown = order[: canvas.MOST_NAMES]
    figure = canvas.new_figure(1.3 + _ROW * max(len(shown), 1))
    axes = figure.add_subplot()
    left = torch.zeros(len(shown), dtype=torch.float64)
    parts = (("own class", _OWN), ("next class, at the right", _NEXT), ("other classes", _OTHERS), ("no class", _NONE))
    for part, (name, color) in enumerate(parts):
        values = means.parts[shown, part]
        bars = axes.barh(range(len(shown)), values.numpy(), 0.8, left.numpy(), color=color, label=name)
        if color == _NONE:
            for bar in bars:
                bar.set(edgecolor="0.4", hatch="////", linewidth=0.6)
        left += values
    axes.set_yticks(range(len(shown)), [canvas.drawable(class_names[label]) for label in shown], **canvas.LITERAL)
    for row, label in enumerate(shown):
        if means.next_class[label] >= 0:
            name = canvas.drawable(class_names[means.next_class[label]])
            axes.annotate(name, (1, row), (4, 0), textcoords="offset points", va="center", **canvas.LITERAL)
    count = f"\n{len(shown)} of {len(order)} classes, the smallest own shares first" if len(shown) < len(order) else ""
    canvas.set_title(axes, f"Mean share of the embeddings of each class{count}")
    _share_axis(figure, len(shown), most=1.0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def describe_class_shares(decomposed: OrthogonalShares, labels: Tensor, class_names: Sequence[str]) -> str:
    """Alternative text of :func:`class_shares_figure`.

    Args:
        decomposed: As for the figure.
        labels: As for the figure.
        class_names: As for the figure.

    Returns:
        One sentence: the mean parts over all images, and the class with the smallest share of its own.

    Raises:
        ValueError: As for the figure.

    Example:
        >>> decomposed = OrthogonalShares(torch.tensor([[0.75, 0.25], [0.5, 0.25]]), torch.tensor([0.0, 0.25]))
        >>> describe_class_shares(decomposed, torch.tensor([0, 1]), ["cat", "dog"]).split("; ")[1]
        'smallest own share 25.0 %, of dog, whose next class is cat with 50.0 %.'
    """
    means, order = _class_means(decomposed, labels, class_names)
    if not order:
        return "Mean shares of each class: there are no embeddings."
    own = decomposed.shares.detach().cpu().gather(1, labels.cpu().unsqueeze(1)).double().mean()
    rest = decomposed.rest.detach().cpu().double().mean()
    text = (
        f"Mean shares of {len(order):,} class{'es' * (len(order) != 1)}: own class {percent(float(own))}, other "
        f"classes {percent(float(1 - own - rest))}, no class {percent(float(rest))}; smallest own share "
    )
    worst = order[0]
    text += f"{percent(float(means.parts[worst, 0]))}, of {canvas.printable(class_names[worst])}"
    if means.next_class[worst] < 0:
        return f"{text}."
    name = canvas.printable(class_names[means.next_class[worst]])
    return f"{text}, whose next class is {name} with {percent(float(means.parts[worst, 1]))}."


def percent(value: float) -> str:
    """A share with one decimal.

    Example:
        >>> percent(0.1234)
        '12.3 %'
    """
    return f"{round(100 * value, 1) + 0.0:.1f} %"


class _ClassMeans(NamedTuple):
    parts: Tensor  # (C, 4): own, next class, other classes, no class; nan for a class without images
    next_class: list[int]  # (C,), -1 if there is no other class


def _class_means(
    decomposed: OrthogonalShares, labels: Tensor, class_names: Sequence[str]
) -> tuple[_ClassMeans, list[int]]:
    """Mean parts of each class, and the classes with images, the smallest own share first."""
    shares, rest = (canvas.on_cpu(name, getattr(decomposed, name)).double() for name in ("shares", "rest"))
    labels = canvas.on_cpu("labels", labels)
    if shares.ndim != 2 or rest.shape != shares.shape[:1] or labels.shape != rest.shape:
        raise ValueError(
            f"shares, rest and labels must have shapes (N, C), (N,) and (N,), got {tuple(shares.shape)}, "
            f"{tuple(rest.shape)} and {tuple(labels.shape)}"
        )
    classes = shares.shape[1]
    canvas.check_names(class_names, classes)
    canvas.check_labels(labels, class_names)
    counts = labels.bincount(minlength=classes).unsqueeze(1)
    sums = torch.zeros(classes, classes + 1, dtype=torch.float64)
    means = sums.index_add_(0, labels, torch.cat((shares, rest.unsqueeze(1)), dim=1)) / counts  # (C, C + 1)
    own, none = means.diagonal(), means[:, -1]
    next_class, next_share = [-1] * classes, torch.zeros(classes, dtype=torch.float64)
    if classes > 1:
        largest = means[:, :-1].clone().fill_diagonal_(-1).max(dim=1)
        next_class, next_share = largest.indices.tolist(), largest.values
    others = (means[:, :-1].sum(dim=1) - own - next_share).clamp(min=0)
    order = [label for label in own.argsort(stable=True).tolist() if counts[label] > 0]
    return _ClassMeans(torch.stack((own, next_share, others, none), dim=1), next_class), order


def _share_axis(figure: Figure, rows: int, most: float) -> None:
    """Per cent from left to right, the first row on top."""
    (axes,) = figure.axes
    axes.set_xlim(0, most)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
