"""Scatter plots of embeddings in the plane."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings
from simo_lightning.plotting import canvas
from simo_lightning.plotting.colors import class_colors, class_markers

_MOST_IN_LEGEND = 30  # classes; of more, names are drawn at the points if they fit
_MOST_VECTORS = 2_000  # points; more are pixels in a vector file too
_CHARACTER = 0.085  # inches, width of a wide character of 10 pt


def scatter_figure(points: Tensor, labels: Tensor, class_names: Sequence[str], title: str | None = None) -> Figure:
    """Points in the plane, coloured by class.

    Up to 30 classes are named in a legend below; of more, the names that fit are drawn at the class medians. Of more
    than 20,000 points 20,000 are drawn, the same in every call, and the title gives their number.

    Args:
        points: ``(N, 2)``, for example from :func:`project_2d`; both axes have the same scale.
        labels: Class of each point, ``(N,)``.
        class_names: Names of all classes; those without a point are not in the legend.
        title: Title; None: the number of points.

    Returns:
        Figure.

    Raises:
        ValueError: If shapes do not match, a label has no name, or a point is not finite.

    Example:
        >>> figure = scatter_figure(torch.zeros(3, 2), torch.tensor([0, 1, 1]), ["cat", "dog", "ship"])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['cat', 'dog']
    """
    points, labels, total = _checked(points, labels, class_names)
    figure = canvas.new_figure(4.8 + legend_height(labels, class_names))
    axes = figure.add_subplot()
    draw_points(axes, points, labels, class_names, square_around(points))
    count = canvas.share(len(points), total)
    if title is None:
        title = f"{count} embeddings"
    elif len(points) < total:
        title = f"{title}\n{count} points"
    canvas.set_title(axes, title)
    name_classes(figure, points, labels, class_names)
    return figure


def describe_scatter(points: Tensor, labels: Tensor, class_names: Sequence[str], title: str | None = None) -> str:
    """Alternative text of :func:`scatter_figure`.

    Args:
        points: As for the figure.
        labels: As for the figure.
        class_names: As for the figure.
        title: As for the figure.

    Returns:
        One sentence: the title, the number of points and classes, and the share of points whose nearest neighbour in
        the figure has their class: 1 where classes are separated, 1 over the number of classes where they are mixed.

    Raises:
        ValueError: As for the figure.

    Example:
        >>> describe_scatter(torch.tensor([[0.0, 0], [1, 0], [9, 0]]), torch.tensor([0, 0, 1]), ["cat", "dog"])
        'Map of 3 embeddings of 2 classes; 67 % of the points have a nearest neighbour of their own class.'
    """
    points, labels, total = _checked(points, labels, class_names)
    head = "Map" if title is None else f"{canvas.printable(title)}: map"
    text = f"{head} of {canvas.share(len(points), total)} embeddings of {len(labels.unique())} classes"
    if len(points) < 2:
        return f"{text}."
    share = neighbor_share(points, labels)
    return f"{text}; {100 * share:.0f} % of the points have a nearest neighbour of their own class."


def draw_points(
    axes: Axes, points: Tensor, labels: Tensor, class_names: Sequence[str], limits: Tensor, scale: float = 1.0
) -> None:
    """Draw points (N, 2) in the colour and marker of their class, within `limits` (x and y, low and high)."""
    size = scale * float(np.interp(len(points), (200, 400, 700, 3_000, 20_000), (30, 15, 9, 9, 2)))  # square points
    colors = np.array(class_colors(len(class_names)))[labels]
    markers = np.array(class_markers(len(class_names)))[labels]
    for marker in dict.fromkeys(
        markers.tolist()
    ):  # one collection per marker: one per class would take minutes for thousands
        x, y = points[markers == marker].T.numpy()
        # thin dark edge, so that yellow is visible on white
        style: dict[str, Any] = {"marker": marker, "edgecolors": "0.2", "linewidths": 0.25, "alpha": 0.8}
        style["rasterized"] = len(points) > _MOST_VECTORS
        axes.scatter(x, y, s=size, c=colors[markers == marker], **style)
    canvas.remove_ticks(axes)
    axes.set_xlim(*limits[0].tolist())
    axes.set_ylim(*limits[1].tolist())
    axes.set_aspect("equal")


def square_around(points: Tensor) -> Tensor:
    """Limits of a square around the points (N, 2), with a margin: ``(2, 2)``, x and y, low and high.

    Example:
        >>> square_around(torch.tensor([[0.0, 0.0], [10.0, 2.0]])).tolist()
        [[-0.5, 10.5], [-4.5, 6.5]]
    """
    if len(points) == 0:
        return torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    low, high = points.double().aminmax(dim=0)
    half = 0.55 * (high - low).max()
    half = half if half > 0 else torch.ones_like(half)
    center = (low + high) / 2
    return torch.stack([center - half, center + half], dim=1)


def neighbor_share(points: Tensor, labels: Tensor) -> float:
    """Share of the points whose nearest other point has their label."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(points.numpy()).kneighbors()[1].squeeze(1)  # (N,)
    return float((labels[nearest] == labels).double().mean())


