"""The runs' JSON files as a picture: how well each recipe is read, and how orthogonal its class means are."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recipes.store import Result
from benchmarks.recipes.table import at_best_rate, by_recipe, sections
from simo_lightning.plotting.canvas import new_figure

_PANELS = (("knn20", "test kNN(20)"), ("orthogonality", "mean |cosine|"))
_OWN, _OTHER = "#0072B2", "#D55E00"  # of Okabe & Ito, told apart with red-green colour blindness too
_ROW, _MARGIN = 0.24, 1.0  # inches


def comparison_figure(results: Sequence[Result]) -> Figure:
    """A row for each recipe, best kNN(20) on top: mean over seeds as a dot, sample standard deviation as a bar.

    Args:
        results: Contents of the JSON files; what diverged has no row.

    Returns:
        Figure, two panels for each budget, SimO's forms blue and filled, other losses orange and hollow.

    Raises:
        ValueError: If no run has numbers.
    """
    parts = [(section[0]["epochs"], _rows(section)) for section in sections(results)]
    parts = [(epochs, rows) for epochs, rows in parts if rows]
    if not parts:
        raise ValueError("there is no finished run with numbers to draw")
    heights = [_MARGIN + _ROW * len(rows) for _, rows in parts]
    figure = new_figure(sum(heights), layout="constrained")
    grid = figure.subplots(len(parts), len(_PANELS), sharey="row", squeeze=False, height_ratios=heights)
    for row, (epochs, rows) in zip(grid, parts, strict=True):
        names, judged = [name for name, _ in rows], [runs for _, runs in rows]
        for axes, (key, label) in zip(row, _PANELS, strict=True):
            _panel(axes, names, [[run["metrics"]["test"][key] for run in runs] for runs in judged])
            axes.set_xlabel(label)
        row[0].set_title(f"{epochs} epoch{'s' if epochs > 1 else ''}", fontsize="medium", loc="left")
    return figure


def _rows(section: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Name of each recipe and the runs that it is judged by, worst first, as axes count from below."""
    judged = {name: [run for run in at_best_rate(runs) if run["metrics"]] for name, runs in by_recipe(section).items()}
    return sorted(
        ((name, runs) for name, runs in judged.items() if runs),
        key=lambda row: statistics.fmean(run["metrics"]["test"]["knn20"] for run in row[1]),
    )


def _panel(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float | None]]) -> None:
    for place, (name, seeds) in enumerate(zip(names, values, strict=True)):
        known = [value for value in seeds if value is not None]
        if not known:
            continue
        color, own = (_OWN, True) if name.startswith("simo") else (_OTHER, False)
        axes.errorbar(
            statistics.fmean(known),
            place,
            xerr=statistics.stdev(known) if len(known) > 1 else None,
            fmt="o" if own else "s",
            color=color,
            markerfacecolor=color if own else "white",
            markersize=5,
            capsize=2,
        )
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(axis="x", alpha=0.3)
