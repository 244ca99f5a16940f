"""Geometry of embeddings as torchmetrics metrics: states of fixed size that merge over batches and processes."""

from simo_lightning.metrics.geometry import (
    NC1,
    Alignment,
    CenteredCosine,
    CenteredCosineMax,
    ClassCosine,
    ClassCosineMax,
    EffectiveRank,
    Equiangularity,
    Equinorm,
    NormSpread,
    ParticipationRatio,
    RMSNorm,
    ScatterRatio,
    SimplexDeviation,
    StableRank,
    SubspaceOverlap,
    VarianceAcross,
    VarianceAlong,
    geometry_metrics,
)
from simo_lightning.metrics.heads import NC3, NearestClassMeanAccuracy
from simo_lightning.metrics.moments import ClassMomentsMetric
from simo_lightning.metrics.uniformity import Uniformity

__all__ = [
    "NC1",
    "NC3",
    "Alignment",
    "CenteredCosine",
    "CenteredCosineMax",
    "ClassCosine",
    "ClassCosineMax",
    "ClassMomentsMetric",
    "EffectiveRank",
    "Equiangularity",
    "Equinorm",
    "NearestClassMeanAccuracy",
    "NormSpread",
    "ParticipationRatio",
    "RMSNorm",
    "ScatterRatio",
    "SimplexDeviation",
    "StableRank",
    "SubspaceOverlap",
    "Uniformity",
    "VarianceAcross",
    "VarianceAlong",
    "geometry_metrics",
]
