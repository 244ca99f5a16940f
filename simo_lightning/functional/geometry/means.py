"""Angles and lengths of class means, as they are and centred.

Centred means are the class means minus their own mean, with equal weight for every class. At most P - 1 of P centred
means are linearly independent, so they cannot all be orthogonal; in the best case they form a simplex, with all cosines
``-1 / (P - 1)``.
"""

import torch
from torch import Tensor

from simo_lightning.functional.geometry.declaration import geometry_metric
from simo_lightning.functional.geometry.rounding import centered_means, present_means, undefined
from simo_lightning.functional.moments import ClassMoments

__all__ = [
    "centered_cosine",
    "centered_cosine_max",
    "class_cosine",
    "class_cosine_max",
    "equiangularity",
    "equinorm",
    "simplex_deviation",
]


@geometry_metric(
    interval="[0, 1]",
    better="lower",
    best="0: all class means are orthogonal",
    undefined="fewer than two classes, or a class mean of zero",
)
def class_cosine(moments: ClassMoments) -> Tensor:
    """Mean absolute cosine between class means: ``mean_{a<b} |cos(m_a, m_b)|``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> class_cosine(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2)).item()
        0.0

    Source:
        SimO loss optimizes the orthogonality of class means (Bouhsine et al., arXiv 2410.05233); the metric is ours.
    """
    return _pair_cosines(present_means(moments)).abs().mean()


@geometry_metric(
    interval="[0, 1]",
    better="lower",
    best="1: two classes share a direction",
    undefined="fewer than two classes, or a class mean of zero",
)
def class_cosine_max(moments: ClassMoments) -> Tensor:
    """Largest absolute cosine between two class means: ``max_{a<b} |cos(m_a, m_b)|``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
        >>> class_cosine_max(class_moments(embeddings, torch.tensor([0, 1, 2]), num_classes=3)).item()
        1.0

    Source:
        The mutual coherence of the class means (Donoho & Huo, IEEE Trans. Inf. Theory 47(7), 2001).
    """
    cosines = _pair_cosines(present_means(moments)).abs()
    return cosines.max() if len(cosines) else undefined(moments)


@geometry_metric(
    interval="[0, 1]",
    better="lower",
    best="1 / (P - 1) in a simplex of P classes",
    undefined="fewer than two classes, or a class mean on the centre",
)
def centered_cosine(moments: ClassMoments) -> Tensor:
    """Mean absolute cosine between centred class means: ``mean_{a<b} |cos(m_a - m, m_b - m)|``.

    ``m`` is the mean of the class means. ``1 / (P - 1)`` is the least for means at equal distances to their centre.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> round(centered_cosine(class_moments(torch.eye(3), torch.arange(3), num_classes=3)).item(), 6)
        0.5

    Source:
        The cosines of NC2 (Papyan, Han & Donoho, PNAS 2020, arXiv 2008.08186); their mean absolute value is ours.
    """
    return _centered_cosines(moments).abs().mean()


@geometry_metric(
    interval="[0, 1]",
    better="lower",
    best="1 / (P - 1) in a simplex of P classes",
    undefined="fewer than two classes, or a class mean on the centre",
)
def centered_cosine_max(moments: ClassMoments) -> Tensor:
    """Largest absolute cosine between two centred class means: ``max_{a<b} |cos(m_a - m, m_b - m)|``.

    Always 1 with two classes.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> round(centered_cosine_max(class_moments(torch.eye(3), torch.arange(3), num_classes=3)).item(), 6)
        0.5

    Source:
        The mutual coherence (Donoho & Huo, IEEE Trans. Inf. Theory 47(7), 2001) of the centred class means. At least
        ``sqrt((P - D) / (D (P - 1)))`` where P > D (Welch, IEEE Trans. Inf. Theory 20(3), 1974).
    """
    cosines = _centered_cosines(moments).abs()
    return cosines.max() if len(cosines) else undefined(moments)


@geometry_metric(
    interval="[0, 2)",
    better="lower",
    best="0: all angles are those of a simplex",
    undefined="fewer than two classes, or a class mean on the centre",
)
def simplex_deviation(moments: ClassMoments) -> Tensor:
    """Mean deviation of the centred class means from a simplex: ``mean_{a<b} |cos(m_a - m, m_b - m) + 1 / (P - 1)|``.

    ``P`` is the number of classes that have embeddings. Always 0 with two classes.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> simplex_deviation(class_moments(torch.eye(3), torch.arange(3), num_classes=3)).item() < 1e-12
        True

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC2, maximal equiangularity; ``m`` is the mean of the class
        means.
    """
    present = int((moments.counts > 0).sum())
    return (_centered_cosines(moments) + 1 / max(present - 1, 1)).abs().mean()


@geometry_metric(
    interval="[0, 1]",
    better="lower",
    best="0: all angles are equal, as in a simplex",
    undefined="fewer than two classes, or a class mean on the centre",
)
def equiangularity(moments: ClassMoments) -> Tensor:
    """Standard deviation of the cosines between centred class means: ``std_{a<b} cos(m_a - m, m_b - m)``.

    Always 0 with two classes.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> equiangularity(class_moments(torch.eye(3), torch.tensor([0, 1, 2]), num_classes=3)).item() < 1e-12
        True

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC2, equiangularity; ``m`` is the mean of the class means.
        Orthogonal class means of equal norm form a simplex when centred, so the minimum of SimO
        has 0 here and in `equinorm`.
    """
    cosines = _centered_cosines(moments)
    return cosines.std(correction=0) if len(cosines) else undefined(moments)


@geometry_metric(
    interval=">= 0",
    better="lower",
    best="0: all class means are equally far from their centre",
    undefined="fewer than two classes, or class means that all coincide",
)
def equinorm(moments: ClassMoments) -> Tensor:
    """Coefficient of variation of the distances of class means to their centre: ``std_c |m_c - m| / mean_c |m_c - m|``.

    Always 0 with two classes.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> equinorm(class_moments(torch.eye(3), torch.tensor([0, 1, 2]), num_classes=3)).item() < 1e-12
        True

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC2, equinorm; ``m`` is the mean of the class means.
    """
    means = present_means(moments)
    if len(means) < 2:
        return undefined(moments)
    norms = centered_means(means, means.mean(dim=0)).norm(dim=1)
    return norms.std(correction=0) / norms.mean()


def _pair_cosines(vectors: Tensor) -> Tensor:
    """Cosines of the P (P - 1) / 2 pairs of vectors; nan where a vector is zero."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.mT)[first, second].clamp(-1, 1)


def _centered_cosines(moments: ClassMoments) -> Tensor:
    """Cosines of the pairs of centred class means; empty with fewer than two classes."""
    means = present_means(moments)
    if len(means) < 2:
        return means.new_empty(0)
    return _pair_cosines(centered_means(means, means.mean(dim=0)))
