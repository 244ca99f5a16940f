"""Singular values of the embeddings: how many directions are in use."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.functional.geometry import effective_rank, singular_values
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting.canvas import check_names, new_figure


def spectrum_figure(moments: ClassMoments, class_names: Sequence[str] | None = None) -> Figure:
    """Singular values of all embeddings over the largest, with the effective rank and the number of classes marked.

    The matrix is the uncentred ``(N, D)`` one. C orthogonal, tight classes of equal size show C equal values and then a
    cliff; a collapsed embedding shows one value and the cliff.

    Args:
        moments: Class moments.
        class_names: C names, only counted; None: none.

    Returns:
        Figure with logarithmic axes; values that are zero within rounding are not drawn.

    Raises:
        ValueError: If there are not as many names as classes.

    Example:
        >>> import torch
        >>> from simo_lightning.functional.moments import class_moments
        >>> figure = spectrum_figure(class_moments(torch.eye(3), torch.arange(3), num_classes=3))
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [1.0, 1.0, 1.0]
    """
    check_names(class_names or [""] * len(moments.counts), len(moments.counts))
    values = _on_cpu(singular_values(moments))
    drawn = values[values > 0] / values.max() if values.any() else values[:0]
    figure = new_figure(4.0)
    axes = figure.add_subplot()
    axes.plot(range(1, len(drawn) + 1), drawn.numpy(), color="#0072B2", marker="o", markersize=3.5, label="_")
    for name, place, color, style in (
        ("effective rank", float(effective_rank(moments)), "#D55E00", "--"),
        ("classes", float((moments.counts > 0).sum()), "black", ":"),
    ):
        if place > 0:
            axes.axvline(place, color=color, linestyle=style, linewidth=1.8, label=f"{name} {_short(place)}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.9, 1.1 * max(len(values), 2))
    lowest = float(drawn.min()) if len(drawn) else 1.0
    axes.set_ylim(min(0.5 * lowest, 0.1), 1.5)
    _plain_ticks(figure, len(values))
    axes.set_title(f"Singular values of {int(moments.counts.sum())} embeddings", fontsize=11)
    axes.set_xlabel("direction")
    axes.set_ylabel("value / largest")
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def describe_spectrum(moments: ClassMoments, class_names: Sequence[str] | None = None) -> str:
    """What :func:`spectrum_figure` shows, in one sentence for those who do not see it.

    Args:
        moments: As there.
        class_names: As there.

    Returns:
        The effective rank, the numbers of dimensions and of classes, and how many values reach a tenth of the largest.

    Raises:
        ValueError: If there are not as many names as classes.

    Example:
        >>> import torch
        >>> from simo_lightning.functional.moments import class_moments
        >>> text = describe_spectrum(class_moments(torch.eye(3), torch.arange(3), num_classes=3))
        >>> text.split("; ")[0]
        'Singular values of 3 embeddings: effective rank 3.0 in 3 dimensions for 3 classes'
    """
    check_names(class_names or [""] * len(moments.counts), len(moments.counts))
    values = singular_values(moments)
    large = int(((values > 0) & (values >= 0.1 * values.max())).sum())
    return (
        f"Singular values of {int(moments.counts.sum())} embeddings: effective rank "
        f"{float(effective_rank(moments)):.1f} in {len(values)} dimensions for {int((moments.counts > 0).sum())} "
        f"classes; {large} value{'s reach' if large != 1 else ' reaches'} a tenth of the largest."
    )


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _plain_ticks(figure: Figure, dim: int) -> None:
    """1, 2, 5, 10, ... and D in place of powers of ten."""
    places = [base * 10**power for power in range(6) for base in (1, 2, 5) if base * 10**power <= 0.75 * dim]
    places = sorted({*places, max(dim, 1)})
    figure.axes[0].set_xticks(places, [str(place) for place in places])
    figure.axes[0].set_xticks([], minor=True)
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
