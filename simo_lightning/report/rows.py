"""The metrics table: value, better direction and meaning."""

import math
from typing import NamedTuple

from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import ClassMoments


class MetricRow(NamedTuple):
    """One row of the table.

    Attributes:
        name: Logged name without the stage.
        value: nan if it is undefined.
        better: "higher", "lower" or "neither".
        meaning: One line.
    """

    name: str
    value: float
    better: str
    meaning: str

    @property
    def text(self) -> str:
        """The displayed value: four digits, "undefined" or "infinite"."""
        if math.isnan(self.value):
            return "undefined"
        return "infinite" if math.isinf(self.value) else f"{self.value:.4g}"


def metric_rows(moments: ClassMoments, knn: float = math.nan, k: int | None = None) -> list[MetricRow]:
    """The table: kNN, and every metric of :data:`~simo_lightning.functional.geometry.GEOMETRY`.

    Args:
        moments: Class moments of all embeddings.
        knn: Accuracy of the k-nearest-neighbour classifier; nan if unknown.
        k: Number of neighbours; None: up to 20, fewer for small classes.

    Returns:
        One row per metric, kNN first.

    Example:
        >>> import torch
        >>> from simo_lightning.functional.moments import class_moments
        >>> rows = {row.name: row for row in metric_rows(class_moments(torch.eye(2), torch.tensor([0, 1]), 2))}
        >>> rows["class_cosine"].text, rows["class_cosine"].better, rows["alignment"].text
        ('0', 'lower', 'undefined')
    """
    meaning = f"Accuracy of a vote of the {'up to 20' if k is None else k} nearest training images"
    rows = [MetricRow("knn", knn, "higher", meaning)]
    for name, metric in sorted(GEOMETRY.items()):
        meaning = f"{metric.meaning} ({metric.best})" if metric.best else metric.meaning
        rows.append(MetricRow(name, float(metric(moments)), metric.better, meaning))
    return rows
