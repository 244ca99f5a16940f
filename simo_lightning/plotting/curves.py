"""Curves of the values that runs log in training."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from simo_lightning.plotting import canvas
from simo_lightning.plotting.colors import class_colors

_PANEL = 1.75  # inches, height
_MOST_MARKED = 40  # points up to which each has a marker


class Curve(NamedTuple):
    """Values of one name, in the order of training.

    Attributes:
        steps: Optimizer steps, or epochs.
        values: As many.
    """

    steps: Sequence[float]
    values: Sequence[float]


def curves_figure(runs: Mapping[str, Mapping[str, Curve]], names: Sequence[str], step: str = "step") -> Figure:
    """One panel for each name, one line for each run.

    Args:
        runs: Curves by their name, by the name of the run.
        names: Of the curves to draw, in this order; a run that lacks one has no line there.
        step: Label of the horizontal axis.

    Returns:
        Figure of two panels side by side; with more than one run, a legend below.

    Raises:
        ValueError: If there is no name, or no run has one of them.

    Example:
        >>> curve = Curve([0, 10], [2.0, 1.0])
        >>> figure = curves_figure({"a run": {"train/loss": curve}}, ["train/loss"])
        >>> [axes.get_title() for axes in figure.axes]
        ['train/loss']
    """
    if not names:
        raise ValueError("names must have at least one name of a curve, got none")
    for name in names:
        if not any(name in curves for curves in runs.values()):
            raise ValueError(f"names must be those of curves, got {name!r}")
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    legend = canvas.NAME_HEIGHT * len(runs) if len(runs) > 1 else 0.0
    figure = canvas.new_figure(rows * _PANEL + 0.35 + legend)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    lines = {}
    for axes, name in zip(panels, names, strict=False):
        for (run, curves), color in zip(runs.items(), class_colors(len(runs)), strict=True):
            if name in curves:
                steps, values = curves[name]
                marker = "o" if len(steps) <= _MOST_MARKED else ""
                lines[run] = axes.plot(steps, values, color=color, marker=marker, markersize=2.5, linewidth=1.3)[0]
        canvas.set_title(axes, name, size=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.9")
        axes.set_xlabel(step, fontsize=8)
    for axes in panels[len(names) :]:
        axes.remove()
    if len(runs) > 1:
        box = figure.legend(
            list(lines.values()), ["."] * len(lines), loc="outside lower center", ncols=1, frameon=False
        )
        for text, run in zip(box.get_texts(), lines, strict=True):
            text.set(text=canvas.drawable(run, 48), **canvas.LITERAL)
    return figure


def describe_curves(runs: Mapping[str, Mapping[str, Curve]], names: Sequence[str]) -> str:
    """Alternative text of :func:`curves_figure`.

    Args:
        runs: As for the figure.
        names: As for the figure.

    Returns:
        First and last value of each curve.

    Example:
        >>> describe_curves({"a run": {"train/loss": Curve([0, 10], [2.0, 1.0])}}, ["train/loss"])
        'Curves of training. a run: train/loss from 2 to 1.'
    """
    sentences = ["Curves of training."]
    for run, curves in runs.items():
        parts = [
            f"{name} from {curves[name].values[0]:.3g} to {curves[name].values[-1]:.3g}"
            for name in names
            if name in curves and curves[name].values
        ]
        sentences.append(f"{canvas.printable(run)}: {', '.join(parts) or 'no values'}.")
    return " ".join(sentences)
