"""The pictures of a run along training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning.plotting import class_similarity_figure, project_2d, scatter_figure

LABELS = {"knn": "accuracy of 20 nearest neighbours", "mean_accuracy": "accuracy of the nearest mean"}
SHOWN = 6  # snapshots of which there is a picture, evenly spaced, the first and the last among them


def per_class_figure(taken: Sequence[dict[str, Any]], class_names: Sequence[str], key: str = "knn") -> Figure:
    """Heat map of each class's accuracy over training, under the number of groups that stay apart.

    One class at a time is a staircase; all together is a wall.

    Args:
        taken: Snapshots, in order.
        class_names: C names.
        key: Of the accuracies in a snapshot: knn, or mean_accuracy.

    Returns:
        Figure, classes from top to bottom in the order in which they pass one half.
    """
    accuracy = torch.tensor([snapshot[key] for snapshot in taken]).T  # (C, T)
    order = rise_order(accuracy)
    rows = len(class_names)
    figure = Figure(figsize=(max(6.0, 2 + 0.35 * len(taken)), 3.2 + 0.32 * rows), layout="constrained")
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, rows))
    above.step(range(len(taken)), [snapshot["apart"]["groups"] for snapshot in taken], where="mid", color="black")
    above.set(ylim=(0.5, rows + 0.5), ylabel="groups apart", title="Classes over training (validation)")
    image = axes.imshow(accuracy[order].numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(order)), [class_names[row] for row in order])
    step = 1 + (len(taken) - 1) // 12
    places = range(0, len(taken), step)
    axes.set_xticks(places, [f"{taken[place]['epoch']:.2g}" for place in places])
    axes.set_xlabel("epoch")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=LABELS[key])
    return figure


def rise_order(accuracy: Tensor) -> list[int]:
    """Classes in the order in which they pass one half for good.

    Args:
        accuracy: ``(C, T)``.

    Returns:
        C indices; those that never do come last, the best of them first.

    Example:
        >>> rise_order(torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.9], [0.6, 0.4, 0.7], [0.1, 0.6, 0.7]]))
        [3, 1, 2, 0]
    """
    above = (accuracy > 0.5).long().flip(1).cumprod(1).sum(1)  # (C,) snapshots at the end that are above one half
    return sorted(range(len(accuracy)), key=lambda row: (-int(above[row]), row if above[row] else -accuracy[row, -1]))


def write_figures(
    folder: Path, taken: Sequence[dict[str, Any]], scatter: Sequence[Tensor], labels: Tensor, class_names: Sequence[str]
) -> list[str]:
    """All pictures of a run, as PNG.

    Args:
        folder: Where they go.
        taken: Snapshots, in order.
        scatter: Their points, ``(P, D)`` each.
        labels: Class of each point, ``(P,)``.
        class_names: C names.

    Returns:
        Names of the files: per_class_knn and per_class_mean_accuracy, and similarity and scatter of some snapshots,
        named by their step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {f"per_class_{key}": per_class_figure(taken, class_names, key) for key in LABELS}
    last = len(taken) - 1
    for place in sorted({round(last * part / (SHOWN - 1)) for part in range(SHOWN)}):
        step, epoch = taken[place]["step"], taken[place]["epoch"]
        figures[f"similarity_step{step:06d}"] = class_similarity_figure(
            torch.tensor(taken[place]["means"]), class_names
        )
        title = f"Epoch {epoch:.2g}: {len(labels)} validation embeddings"
        figures[f"scatter_step{step:06d}"] = scatter_figure(project_2d(scatter[place]), labels, class_names, title)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=100)
    return [f"{name}.png" for name in figures]
