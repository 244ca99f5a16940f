"""Norms of each class, and its standard deviation along and across the class mean."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.functional.geometry import class_rms_norm, class_variance_across, class_variance_along
from simo_lightning.functional.geometry.rounding import class_variances
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import canvas
from simo_lightning.plotting.colors import class_colors

_ROW = 0.22  # inches, height of a row with a name


def norms_figure(moments: ClassMoments, class_names: Sequence[str]) -> Figure:
    """RMS norm of each class as a bar, and its standard deviation along and across the class mean as points.

    The standard deviations are the roots of :func:`~simo_lightning.functional.class_variance_along` and of
    ``class_variance_across`` (per direction); they are undefined for a class with one embedding. Moments without
    ``second`` give one standard deviation per direction, over all directions. Of more than 500 classes every n-th is
    shown, and the axis label gives their number.

    Args:
        moments: Class moments.
        class_names: C names.

    Returns:
        Figure of two panels with one row per class, the first class on top; of more than 25 classes every n-th is
        named.

    Raises:
        ValueError: If the number of names is not C.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> figure = norms_figure(class_moments(3 * torch.eye(2), torch.arange(2), num_classes=2), ["cat", "dog"])
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [3.0, 3.0]
    """
    canvas.check_names(class_names, len(moments.counts))
    shown = canvas.every_nth(len(class_names), canvas.MOST_CLASSES)
    norms, deviations = _spread(moments)
    norms, deviations = norms[list(shown)], {name: values[list(shown)] for name, values in deviations.items()}
    figure = canvas.new_figure(1.3 + _ROW * min(max(len(shown), 3), canvas.MOST_NAMES))
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(shown))
    colors = class_colors(len(class_names))[:: shown.step]
    size, edge = (36, 0.4) if len(shown) <= canvas.MOST_NAMES else (12, 0)
    left.barh(rows, norms.nan_to_num(0).numpy(), color=colors, height=0.8, edgecolor="0.2", linewidth=edge)
    filled = {"c": colors, "edgecolors": "0.2", "linewidths": 0.5}
    hollow = {"c": "none", "edgecolors": colors, "linewidths": 1.5, "marker": "D"}
    for (name, values), style in zip(deviations.items(), (filled, hollow), strict=False):
        right.scatter(values.numpy(), rows, s=size, label=name, **style)

    left.set_yticks(*canvas.axis_names(class_names[:: shown.step]), **canvas.LITERAL)
    left.set_ylim(len(shown) - 0.4, -0.6)
    if len(shown) < len(class_names):
        left.set_ylabel(f"{canvas.share(len(shown), len(class_names))} classes")
    left.set_title("RMS norm", fontsize=11)
    right.set_title("Standard deviation", fontsize=11)
    for axes, lengths in ((left, norms), (right, torch.cat([*deviations.values()]))):
        longest = float(lengths.nan_to_num(0).max()) if len(lengths) else 0.0
        axes.set_xlim(0, 1.08 * longest if longest > 0 else 1)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    handles, labels = right.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, handletextpad=0.1)
    for handle, color in zip(legend.legend_handles, ("0.5", "none"), strict=False):
        handle.set(edgecolor="0.2", facecolor=color)  # type: ignore[union-attr]
    return figure


def describe_norms(moments: ClassMoments, class_names: Sequence[str]) -> str:
    """Alternative text of :func:`norms_figure`.

    Args:
        moments: As for the figure.
        class_names: As for the figure.

    Returns:
        One sentence: the classes with the smallest and the largest norm, and the median standard deviations along and
        across the mean, or of moments without ``second`` over all directions, over all classes.

    Raises:
        ValueError: As for the figure.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> text = describe_norms(class_moments(embeddings, torch.arange(2), num_classes=2), ["cat", "dog"])
        >>> text.split("; ")[0]
        'Norms of 2 classes from 1 (cat) to 3 (dog)'
    """
    canvas.check_names(class_names, len(moments.counts))
    norms, deviations = _spread(moments)
    present = (~norms.isnan()).nonzero().squeeze(1)
    if not len(present):
        return "Norms per class: there are no embeddings."
    ends = (int(present[choose(norms[present])]) for choose in (torch.argmin, torch.argmax))
    low, high = (f"{float(norms[label]):.3g} ({canvas.printable(class_names[label])})" for label in ends)
    places = {"along mean": "along the class mean", "across": "per direction across it"}
    medians = (f"{float(each.nanmedian()):.3g} {places.get(name, name)}" for name, each in deviations.items())
    head = f"Norms of {len(present):,} class{'es' * (len(present) != 1)} from {low} to {high}"
    return f"{head}; median standard deviation {', '.join(medians)}."


def _spread(moments: ClassMoments) -> tuple[Tensor, dict[str, Tensor]]:
    """RMS norms (C,) and by name standard deviations (C,), float64 on the CPU."""
    if moments.second is None:
        variances = class_variances(moments) / moments.sums.shape[1]
        found = {"per direction": torch.where(moments.counts > 1, variances, float("nan"))}
    else:
        found = {"along mean": class_variance_along(moments), "across": class_variance_across(moments)}
    deviations = {name: values.detach().cpu().double().sqrt() for name, values in found.items()}
    return class_rms_norm(moments).detach().cpu().double(), deviations
