"""Figures of several epochs of training: small multiples and animations."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings
from simo_lightning.plotting import canvas
from simo_lightning.plotting.projections import project_sequence
from simo_lightning.plotting.scatter import (
    draw_points,
    legend_height,
    name_classes,
    neighbor_share,
    square_around,
)
from simo_lightning.plotting.similarity import draw_cosines

_GIF_DPI = 100  # 500 px wide, for small files


def small_multiples_figure(
    sequence: Sequence[tuple[str, Tensor]],
    labels: Tensor | None,
    class_names: Sequence[str],
    columns: int = 3,
) -> Figure:
    """One panel per epoch, on common axes.

    Embeddings are projected by one map for all panels, see :func:`project_sequence`; two-dimensional ones, such as
    :func:`~simo_lightning.plotting.star_coordinates`, which show many orthogonal classes, are drawn unchanged. Of more
    than 20,000 points 20,000 are drawn, and the figure gives their number.

    Args:
        sequence: Titles with embeddings ``(N, D)`` of the same images or cosines ``(C, C)``, in the order of training.
        labels: Class of each embedding, ``(N,)``; None: the sequence holds cosines, drawn as heat maps.
        class_names: C names.
        columns: Number of panels side by side.

    Returns:
        Figure with one panel per element of the sequence.

    Raises:
        ValueError: If the sequence is empty, or shapes differ or do not match labels and names.

    Example:
        >>> sequence = [("Epoch 0", torch.zeros(2, 2)), ("Epoch 1", torch.eye(2))]
        >>> figure = small_multiples_figure(sequence, torch.arange(2), ["cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes]
        ['Epoch 0', 'Epoch 1']
    """
    checked = _check(sequence, labels, class_names)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(sequence))
    rows = -(-len(sequence) // columns)
    figure = canvas.new_figure(rows * (canvas.WIDTH / columns + 0.2) + checked.legend_height + 0.1)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, axes in enumerate(panels):
        if index < len(sequence):
            checked.draw(axes, index, scale=0.5)
        else:
            axes.remove()
    checked.draw_legend(figure)
    return figure


def save_animation(
    sequence: Sequence[tuple[str, Tensor]],
    path: str | Path,
    labels: Tensor | None,
    class_names: Sequence[str],
    seconds: float = 0.5,
    hold: float = 1.5,
) -> Path:
    """Write the sequence as a GIF that repeats, with the axes, colours and map of :func:`small_multiples_figure`.

    Nothing is interpolated.

    Args:
        sequence: As for small multiples.
        path: File, ending in .gif; its folder must exist.
        labels: As for small multiples.
        class_names: As for small multiples.
        seconds: Duration of each element, > 0.
        hold: Duration of the first and the last one, at least `seconds`.

    Returns:
        The path.

    Raises:
        ValueError: As :func:`small_multiples_figure`, or if `path` does not end in .gif or a time is out of range.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"path must end in .gif, got {path.name!r}")
    if not 0 < seconds <= hold:
        raise ValueError(f"seconds must be above 0 and at most hold, got seconds={seconds} and hold={hold}")
    checked = _check(sequence, labels, class_names)
    images = []
    for index in range(len(sequence)):
        figure = canvas.new_figure(canvas.WIDTH + checked.legend_height)
        checked.draw(figure.add_subplot(), index, scale=1.0)
        checked.draw_legend(figure)
        file = io.BytesIO()
        figure.savefig(file, dpi=_GIF_DPI)
        images.append(Image.open(file).convert("RGB"))
    times = [round(1000 * (hold if index in (0, len(images) - 1) else seconds)) for index in range(len(images))]
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)
    return path


