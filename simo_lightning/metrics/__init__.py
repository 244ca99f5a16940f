"""Geometry of embeddings as torchmetrics metrics: states of fixed size that merge over batches and processes."""

from simo_lightning.metrics.geometry import (
    NC1,
    Alignment,
    CenteredCosine,
    CenteredCosineMax,
    EffectiveRank,
    Equiangularity,
    Equinorm,
    Leakage,
    NormSpread,
    Orthogonality,
    OrthogonalityMax,
    Participation,
    RMSNorm,
    SimplexDeviation,
    StableRank,
    VarianceAcross,
    VarianceAlong,
    WithinBetween,
    geometry_metrics,
)
from simo_lightning.metrics.heads import NC3, NearestMeanAccuracy
from simo_lightning.metrics.moments import ClassMomentsMetric
from simo_lightning.metrics.uniformity import Uniformity

__all__ = [
    "NC1",
    "NC3",
    "Alignment",
    "CenteredCosine",
    "CenteredCosineMax",
    "ClassMomentsMetric",
    "EffectiveRank",
    "Equiangularity",
    "Equinorm",
    "Leakage",
    "NearestMeanAccuracy",
    "NormSpread",
    "Orthogonality",
    "OrthogonalityMax",
    "Participation",
    "RMSNorm",
    "SimplexDeviation",
    "StableRank",
    "Uniformity",
    "VarianceAcross",
    "VarianceAlong",
    "WithinBetween",
    "geometry_metrics",
]
