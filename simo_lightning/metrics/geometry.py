"""A torchmetrics class for each declared geometry metric; their state is the class moments.

The classes are made from the declarations in ``simo_lightning.functional.geometry``: ``class_cosine`` becomes
``ClassCosine``. They are ordinary classes of this module, so they can be imported, pickled and subclassed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from simo_lightning.functional.geometry import GEOMETRY, computable_metrics, not_computed
from simo_lightning.functional.moments import SECOND_BUDGET_MB, ClassMoments
from simo_lightning.metrics.moments import ClassMomentsMetric


@cache
def metric_class(function: Callable[..., Tensor]) -> type[ClassMomentsMetric]:
    """The torchmetrics class of a function declared with :func:`~simo_lightning.functional.geometry.geometry_metric`.

    For metrics of your own: those of this package are already in ``simo_lightning.metrics``. To pickle the metric,
    assign the class to its own name in the module of the function: ``MyMetric = metric_class(my_metric)``.

    Args:
        function: The declared function.

    Returns:
        A subclass of :class:`ClassMomentsMetric`, the same one at each call.

    Raises:
        ValueError: If the function is not declared.

    Example:
        >>> from simo_lightning.functional import class_cosine
        >>> metric_class(class_cosine)(num_classes=2, embedding_dim=2)
        ClassCosine()
    """
    name = getattr(function, "__name__", repr(function))
    metric = GEOMETRY.get(name)
    if metric is None or metric.function is not function:
        raise ValueError(f"function must be declared with @geometry_metric, got {name}")
    body: dict[str, Any] = {
        "__module__": __name__ if function.__module__.startswith("simo_lightning.") else function.__module__,
        "__doc__": f"{metric.meaning}, by :func:`.geometry.{name}`.",
        "higher_is_better": metric.higher_is_better,
        "_function": staticmethod(function),
        "_needs_second": metric.needs_second,
    }
    return type(metric.class_name, (ClassMomentsMetric,), body)


#: The classes of this package's metrics by their names.
CLASSES: dict[str, type[ClassMomentsMetric]] = {
    metric.class_name: metric_class(metric.function)
    for metric in GEOMETRY.values()
    if metric.function.__module__.startswith("simo_lightning.")
}
globals().update(CLASSES)


def geometry_metrics(
    num_classes: int,
    embedding_dim: int,
    dtype: torch.dtype = torch.float64,
    second_budget_mb: float = SECOND_BUDGET_MB,
) -> MetricCollection:
    """All declared geometry metrics. They share one state: an update costs as much as that of one metric.

    Metrics that require second moments above the budget are left out, with one line.

    Args:
        num_classes: C.
        embedding_dim: D.
        dtype: Of the sums; torch.float32 for devices without float64.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``.

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
    zeros = ClassMoments.zeros(num_classes, embedding_dim, dtype, second_budget_mb=second_budget_mb)
    line = not_computed(zeros, second_budget_mb)
    if line:
        rank_zero_info(line)
    metrics: dict[str, Metric | MetricCollection] = {
        name: metric_class(metric.function)(num_classes, embedding_dim, dtype, second_budget_mb)
        for name, metric in computable_metrics(zeros).items()
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])
