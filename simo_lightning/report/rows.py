"""The metrics table: each value with its better direction and what it means."""

import math
import re
from typing import NamedTuple

from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.metrics import geometry_metrics


class MetricRow(NamedTuple):
    """One line of the table.

    Attributes:
        name: As it is logged, without the stage.
        value: A number; nan where it is undefined.
        better: "higher", "lower" or "neither".
        meaning: One line.
    """

    name: str
    value: float
    better: str
    meaning: str

    @property
    def text(self) -> str:
        """The value as it is shown: four digits, "undefined" or "infinite"."""
        if math.isnan(self.value):
            return "undefined"
        return "infinite" if math.isinf(self.value) else f"{self.value:.4g}"


def metric_rows(moments: ClassMoments, knn: float = math.nan, k: int = 20) -> list[MetricRow]:
    """The table: kNN, and every function of :data:`~simo_lightning.functional.geometry.GEOMETRY`.

    Args:
        moments: Class moments of all embeddings.
        knn: Accuracy of the k-nearest-neighbour classifier; nan where there is none.
        k: Its neighbours.

    Returns:
        One row per metric, kNN first.

    Example:
        >>> import torch
        >>> from simo_lightning.functional.moments import class_moments
        >>> rows = {row.name: row for row in metric_rows(class_moments(torch.eye(2), torch.tensor([0, 1]), 2))}
        >>> rows["class_cosine"].text, rows["class_cosine"].better, rows["alignment"].text
        ('0', 'lower', 'undefined')
    """
    directions = {name: metric.higher_is_better for name, metric in geometry_metrics(1, 1).items()}
    words = {True: "higher", False: "lower", None: "neither"}
    known = f"Share of the images whose class is that of most of their {k} nearest training images"
    rows = [MetricRow("knn", knn, "higher", known)]
    for name, function in GEOMETRY.items():
        better = words[directions.get(name)]
        rows.append(MetricRow(name, float(function(moments)), better, meaning(function.__doc__ or "")))
    return rows


def meaning(docstring: str) -> str:
    r"""What a metric's docstring says in words: its first line without the formula, and what the best value means.

    Args:
        docstring: Google's shape.

    Returns:
        One line of plain text.

    Example:
        >>> meaning("Mean thing: ``sum x``.\n\nReturns:\n    Scalar, lower is better (0: all ``x`` vanish).")
        'Mean thing (0: all x vanish)'
    """
    text = re.sub(r":\w+:`\.?(\w+)`", r"\1", re.sub(r"\s+", " ", docstring.strip()))
    summary, _, rest = text.partition(": ")
    of_classes = re.fullmatch(r"(.*) of class_(\w+)", summary)  # Mean over the classes of class_x: what x is
    if of_classes:
        what = re.split(r" ?``|\.(?: |$)", rest, maxsplit=1)[0]
        summary = of_classes[1] + (f": {what}" if what else f" of the {of_classes[2].replace('_', ' ')}")
    summary = re.split(r"\.(?: |$)", summary, maxsplit=1)[0]
    best = re.search(r"(?:lower|higher) is better[^.;()]* (\([^()]*\))", text)
    return (f"{summary} {best.group(1)}" if best else summary).replace("`", "")
