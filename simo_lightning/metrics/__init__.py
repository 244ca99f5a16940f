"""Geometry of embeddings as torchmetrics metrics: states of fixed size that merge over batches and processes.

Every metric declared in ``simo_lightning.functional.geometry`` has its class here: ``class_cosine`` is
``ClassCosine``.
"""

from typing import TYPE_CHECKING

from simo_lightning.metrics.geometry import GEOMETRY_METRICS, geometry_metrics
from simo_lightning.metrics.heads import NC3, NearestClassMeanAccuracy
from simo_lightning.metrics.moments import ClassMomentsMetric
from simo_lightning.metrics.uniformity import Uniformity

globals().update({metric_class.__name__: metric_class for metric_class in GEOMETRY_METRICS.values()})

if TYPE_CHECKING:  # what a type checker cannot see: the classes that are made from the declarations

    def __getattr__(name: str) -> type[ClassMomentsMetric]: ...


__all__ = ["NC3", "ClassMomentsMetric", "NearestClassMeanAccuracy", "Uniformity", "geometry_metrics"]
__all__ += sorted(metric_class.__name__ for metric_class in GEOMETRY_METRICS.values())
