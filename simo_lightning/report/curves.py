"""The curves of a run, from its metrics.csv."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

from simo_lightning.plotting import Curve

# What is drawn, in this order, if it was logged; the parts of the loss are left out.
_DRAWN = (
    "train/loss",
    "val/loss",
    "val/map_at_r",
    "val/recall_at_1",
    "val/knn",
    "val/probe",
    "val/class_cosine",
    "val/class_cosine_max",
    "val/effective_rank",
    "val/scatter_ratio",
)


def read_curves(run: Path) -> dict[str, Curve]:
    """Curves of a run by their logged name.

    Args:
        run: Folder with metrics.csv, as Lightning's CSVLogger writes it.

    Returns:
        Finite values by optimizer step; empty if there is no such file or it has no steps.

    Raises:
        ValueError: If the file is no table of numbers.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        return {}
    found: dict[str, tuple[list[float], list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = row.pop("step", None)
                for name, text in row.items():
                    if step and text and name and name != "epoch" and math.isfinite(value := float(text)):
                        steps, values = found.setdefault(name, ([], []))
                        steps.append(float(step))
                        values.append(value)
    except (UnicodeDecodeError, csv.Error, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a table of numbers, as a run logs it, got another file: {error}") from error
    return {name: Curve(*both) for name, both in found.items()}


def drawn_names(curves: Iterable[str]) -> list[str]:
    """Names of the curves that the report draws.

    Args:
        curves: All names.

    Returns:
        At most ten.

    Example:
        >>> drawn_names(["val/knn", "train/loss_similar", "train/loss"])
        ['train/loss', 'val/knn']
    """
    names = set(curves)
    return [name for name in _DRAWN if name in names]
