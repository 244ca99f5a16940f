"""Singular values of the embeddings."""

from matplotlib.figure import Figure

from simo_lightning.functional.geometry import effective_rank, singular_values
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import canvas


def spectrum_figure(moments: ClassMoments) -> Figure:
    """Singular values of all embeddings relative to the largest, with effective rank and number of classes marked.

    The ``(N, D)`` matrix is not centred. C orthogonal, tight classes of equal size give C equal values followed by a
    steep fall; collapsed embeddings give one large value.

    Args:
        moments: Class moments.

    Returns:
        Figure with logarithmic axes; values that are zero within rounding are not drawn.

    Example:
        >>> import torch
        >>> from simo_lightning.functional.moments import class_moments
        >>> figure = spectrum_figure(class_moments(torch.eye(3), torch.arange(3), num_classes=3))
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [1.0, 1.0, 1.0]
    """
    values = singular_values(moments).detach().cpu().double()
    drawn = values[values > 0] / values.max() if values.any() else values[:0]
    figure = canvas.new_figure(4.0)
    axes = figure.add_subplot()
    axes.plot(range(1, len(drawn) + 1), drawn.numpy(), color="#0072B2", marker="o", markersize=3.5)
    lines = []
    for name, position, color, style in (
        ("effective rank", float(effective_rank(moments)), "#D55E00", "--"),
        ("classes", float((moments.counts > 0).sum()), "black", ":"),
    ):
        if position > 0:
            number = f"{position:.0f}" if position == round(position) else f"{position:.1f}"
            lines.append(axes.axvline(position, color=color, linestyle=style, linewidth=1.8, label=f"{name} {number}"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.9, 1.1 * max(len(values), 2))
    axes.set_ylim(min(0.5 * float(drawn.min()), 0.1) if len(drawn) else 0.1, 1.5)
    # 1, 2, 5, 10, ... and D instead of powers of ten
    ticks = [base * 10**power for power in range(6) for base in (1, 2, 5) if base * 10**power <= 0.75 * len(values)]
    ticks = sorted({*ticks, max(len(values), 1)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Singular values of {int(moments.counts.sum()):,} embeddings", fontsize=11)
    axes.set_xlabel("direction")
    axes.set_ylabel("value / largest")
    axes.grid(color="0.9")
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
    return figure


def describe_spectrum(moments: ClassMoments) -> str:
    """Alternative text of :func:`spectrum_figure`.

    Args:
        moments: As for the figure.

    Returns:
        One sentence: the effective rank, the numbers of dimensions and of classes, and how many values reach a tenth of
        the largest.

    Example:
        >>> import torch
        >>> from simo_lightning.functional.moments import class_moments
        >>> text = describe_spectrum(class_moments(torch.eye(3), torch.arange(3), num_classes=3))
        >>> text.split("; ")[0]
        'Singular values of 3 embeddings: effective rank 3.0 in 3 dimensions for 3 classes'
    """
    values = singular_values(moments)
    large = int(((values > 0) & (values >= 0.1 * values.max())).sum())
    return (
        f"Singular values of {int(moments.counts.sum()):,} embeddings: effective rank "
        f"{float(effective_rank(moments)):.1f} in {len(values)} dimensions for {int((moments.counts > 0).sum())} "
        f"classes; {large} value{'s reach' if large != 1 else ' reaches'} a tenth of the largest."
    )
