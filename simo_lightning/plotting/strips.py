"""The same picture along training: a strip of small multiples."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings
from simo_lightning.plotting.canvas import WIDTH, bare, check_labels, check_names, new_figure
from simo_lightning.plotting.projections import project_frames
from simo_lightning.plotting.scatter import draw_points, legend_rows, limits_of, name_classes
from simo_lightning.plotting.similarity import draw_cosines

Kind = Literal["points", "similarity"]


class Reel(NamedTuple):
    """Frames made ready to draw: checked, projected by one map, on common axes.

    Attributes:
        titles: One per frame.
        frames: Points ``(N, 2)`` or cosines ``(C, C)``.
        draw: Draws one frame on axes, without its title.
        labels: ``(N,)``; None for cosines.
    """

    titles: list[str]
    frames: list[Tensor]
    draw: Callable[[Axes, Tensor, float], None]
    labels: Tensor | None


def strip_figure(
    frames: Sequence[tuple[str, Tensor]],
    labels: Tensor | None,
    class_names: Sequence[str],
    kind: Kind = "points",
    columns: int = 3,
) -> Figure:
    """Small multiples along training, on common axes.

    Points go to the plane by one map for all frames, fitted on the last: :func:`project_frames` says what that means.
    Of many orthogonal classes a plane shows but two directions: give the points of
    :func:`~simo_lightning.plotting.project_wheel`, which are drawn as they are, to see them all.

    Args:
        frames: Title, and embeddings ``(N, D)`` of the same images or cosines ``(C, C)``, in the order of training;
            six fill a telephone's width well.
        labels: Class of each embedding, ``(N,)``; None for cosines.
        class_names: C names.
        kind: points: embeddings, as a map; similarity: cosines between class means, as a heat map.
        columns: Pictures side by side.

    Returns:
        Figure with one panel per frame.

    Raises:
        ValueError: If there is no frame, or shapes differ or do not fit the labels and names, or the kind is not one
            of the two.

    Example:
        >>> frames = [("Epoch 0", torch.zeros(2, 2)), ("Epoch 1", torch.eye(2))]
        >>> figure = strip_figure(frames, torch.arange(2), ["cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes]
        ['Epoch 0', 'Epoch 1']
    """
    reel = make_reel(frames, labels, class_names, kind)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(reel.frames))
    rows = -(-len(reel.frames) // columns)
    below = 0.2 * legend_rows(reel.labels, class_names) if reel.labels is not None else 0.6
    figure = new_figure(rows * (WIDTH / columns + 0.2) + below + 0.1)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, title, frame in zip(panels, reel.titles, reel.frames, strict=False):
        reel.draw(axes, frame, 0.5)
        axes.set_title(title, fontsize=10)
    for axes in panels[len(reel.frames) :]:
        axes.remove()
    name_reel(figure, reel, class_names)
    return figure


def describe_strip(
    frames: Sequence[tuple[str, Tensor]], labels: Tensor | None, class_names: Sequence[str], kind: Kind = "points"
) -> str:
    """What :func:`strip_figure` or an animation shows, in one sentence for those who do not see it.

    Args:
        frames: As there.
        labels: As there.
        class_names: As there.
        kind: As there.

    Returns:
        The first and the last title with the number that the picture shows to change: of points the variance within
        classes over that between them, in the plane; of cosines their mean size between different classes.

    Raises:
        ValueError: As :func:`strip_figure`.

    Example:
        >>> frames = [("Epoch 0", torch.ones(2, 2)), ("Epoch 1", torch.eye(2))]
        >>> describe_strip(frames, None, ["cat", "dog"], kind="similarity")
        'Cosines between the means of 2 classes, 2 pictures from Epoch 0 to Epoch 1: mean size from 1.00 to 0.00.'
    """
    reel = make_reel(frames, labels, class_names, kind)
    span = f"{len(reel.frames)} pictures from {reel.titles[0]} to {reel.titles[-1]}"
    if reel.labels is None:
        first, last = (_mean_cosine(reel.frames[index]) for index in (0, -1))
        head = f"Cosines between the means of {len(class_names)} classes"
        return f"{head}, {span}: mean size from {first:.2f} to {last:.2f}."
    first, last = (_scatter_ratio(reel.frames[index], reel.labels) for index in (0, -1))
    head = f"Map of {len(reel.labels)} embeddings of {len(reel.labels.unique())} classes"
    return f"{head}, {span}: variance within classes over that between them from {first:.2f} to {last:.2f}."


def make_reel(
    frames: Sequence[tuple[str, Tensor]], labels: Tensor | None, class_names: Sequence[str], kind: Kind
) -> Reel:
    """Check the frames and make them ready to draw.

    Args:
        frames: As for :func:`strip_figure`.
        labels: As there.
        class_names: As there.
        kind: As there.

    Returns:
        The reel.

    Raises:
        ValueError: As :func:`strip_figure`.
    """
    if kind not in ("points", "similarity"):
        raise ValueError(f"kind must be 'points' or 'similarity', got {kind!r}")
    if len(frames) == 0:
        raise ValueError("frames must hold at least one (title, tensor), got none")
    titles, tensors = [title for title, _ in frames], [tensor.detach().cpu() for _, tensor in frames]
    if kind == "similarity":
        for cosines in tensors:
            if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1]:
                raise ValueError(f"frames must hold cosines of shape (C, C), got {tuple(cosines.shape)}")
            check_names(class_names, len(cosines))
        return Reel(titles, tensors, _draw_matrix, None)
    if labels is None:
        raise ValueError("labels must be the classes of the points for kind='points', got None")
    own = labels.cpu().long()
    check_embeddings(tensors[-1], own)
    check_labels(own, class_names)
    points = project_frames(tensors)
    limits = limits_of(points)

    def draw(axes: Axes, frame: Tensor, scale: float) -> None:
        draw_points(axes, frame, own, class_names, limits, scale)

    return Reel(titles, points, draw, own)


def name_reel(figure: Figure, reel: Reel, class_names: Sequence[str]) -> None:
    """Legend of the classes, or scale of the cosines, once for all panels.

    Args:
        figure: With the panels drawn.
        reel: What they show.
        class_names: C names.
    """
    if reel.labels is None:
        figure.colorbar(
            figure.axes[0].images[0], ax=figure.axes, location="bottom", shrink=0.8, aspect=30, label="cosine"
        )
    elif legend_rows(reel.labels, class_names):
        name_classes(figure, figure.axes[0], reel.frames[0], reel.labels, class_names)


def _draw_matrix(axes: Axes, cosines: Tensor, scale: float) -> None:
    draw_cosines(axes, cosines)
    bare(axes)


def _mean_cosine(cosines: Tensor) -> float:
    first, second = torch.triu_indices(len(cosines), len(cosines), offset=1)
    return float(cosines[first, second].abs().nanmean())


def _scatter_ratio(points: Tensor, labels: Tensor) -> float:
    from simo_lightning.functional.geometry import scatter_ratio
    from simo_lightning.functional.moments import class_moments

    return float(scatter_ratio(class_moments(points, labels, int(labels.max()) + 1 if len(labels) else 1)))
