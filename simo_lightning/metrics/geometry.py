"""A torchmetrics class for each declared geometry metric, all on one kind of state: the class moments.

The classes are made from the declarations in ``simo_lightning.functional.geometry``: ``class_cosine`` becomes
``ClassCosine``. They are ordinary classes of this module, so they can be imported, pickled and subclassed.
"""

from typing import Any

import torch
from torchmetrics import Metric, MetricCollection

from simo_lightning.functional.geometry import GEOMETRY, GeometryMetric
from simo_lightning.metrics.moments import ClassMomentsMetric


def _metric_class(metric: GeometryMetric) -> type[ClassMomentsMetric]:
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{metric.meaning}, by :func:`.geometry.{metric.name}`.",
        "higher_is_better": metric.higher_is_better,
        "_function": staticmethod(metric.function),
    }
    return type(metric.class_name, (ClassMomentsMetric,), body)


#: The class of each metric by the name under which it is logged.
GEOMETRY_METRICS: dict[str, type[ClassMomentsMetric]] = {
    name: _metric_class(metric) for name, metric in sorted(GEOMETRY.items())
}
globals().update({metric_class.__name__: metric_class for metric_class in GEOMETRY_METRICS.values()})


def geometry_metrics(num_classes: int, embedding_dim: int, dtype: torch.dtype = torch.float64) -> MetricCollection:
    """All geometry metrics, which share one state: an update costs as much as that of one metric.

    Args:
        num_classes: C.
        embedding_dim: D.
        dtype: Of the sums; torch.float32 for devices without float64.

    Returns:
        Collection by the names under which they are logged.

    Raises:
        ValueError: As :class:`ClassMomentsMetric`.

    Example:
        >>> metrics = geometry_metrics(num_classes=2, embedding_dim=2)
        >>> metrics.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
        >>> {name: round(value.item(), 2) for name, value in metrics.compute().items() if "class" in name}
        {'class_cosine': 0.0, 'class_cosine_max': 0.0}
    """
    metrics: dict[str, Metric | MetricCollection] = {
        name: metric_class(num_classes, embedding_dim, dtype) for name, metric_class in GEOMETRY_METRICS.items()
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])