def describe_sequence(sequence: Sequence[tuple[str, Tensor]], labels: Tensor | None, class_names: Sequence[str]) -> str:
    """Alternative text of small multiples or an animation.

    Args:
        sequence: As for small multiples.
        labels: As for small multiples.
        class_names: As for small multiples.

    Returns:
        One sentence: the first and the last title and what changes between them: of points the share whose nearest
        neighbour in the plane has their class, of cosines their mean absolute value between different classes.

    Raises:
        ValueError: As :func:`small_multiples_figure`.

    Example:
        >>> sequence = [("Epoch 0", torch.ones(2, 2)), ("Epoch 1", torch.eye(2))]
        >>> describe_sequence(sequence, None, ["cat", "dog"])
        'Cosines between the means of 2 classes, 2 pictures from Epoch 0 to Epoch 1: mean size from 1.00 to 0.00.'
    """
    checked = _check(sequence, labels, class_names)
    titles = [canvas.printable(checked.titles[index]) for index in (0, -1)]
    epochs = f"{len(sequence)} pictures from {' to '.join(titles)}"
    ends = (checked.tensors[0], checked.tensors[-1])
    if checked.labels is None:
        first, last = (f"{_mean_cosine(cosines):.2f}" for cosines in ends)
        return f"Cosines between the means of {len(class_names)} classes, {epochs}: mean size from {first} to {last}."
    text = f"Map of {canvas.share(len(checked.labels), checked.total)} embeddings"
    text = f"{text} of {len(checked.labels.unique())} classes, {epochs}"
    if len(checked.labels) < 2:
        return f"{text}."
    first, last = (f"{100 * neighbor_share(points, checked.labels):.0f} %" for points in ends)
    return f"{text}: points with a nearest neighbour of their own class from {first} to {last}."


class _Checked(NamedTuple):
    """A checked and projected sequence, ready to draw."""

    titles: list[str]
    tensors: list[Tensor]  # points (N, 2) or cosines (C, C)
    labels: Tensor | None  # (N,); None for cosines
    class_names: Sequence[str]
    total: int  # points before subsampling

    @property
    def legend_height(self) -> float:
        return 0.6 if self.labels is None else legend_height(self.labels, self.class_names)

    def draw(self, axes: Axes, index: int, scale: float) -> None:
        if self.labels is None:
            draw_cosines(axes, self.tensors[index])
            canvas.remove_ticks(axes)
        else:
            limits = square_around(torch.cat(self.tensors))
            draw_points(axes, self.tensors[index], self.labels, self.class_names, limits, scale)
        canvas.set_title(axes, self.titles[index], size=10)

    def draw_legend(self, figure: Figure) -> None:
        """Legend of the classes or colour bar of the cosines, once for all panels."""
        if self.labels is None:
            image = figure.axes[0].images[0]
            figure.colorbar(image, ax=figure.axes, location="bottom", shrink=0.8, aspect=30, label="cosine")
            return
        if legend_height(self.labels, self.class_names):  # names at the points would cover small panels
            name_classes(figure, self.tensors[0], self.labels, self.class_names)
        if len(self.labels) < self.total:
            figure.suptitle(f"{canvas.share(len(self.labels), self.total)} points", fontsize=10)


def _check(sequence: Sequence[tuple[str, Tensor]], labels: Tensor | None, class_names: Sequence[str]) -> _Checked:
    if len(sequence) == 0:
        raise ValueError("sequence must hold at least one (title, tensor), got none")
    titles, tensors = [title for title, _ in sequence], [canvas.on_cpu("sequence", tensor) for _, tensor in sequence]
    if labels is None:
        for cosines in tensors:
            if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1]:
                raise ValueError(f"sequence must hold cosines (C, C) if labels is None, got {tuple(cosines.shape)}")
            canvas.check_names(class_names, len(cosines))
        return _Checked(titles, tensors, None, class_names, 0)
    labels = canvas.on_cpu("labels", labels)
    check_embeddings(tensors[-1], labels)
    canvas.check_labels(labels, class_names)
    kept, total = canvas.subset(len(labels)), len(labels)
    points = project_sequence([tensor if len(tensor) != total else tensor[kept] for tensor in tensors])
    return _Checked(titles, points, labels[kept].long(), class_names, total)


def _mean_cosine(cosines: Tensor) -> float:
    first, second = torch.triu_indices(len(cosines), len(cosines), offset=1)
    return float(cosines[first, second].abs().nanmean())
