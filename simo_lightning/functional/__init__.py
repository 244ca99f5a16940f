"""Tensors in, tensors out: moments, SimO, geometry and nearest neighbours. No rank, no Lightning."""

from simo_lightning.functional.geometry import (
    alignment,
    effective_rank,
    equiangularity,
    equinorm,
    nc1,
    orthogonality,
    orthogonality_max,
    rms_norm,
    within_between,
)
from simo_lightning.functional.knn import knn_accuracy, knn_predict
from simo_lightning.functional.moments import ClassMoments, class_moments
from simo_lightning.functional.simo import simo_loss

__all__ = [
    "ClassMoments",
    "alignment",
    "class_moments",
    "effective_rank",
    "equiangularity",
    "equinorm",
    "knn_accuracy",
    "knn_predict",
    "nc1",
    "orthogonality",
    "orthogonality_max",
    "rms_norm",
    "simo_loss",
    "within_between",
]
