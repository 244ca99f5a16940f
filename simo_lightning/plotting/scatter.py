"""Points in the plane, coloured by class."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings
from simo_lightning.plotting.canvas import WIDTH, bare, check_labels, new_figure, shorten
from simo_lightning.plotting.colors import class_colors, class_markers

_MOST_IN_LEGEND = 30  # classes; of more, names stand at the points where there is room
_NAME_HEIGHT = 0.2  # inches, of a line of 10 pt
_CHARACTER = 0.085  # inches, of a wide letter of 10 pt


def scatter_figure(points: Tensor, labels: Tensor, class_names: Sequence[str], title: str | None = None) -> Figure:
    """Points in the plane, coloured by class.

    Up to 30 classes are named in a legend below; of more, as many as there is room for are named at their medians.

    Args:
        points: ``(N, 2)``, for example of :func:`project_2d`; one unit is as long on both axes.
        labels: Class of each point, ``(N,)``.
        class_names: Names of all classes; those without a point are not in the legend.
        title: Title; None: how many points there are.

    Returns:
        Figure.

    Raises:
        ValueError: If the shapes, or the labels and the number of names, do not fit.

    Example:
        >>> figure = scatter_figure(torch.zeros(3, 2), torch.tensor([0, 1, 1]), ["cat", "dog", "ship"])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['cat', 'dog']
    """
    points, labels = _checked(points, labels, class_names)
    rows = legend_rows(labels, class_names)
    figure = new_figure(4.8 + _NAME_HEIGHT * rows)
    axes = figure.add_subplot()
    draw_points(axes, points, labels, class_names, limits_of([points]))
    axes.set_title(f"{len(points)} embeddings" if title is None else title, fontsize=11)
    name_classes(figure, axes, points, labels, class_names)
    return figure


def describe_scatter(points: Tensor, labels: Tensor, class_names: Sequence[str], title: str | None = None) -> str:
    """What :func:`scatter_figure` shows, in one sentence for those who do not see it.

    Args:
        points: As there.
        labels: As there.
        class_names: As there.
        title: As there; what the points are.

    Returns:
        The title, the number of points and classes, and how often a point's nearest neighbour in the picture is of its
        class: 1 where classes lie apart, 1 over the number of classes where they are mixed.

    Raises:
        ValueError: If the shapes, or the labels and the number of names, do not fit.

    Example:
        >>> describe_scatter(torch.tensor([[0.0, 0], [1, 0], [9, 0]]), torch.tensor([0, 0, 1]), ["cat", "dog"])
        'Map of 3 embeddings of 2 classes; 67 % of the points have a nearest neighbour of their own class.'
    """
    points, labels = _checked(points, labels, class_names)
    head = "" if title is None else f"{title}: "
    text = f"{head}{'map' if head else 'Map'} of {len(points)} embeddings of {len(labels.unique())} classes"
    if len(points) < 2:
        return text + "."
    from sklearn.neighbors import NearestNeighbors

    nearest = torch.from_numpy(NearestNeighbors(n_neighbors=1).fit(points.numpy()).kneighbors()[1]).squeeze(1)  # (N,)
    share = float((labels[nearest] == labels).double().mean())
    return f"{text}; {100 * share:.0f} % of the points have a nearest neighbour of their own class."


def draw_points(
    axes: Axes, points: Tensor, labels: Tensor, class_names: Sequence[str], limits: Tensor, scale: float = 1.0
) -> None:
    """Points of each class in its colour and marker, without names.

    Args:
        axes: To draw on; ticks are taken off.
        points: ``(N, 2)``.
        labels: ``(N,)``.
        class_names: C names, for a legend.
        limits: ``(2, 2)``: lowest and highest x, lowest and highest y.
        scale: Of the markers' area.
    """
    size = scale * float(min(30.0, max(9.0, 6000 / max(len(points), 1))))
    colors, markers = class_colors(len(class_names)), class_markers(len(class_names))
    for label in labels.unique().tolist():
        x, y = points[labels == label].T.numpy()
        # a thin dark edge: yellow would not show on white
        style = {"c": colors[label], "marker": markers[label], "edgecolors": "0.2", "linewidths": 0.25}
        axes.scatter(x, y, s=size, alpha=0.8, label=shorten(class_names[label]), **style)
    bare(axes)
    axes.set_xlim(*limits[0].tolist())
    axes.set_ylim(*limits[1].tolist())
    axes.set_aspect("equal")


def limits_of(frames: Sequence[Tensor]) -> Tensor:
    """Square that holds the points of all frames, with a margin.

    Args:
        frames: Each ``(N, 2)``.

    Returns:
        ``(2, 2)``: lowest and highest x, lowest and highest y.

    Example:
        >>> limits_of([torch.tensor([[0.0, 0.0], [10.0, 2.0]])]).tolist()
        [[-0.5, 10.5], [-4.5, 6.5]]
    """
    points = torch.cat(list(frames)).double()
    if len(points) == 0:
        return torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    low, high = points.min(dim=0).values, points.max(dim=0).values
    half = 0.55 * (high - low).max()
    half = half if half > 0 else torch.ones_like(half)
    center = (low + high) / 2
    return torch.stack([center - half, center + half], dim=1)


def legend_rows(labels: Tensor, class_names: Sequence[str]) -> int:
    """Lines that the legend takes.

    Args:
        labels: ``(N,)``.
        class_names: C names.

    Returns:
        0 where there is none.
    """
    present = labels.unique().tolist()
    if len(present) > _MOST_IN_LEGEND:
        return 0
    return -(-len(present) // _legend_columns(present, class_names))


def name_classes(figure: Figure, axes: Axes, points: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    """Legend below the axes; of too many classes names at the medians of those that find room.

    Args:
        figure: Of the axes.
        axes: With points drawn by :func:`draw_points`.
        points: ``(N, 2)``.
        labels: ``(N,)``.
        class_names: C names.
    """
    present = labels.unique().tolist()
    if len(present) > _MOST_IN_LEGEND:
        _name_medians(axes, points, labels, class_names)
    elif present:
        handles, names = axes.get_legend_handles_labels()
        columns = _legend_columns(present, class_names)
        shape = {"columnspacing": 1.0, "handletextpad": 0.2, "markerscale": 1.5, "frameon": False}
        figure.legend(handles, names, loc="outside lower center", ncols=columns, **shape)


def _legend_columns(present: Sequence[int], class_names: Sequence[str]) -> int:
    longest = max((len(shorten(class_names[label])) for label in present), default=1)
    most = max(1, int((WIDTH - 0.3) / (0.45 + _CHARACTER * longest)))
    rows = max(1, -(-len(present) // most))
    return max(1, -(-len(present) // rows))  # rows of like length


def _name_medians(axes: Axes, points: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    room = 4.6  # inches, about, of the axes' side
    taken: list[tuple[float, float, float]] = []
    for label in labels.unique().tolist():
        x, y = points[labels == label].double().median(dim=0).values.tolist()
        name = shorten(class_names[label])
        half = _CHARACTER * len(name) / 2
        across, up = room * (x - left) / (right - left), room * (y - bottom) / (top - bottom)
        inside = half < across < room - half
        if inside and all(abs(across - a) > half + h or abs(up - u) > _NAME_HEIGHT for a, u, h in taken):
            taken.append((across, up, half))
            halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.8)]
            axes.annotate(name, (x, y), (0, 3), textcoords="offset points", ha="center", va="bottom", path_effects=halo)


def _checked(points: Tensor, labels: Tensor, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Both on the CPU."""
    check_embeddings(points, labels)
    if points.shape[1] != 2:
        raise ValueError(f"points must have shape (N, 2), got {tuple(points.shape)}")
    check_labels(labels, class_names)
    points = points.detach().cpu()
    return points.to(torch.promote_types(points.dtype, torch.float32)), labels.cpu().long()
