"""The metrics in groups: value, better direction and meaning."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from simo_lightning.functional.geometry import computable_metrics
from simo_lightning.functional.moments import ClassMoments

_RETRIEVAL = {
    "map_at_r": "Average precision of the R nearest images, R being the number of images of the query's class",
    "r_precision": "Share of the R nearest images that have the query's class",
}
# Title, sentence and metrics of each group. A metric that is in none is in the last one.
_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Retrieval and kNN",
        "Whether the most similar images are of the same class, by cosine.",
        ("knn", "recall_at_", "r_precision", "map_at_r"),
    ),
    (
        "Class directions",
        "Whether the class means point in different directions: SimO aims at right angles.",
        (
            "class_cosine",
            "class_cosine_max",
            "subspace_overlap",
            "centered_cosine",
            "centered_cosine_max",
            "simplex_deviation",
            "equiangularity",
            "equinorm",
        ),
    ),
    (
        "Use of dimensions",
        "How many directions the embeddings use: few of them mean a collapse.",
        ("effective_rank", "stable_rank", "participation_ratio"),
    ),
    (
        "Norms and spread",
        "How long the embeddings are, and how far the images of a class lie from each other.",
        ("rms_norm", "norm_spread", "scatter_ratio", "nc1", "alignment", "variance_across", "variance_along"),
    ),
    ("Other metrics", "Declared outside of this package.", ()),
)


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


class MetricGroup(NamedTuple):
    """Metrics that answer one question.

    Attributes:
        title: Heading.
        text: One sentence.
        rows: One or more.
    """

    title: str
    text: str
    rows: list[MetricRow]


def metric_rows(
    moments: ClassMoments, knn: float = math.nan, k: int | None = None, retrieval: Mapping[str, float] | None = None
) -> list[MetricRow]:
    """All metrics: kNN, retrieval, and those of :data:`~simo_lightning.functional.geometry.GEOMETRY`.

    Those that the moments do not allow, being without ``second``, have no row.

    Args:
        moments: Class moments of all embeddings.
        knn: Accuracy of the k-nearest-neighbour classifier; nan if unknown.
        k: Number of neighbours; None: up to 20, fewer for small classes.
        retrieval: Values by their logged names without the stage, such as recall_at_1, as
            :class:`~simo_lightning.callbacks.RetrievalMonitor` logs them.

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
    rows += [MetricRow(name, value, "higher", _retrieval_meaning(name)) for name, value in (retrieval or {}).items()]
    for name, metric in computable_metrics(moments).items():
        meaning = f"{metric.meaning} ({metric.best})" if metric.best else metric.meaning
        rows.append(MetricRow(name, float(metric(moments)), metric.better, meaning))
    return rows


def metric_groups(rows: list[MetricRow]) -> list[MetricGroup]:
    """The rows in groups.

    Args:
        rows: As :func:`metric_rows` gives them.

    Returns:
        The groups that have rows, in a fixed order.

    Example:
        >>> [group.title for group in metric_groups([MetricRow("knn", 0.5, "higher", "Accuracy")])]
        ['Retrieval and kNN']
    """
    groups = [MetricGroup(title, text, []) for title, text, _ in _GROUPS]
    for row in rows:
        groups[_group_of(row.name)].rows.append(row)
    for group, (_, _, names) in zip(groups, _GROUPS, strict=True):
        if group is groups[0]:  # as logged, averages over classes last
            group.rows.sort(key=lambda row: row.name.endswith("_macro"))
        else:
            group.rows.sort(key=lambda row: names.index(row.name) if row.name in names else -1)
    return [group for group in groups if group.rows]


def _group_of(name: str) -> int:
    if name.startswith(_GROUPS[0][2]):
        return 0
    return next((index for index, group in enumerate(_GROUPS) if name in group[2]), len(_GROUPS) - 1)


def _retrieval_meaning(name: str) -> str:
    base = name.removesuffix("_macro")
    found = re.fullmatch(r"recall_at_(\d+)", base)
    if found is not None and found[1] == "1":
        meaning = "Share of the images whose nearest image has their class"
    elif found is not None:
        meaning = f"Share of the images with one of their class among the {found[1]} nearest"
    else:
        meaning = _RETRIEVAL.get(base, "Retrieval by cosine")
    return f"{meaning}, averaged over classes" if name != base else meaning
