"""Geometry of embeddings as torchmetrics metrics, all on one kind of state: the class moments."""

from functools import partial

import torch
from torchmetrics import Metric, MetricCollection

from simo_lightning.functional import geometry
from simo_lightning.metrics.moments import ClassMomentsMetric


class Alignment(ClassMomentsMetric):
    """Mean squared distance between two embeddings of one class, by :func:`.geometry.alignment`."""

    higher_is_better = False
    _function = staticmethod(geometry.alignment)


class CenteredCosine(ClassMomentsMetric):
    """Mean absolute cosine between centred class means, by :func:`.geometry.centered_cosine`."""

    higher_is_better = False
    _function = staticmethod(geometry.centered_cosine)


class CenteredCosineMax(ClassMomentsMetric):
    """Largest absolute cosine between two centred class means, by :func:`.geometry.centered_cosine_max`."""

    higher_is_better = False
    _function = staticmethod(geometry.centered_cosine_max)


class EffectiveRank(ClassMomentsMetric):
    """Number of dimensions in use, by :func:`.geometry.effective_rank`."""

    higher_is_better = True
    _function = staticmethod(geometry.effective_rank)


class Equiangularity(ClassMomentsMetric):
    """Unevenness of the angles between centred class means, by :func:`.geometry.equiangularity`."""

    higher_is_better = False
    _function = staticmethod(geometry.equiangularity)


class Equinorm(ClassMomentsMetric):
    """Unevenness of the class means' distances to their centre, by :func:`.geometry.equinorm`."""

    higher_is_better = False
    _function = staticmethod(geometry.equinorm)


class SubspaceOverlap(ClassMomentsMetric):
    """Mean alignment of the leading directions of two classes, by :func:`.geometry.subspace_overlap`.

    Args:
        num_classes: C.
        embedding_dim: D.
        dtype: Of the sums.
        directions: Leading directions of each class that are compared.

    Raises:
        ValueError: If ``directions`` is below 1, or as :class:`ClassMomentsMetric`.
    """

    higher_is_better = False
    _function = staticmethod(geometry.subspace_overlap)

    def __init__(
        self, num_classes: int, embedding_dim: int, dtype: torch.dtype = torch.float64, directions: int = 2
    ) -> None:
        super().__init__(num_classes, embedding_dim, dtype)
        if directions < 1:
            raise ValueError(f"directions must be at least 1, got {directions}")
        self.directions = directions
        self._function = partial(geometry.subspace_overlap, directions=directions)


class NC1(ClassMomentsMetric):
    """Variability collapse, by :func:`.geometry.nc1`."""

    higher_is_better = False
    _function = staticmethod(geometry.nc1)


class NormSpread(ClassMomentsMetric):
    """Coefficient of variation of the squared norms, by :func:`.geometry.norm_spread`."""

    higher_is_better = None
    _function = staticmethod(geometry.norm_spread)


class ClassCosine(ClassMomentsMetric):
    """Mean absolute cosine between class means, by :func:`.geometry.class_cosine`."""

    higher_is_better = False
    _function = staticmethod(geometry.class_cosine)


class ClassCosineMax(ClassMomentsMetric):
    """Largest absolute cosine between two class means, by :func:`.geometry.class_cosine_max`."""

    higher_is_better = False
    _function = staticmethod(geometry.class_cosine_max)


class ParticipationRatio(ClassMomentsMetric):
    """Over how many directions a class spreads about its mean, by :func:`.geometry.participation_ratio`."""

    higher_is_better = None
    _function = staticmethod(geometry.participation_ratio)


class RMSNorm(ClassMomentsMetric):
    """Root mean square norm of the embeddings, by :func:`.geometry.rms_norm`."""

    higher_is_better = None
    _function = staticmethod(geometry.rms_norm)


class SimplexDeviation(ClassMomentsMetric):
    """How far the centred class means are from a simplex, by :func:`.geometry.simplex_deviation`."""

    higher_is_better = False
    _function = staticmethod(geometry.simplex_deviation)


class StableRank(ClassMomentsMetric):
    """Number of dimensions that matter beside the strongest, by :func:`.geometry.stable_rank`."""

    higher_is_better = True
    _function = staticmethod(geometry.stable_rank)


class VarianceAcross(ClassMomentsMetric):
    """Variance of a class per direction across its mean, by :func:`.geometry.variance_across`."""

    higher_is_better = False
    _function = staticmethod(geometry.variance_across)


class VarianceAlong(ClassMomentsMetric):
    """Variance of a class along its mean, by :func:`.geometry.variance_along`."""

    higher_is_better = None
    _function = staticmethod(geometry.variance_along)


class ScatterRatio(ClassMomentsMetric):
    """Scatter within classes over scatter between them, by :func:`.geometry.scatter_ratio`."""

    higher_is_better = False
    _function = staticmethod(geometry.scatter_ratio)


def geometry_metrics(num_classes: int, embedding_dim: int, dtype: torch.dtype = torch.float64) -> MetricCollection:
    """All metrics of ``geometry.GEOMETRY``, which share one state: an update costs as much as that of one metric.

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
        "alignment": Alignment(num_classes, embedding_dim, dtype),
        "centered_cosine": CenteredCosine(num_classes, embedding_dim, dtype),
        "centered_cosine_max": CenteredCosineMax(num_classes, embedding_dim, dtype),
        "class_cosine": ClassCosine(num_classes, embedding_dim, dtype),
        "class_cosine_max": ClassCosineMax(num_classes, embedding_dim, dtype),
        "effective_rank": EffectiveRank(num_classes, embedding_dim, dtype),
        "equiangularity": Equiangularity(num_classes, embedding_dim, dtype),
        "equinorm": Equinorm(num_classes, embedding_dim, dtype),
        "nc1": NC1(num_classes, embedding_dim, dtype),
        "norm_spread": NormSpread(num_classes, embedding_dim, dtype),
        "participation_ratio": ParticipationRatio(num_classes, embedding_dim, dtype),
        "rms_norm": RMSNorm(num_classes, embedding_dim, dtype),
        "scatter_ratio": ScatterRatio(num_classes, embedding_dim, dtype),
        "simplex_deviation": SimplexDeviation(num_classes, embedding_dim, dtype),
        "stable_rank": StableRank(num_classes, embedding_dim, dtype),
        "subspace_overlap": SubspaceOverlap(num_classes, embedding_dim, dtype),
        "variance_across": VarianceAcross(num_classes, embedding_dim, dtype),
        "variance_along": VarianceAlong(num_classes, embedding_dim, dtype),
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])