def legend_height(labels: Tensor, class_names: Sequence[str]) -> float:
    """Height of the legend in inches."""
    present = labels.unique().tolist()
    if len(present) > _MOST_IN_LEGEND:
        return 0.0
    return canvas.NAME_HEIGHT * -(-len(present) // _legend_columns(present, class_names))


def name_classes(figure: Figure, points: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    """Legend below the axes, or for many classes the names that fit, at the class medians in the first axes."""
    present = labels.unique().tolist()
    if len(present) > _MOST_IN_LEGEND:
        _name_medians(figure.axes[0], points, labels, class_names)
    elif present:
        colors, markers = class_colors(len(class_names)), class_markers(len(class_names))
        handles = [
            Line2D([], [], ls="", marker=markers[label], c=colors[label], mec="0.2", mew=0.25, ms=6.5, alpha=0.8)
            for label in present
        ]
        columns = _legend_columns(present, class_names)
        legend = figure.legend(
            handles,
            [str(label) for label in present],  # names are set below: matplotlib omits labels that begin with "_"
            loc="outside lower center",
            ncols=columns,
            columnspacing=1.0,
            handletextpad=0.2,
            frameon=False,
        )
        for text, label in zip(legend.get_texts(), present, strict=True):
            text.set(text=canvas.drawable(class_names[label]), **canvas.LITERAL)


def _legend_columns(present: Sequence[int], class_names: Sequence[str]) -> int:
    longest = max((len(canvas.drawable(class_names[label])) for label in present), default=1)
    most = max(1, int((canvas.WIDTH - 0.3) / (0.45 + _CHARACTER * longest)))
    rows = max(1, -(-len(present) // most))
    return max(1, -(-len(present) // rows))  # rows of similar length


def _name_medians(axes: Axes, points: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    side = 4.6  # inches, approximately, of the axes
    taken: list[tuple[float, float, float]] = []
    for label in labels.unique().tolist():
        x, y = points[labels == label].double().median(dim=0).values.tolist()
        name = canvas.drawable(class_names[label])
        half = _CHARACTER * len(name) / 2
        across, up = side * (x - left) / (right - left), side * (y - bottom) / (top - bottom)
        inside = half < across < side - half
        if inside and all(abs(across - a) > half + h or abs(up - u) > canvas.NAME_HEIGHT for a, u, h in taken):
            taken.append((across, up, half))
            halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.8)]
            style = {"ha": "center", "va": "bottom", "path_effects": halo, **canvas.LITERAL}
            axes.annotate(name, (x, y), (0, 3), textcoords="offset points", **style)


def _checked(points: Tensor, labels: Tensor, class_names: Sequence[str]) -> tuple[Tensor, Tensor, int]:
    """Points and labels to draw, on the CPU, and the number of all points."""
    points, labels = canvas.on_cpu("points", points), canvas.on_cpu("labels", labels)
    check_embeddings(points, labels)
    if points.shape[1] != 2:
        raise ValueError(f"points must have shape (N, 2), got {tuple(points.shape)}")
    canvas.check_labels(labels, class_names)
    kept = canvas.subset(len(points))
    if not points.isfinite().all():
        raise ValueError(f"points must be finite, got nan or inf in {int((~points.isfinite()).any(1).sum())} of them")
    return points[kept].to(torch.promote_types(points.dtype, torch.float32)), labels[kept].long(), len(points)
