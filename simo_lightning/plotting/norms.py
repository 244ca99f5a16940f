"""How long the embeddings of each class are, and how far they spread along their class mean and across it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.functional.geometry import class_rms_norm, class_variance_across, class_variance_along
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting.canvas import MOST_NAMES, check_names, named_places, new_figure
from simo_lightning.plotting.colors import class_colors

_ROW = 0.22  # inches, of a class that is named


class _Spread(NamedTuple):
    """Lengths per class (C,) in units of the embeddings, float64 on the CPU."""

    norms: Tensor  # root mean square
    along: Tensor  # standard deviation in the direction of the class mean
    across: Tensor  # the same per direction orthogonal to it


def norms_figure(moments: ClassMoments, class_names: Sequence[str]) -> Figure:
    """Per class, its RMS norm as a bar, and its spread along the class mean and across it as points.

    The spread is a standard deviation, the root of :func:`~simo_lightning.functional.class_variance_along` and of
    ``class_variance_across``, which is per direction; a class with one embedding has none.

    Args:
        moments: Class moments.
        class_names: C names.

    Returns:
        Figure of two panels with one line per class, the first class on top; of more than 25 classes, every n-th is
        named.

    Raises:
        ValueError: If there are not as many names as classes.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> figure = norms_figure(class_moments(3 * torch.eye(2), torch.arange(2), num_classes=2), ["cat", "dog"])
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [3.0, 3.0]
    """
    spread = _spread(moments)
    num_classes = len(moments.counts)
    check_names(class_names, num_classes)
    figure = new_figure(1.3 + _ROW * min(max(num_classes, 3), MOST_NAMES))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(num_classes)
    colors = class_colors(num_classes)
    left.barh(places, spread.norms.nan_to_num(0).numpy(), color=colors, height=0.8, edgecolor="0.2", linewidth=0.4)
    size = 36 if num_classes <= MOST_NAMES else 12
    right.scatter(spread.along.numpy(), places, s=size, c=colors, edgecolors="0.2", linewidths=0.5, label="along mean")
    right.scatter(
        spread.across.numpy(), places, s=size, c="none", marker="D", edgecolors=colors, linewidths=1.5, label="across"
    )
    _finish(figure, left, right, spread, class_names)
    return figure


def describe_norms(moments: ClassMoments, class_names: Sequence[str]) -> str:
    """What :func:`norms_figure` shows, in one sentence for those who do not see it.

    Args:
        moments: As there.
        class_names: As there.

    Returns:
        The classes of the smallest and the largest norm, and the median spread along the mean and across it.

    Raises:
        ValueError: If there are not as many names as classes.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> text = describe_norms(class_moments(rows, torch.arange(2), num_classes=2), ["cat", "dog"])
        >>> text.split("; ")[0]
        'Norms of 2 classes from 1 (cat) to 3 (dog)'
    """
    check_names(class_names, len(moments.counts))
    spread = _spread(moments)
    present = (~spread.norms.isnan()).nonzero().squeeze(1).tolist()
    if not present:
        return "Norms per class: there are no embeddings."
    low, high = (choose(present, key=lambda label: float(spread.norms[label])) for choose in (min, max))
    return (
        f"Norms of {len(present)} class{'es' * (len(present) != 1)} from {float(spread.norms[low]):.3g} "
        f"({class_names[low]}) to {float(spread.norms[high]):.3g} ({class_names[high]}); median standard deviation "
        f"{float(spread.along.nanmedian()):.3g} along the class mean, {float(spread.across.nanmedian()):.3g} per "
        "direction across it."
    )


def _spread(moments: ClassMoments) -> _Spread:
    norms, along, across = (
        measure(moments).detach().cpu().double()
        for measure in (class_rms_norm, class_variance_along, class_variance_across)
    )
    return _Spread(norms, along.sqrt(), across.sqrt())


def _finish(figure: Figure, left: Axes, right: Axes, spread: _Spread, class_names: Sequence[str]) -> None:
    places, names = named_places(class_names)
    left.set_yticks(places, names)
    left.set_ylim(len(class_names) - 0.4, -0.6)
    left.set_title("RMS norm", fontsize=11)
    right.set_title("Standard deviation", fontsize=11)
    for axes, lengths in ((left, spread.norms), (right, torch.cat([spread.along, spread.across]))):
        longest = float(lengths.nan_to_num(0).max()) if len(lengths) else 0.0
        axes.set_xlim(0, 1.08 * longest if longest > 0 else 1)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    handles, labels = right.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, handletextpad=0.1)
    for handle, filled in zip(legend.legend_handles, (True, False), strict=True):
        handle.set_edgecolor("0.2")  # type: ignore[union-attr]
        handle.set_facecolor("0.5" if filled else "none")  # type: ignore[union-attr]
