"""Tensors to matplotlib figures; no pyplot, so nothing global and no display."""

import colorsys
from collections.abc import Sequence
from typing import Literal

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.functional.moments import ClassMoments, check_embeddings

# Eight colours of Okabe & Ito ("Color Universal Design", 2008) and two more as far from them as they are apart: 17 or
# more in CIELAB, also as seen in protanopia and deuteranopia (simulated after Machado et al., IEEE TVCG 15(6), 2009)
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#CC33FF", "#FF0066")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p")  # one for each ten classes
_MOST_NUMBERS = 12  # classes, up to which a heat map says its numbers
_MOST_NAMES = 50  # classes, up to which a heat map or a legend names every one


def class_colors(num_classes: int) -> list[str]:
    """Colour of each class: the same index has the same colour however many classes there are.

    The first ten can be told apart with red-green colour blindness too; after them hues go round by the golden ratio,
    and markers tell apart what colours no longer can.

    Args:
        num_classes: C.

    Returns:
        C colours as ``#RRGGBB``.

    Example:
        >>> class_colors(2)
        ['#0072B2', '#E69F00']
    """
    colors = list(_COLORS[:num_classes])
    for index in range(len(_COLORS), num_classes):
        tone = colorsys.hls_to_rgb(index * 0.618034 % 1, (0.35, 0.5, 0.65)[index % 3], 0.7)
        colors.append("#" + "".join(f"{round(255 * channel):02X}" for channel in tone))
    return colors


def project_2d(embeddings: Tensor, method: Literal["pca", "tsne"] = "pca") -> Tensor:
    """Embeddings as points in the plane; those of two dimensions as they are.

    Args:
        embeddings: Float tensor ``(N, D)``.
        method: pca: the two directions of largest variance, each with its largest weight positive, so that the same
            data give the same picture; tsne: scikit-learn's, seeded; seconds for a few thousand points.

    Returns:
        ``(N, 2)`` on the CPU, float32 or better.

    Raises:
        ValueError: If the embeddings are not ``(N, D)`` and finite, or the method is not one of the two.

    Example:
        >>> project_2d(torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).tolist()
        [[-2.0, 0.0], [2.0, 0.0]]
    """
    if method not in ("pca", "tsne"):
        raise ValueError(f"method must be 'pca' or 'tsne', got {method!r}")
    check_embeddings(embeddings, torch.zeros(len(embeddings), dtype=torch.long))
    rows = embeddings.detach().cpu()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not rows.isfinite().all():
        raise ValueError(f"embeddings must be finite, got nan or inf in {int((~rows.isfinite()).any(1).sum())} rows")
    if rows.shape[1] == 2 or len(rows) == 0:
        return rows[:, :2] if rows.shape[1] >= 2 else rows.new_zeros(0, 2)
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
        return torch.from_numpy(TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(rows.numpy()))
    centered = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:2]  # (2, D) or (1, D)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    points = centered @ (directions * largest.sign()).mT
    return torch.nn.functional.pad(points, (0, 2 - points.shape[1]))


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
    means = (means.means if isinstance(means, ClassMoments) else means).detach().cpu().double()
    _check_names(class_names, len(means))
    unit = means / means.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.mT).clamp(-1, 1)  # (C, C)
    present = (~means.isnan().any(dim=1)).nonzero().squeeze(1)
    first, second = present[torch.triu_indices(len(present), len(present), offset=1)]
    side = min(4.0 + 0.4 * len(means), 14.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(cosines.numpy(), cmap=colormaps["RdBu_r"].with_extremes(bad="0.75"), vmin=-1, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine")
    axes.set_title(
        f"Cosine between class means (mean |cos| {float(cosines[first, second].abs().mean()):.3f})",
        fontsize=max(12, 1.2 * side),
    )
    _name_ticks(axes, class_names)
    if len(means) <= _MOST_NUMBERS:
        _write_numbers(axes, cosines)
    return figure


def scatter_figure(points: Tensor, labels: Tensor, class_names: Sequence[str], title: str | None = None) -> Figure:
    """Points in the plane, coloured by class.

    Args:
        points: ``(N, 2)``, for example of :func:`project_2d`; one unit is as long on both axes.
        labels: Class of each point, ``(N,)``.
        class_names: Names of all classes; those without a point are not in the legend.
        title: Title; None: how many points there are.

    Returns:
        Figure with the legend beside the points.

    Raises:
        ValueError: If the shapes, or the labels and the number of names, do not fit.

    Example:
        >>> figure = scatter_figure(torch.zeros(3, 2), torch.tensor([0, 1, 1]), ["cat", "dog", "ship"])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['cat', 'dog']
    """
    check_embeddings(points, labels)
    if points.shape[1] != 2:
        raise ValueError(f"points must have shape (N, 2), got {tuple(points.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(
            f"labels must be in 0..{len(class_names) - 1} for {len(class_names)} class_names, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
    points, labels = points.detach().cpu(), labels.cpu()
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    axes = figure.add_subplot()
    _draw_classes(axes, points, labels, class_names)
    axes.set_title(f"{len(points)} embeddings" if title is None else title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    present = len(labels.unique())
    if 0 < present <= _MOST_NAMES:
        columns = 1 + (present - 1) // 25
        figure.legend(loc="outside right upper", ncols=columns, frameon=False, markerscale=2, fontsize="small")
    return figure


def _draw_classes(axes: Axes, points: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    size = float(min(30.0, max(9.0, 12000 / max(len(points), 1))))
    for label, color in enumerate(class_colors(len(class_names))):
        own = points[labels == label].numpy()
        if len(own):
            marker = _MARKERS[label // len(_COLORS) % len(_MARKERS)]
            axes.scatter(
                own[:, 0],
                own[:, 1],
                s=size,
                c=color,
                marker=marker,
                alpha=0.8,
                linewidths=0,
                label=class_names[label],
            )


def _name_ticks(axes: Axes, class_names: Sequence[str]) -> None:
    """Names on both axes; of too many classes only some."""
    step = 1 + (len(class_names) - 1) // _MOST_NAMES
    places = range(0, len(class_names), step)
    size = "medium" if len(places) <= 20 else "small"
    names = [name if len(name) <= 20 else name[:19] + "…" for name in class_names[::step]]
    upright = max(map(len, names), default=0) <= 3
    rotation = 0 if upright else 45 if len(places) <= 20 else 90
    axes.set_xticks(places, names, rotation=rotation, ha="right" if rotation == 45 else "center", fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    axes.tick_params(length=0)


def _write_numbers(axes: Axes, cosines: Tensor) -> None:
    for row, values in enumerate(cosines.tolist()):
        for column, value in enumerate(values):
            if value == value:
                color = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value + 0.0:.2f}", ha="center", va="center", color=color, fontsize="small")


def _check_names(class_names: Sequence[str], num_classes: int) -> None:
    if len(class_names) != num_classes:
        raise ValueError(f"class_names must name {num_classes} classes, got {len(class_names)} names")
