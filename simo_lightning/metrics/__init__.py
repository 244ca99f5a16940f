"""Geometry of embeddings and retrieval as torchmetrics metrics that merge over batches and processes.

Every metric declared in ``simo_lightning.functional.geometry`` has its class here: ``class_cosine`` is
``ClassCosine``.
"""

from typing import TYPE_CHECKING

from simo_lightning.metrics.geometry import CLASSES, geometry_metrics, metric_class
from simo_lightning.metrics.heads import NC3, NearestClassMeanAccuracy
from simo_lightning.metrics.moments import ClassMomentsMetric
from simo_lightning.metrics.retrieval import MAPAtR, RecallAtK, RPrecision
from simo_lightning.metrics.uniformity import Uniformity
from simo_lightning.metrics.unknown import FPRAtRecall

globals().update(CLASSES)

if TYPE_CHECKING:  # the same classes for type checkers and editors, written by docs/metrics_table.py
    # begin: written
    class Alignment(ClassMomentsMetric): ...

    class CenteredCosine(ClassMomentsMetric): ...

    class CenteredCosineMax(ClassMomentsMetric): ...

    class ClassCosine(ClassMomentsMetric): ...

    class ClassCosineMax(ClassMomentsMetric): ...

    class EffectiveRank(ClassMomentsMetric): ...

    class Equiangularity(ClassMomentsMetric): ...

    class Equinorm(ClassMomentsMetric): ...

    class NC1(ClassMomentsMetric): ...

    class NormSpread(ClassMomentsMetric): ...

    class ParticipationRatio(ClassMomentsMetric): ...

    class RMSNorm(ClassMomentsMetric): ...

    class ScatterRatio(ClassMomentsMetric): ...

    class SimplexDeviation(ClassMomentsMetric): ...

    class StableRank(ClassMomentsMetric): ...

    class SubspaceOverlap(ClassMomentsMetric): ...

    class VarianceAcross(ClassMomentsMetric): ...

    class VarianceAlong(ClassMomentsMetric): ...

    # end: written


__all__ = [
    "NC3",
    "ClassMomentsMetric",
    "FPRAtRecall",
    "MAPAtR",
    "NearestClassMeanAccuracy",
    "RPrecision",
    "RecallAtK",
    "Uniformity",
]
__all__ += ["geometry_metrics", "metric_class"]
__all__ += sorted(CLASSES)
