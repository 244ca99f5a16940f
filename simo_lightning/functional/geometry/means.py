"""Angles and lengths of class means, as they are and centred.

Centred means are the class means minus their own mean, with equal weight for every class. At most P - 1 of P centred
means are linearly independent, so they cannot all be orthogonal; in the best case they form a simplex, with all cosines
``-1 / (P - 1)``.

The cosines of all pairs are computed once, in blocks, for all metrics of the same moments: memory grows with P D.
"""

from typing import NamedTuple

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

# Cosines that are computed at a time: 32 MiB in float64.
_BLOCK = 2**22


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
    return moments.cached(_cosines).size


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
    return moments.cached(_cosines).largest


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
    return moments.cached(_centered_cosines).size


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
    return moments.cached(_centered_cosines).largest


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
    return moments.cached(_centered_cosines).simplex


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
    return moments.cached(_centered_cosines).spread


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


class _PairCosines(NamedTuple):
    """Statistics of the cosines of the P (P - 1) / 2 pairs of P vectors; ``nan`` with fewer than two vectors.

    Attributes:
        size: Mean absolute cosine.
        largest: Largest absolute cosine.
        simplex: Mean deviation from ``-1 / (P - 1)``.
        spread: Standard deviation.
    """

    size: Tensor
    largest: Tensor
    simplex: Tensor
    spread: Tensor


def _pair_cosines(vectors: Tensor) -> _PairCosines:
    """Statistics of the cosines of all pairs, in blocks of rows; ``nan`` where a vector is zero."""
    count = len(vectors)
    if count < 2:
        return _PairCosines(*vectors.new_full((4,), float("nan")))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    size, largest, simplex, mean, squares = vectors.new_zeros(5)
    pairs, step = 0, max(1, _BLOCK // count)
    for start in range(0, count, step):
        cosines = (unit[start : start + step] @ unit[start:].mT).clamp(-1, 1)  # (n, P - start)
        upper = tuple(torch.triu_indices(len(cosines), len(cosines), offset=1, device=cosines.device))
        for part in (cosines[upper], cosines[:, len(cosines) :].flatten()):  # each pair once
            if not len(part):
                continue
            size = size + part.abs().sum()
            largest = torch.maximum(largest, part.abs().max())
            simplex = simplex + (part + 1 / (count - 1)).abs().sum()
            # mean and squared deviations of two sets together (Chan, Golub & LeVeque, 1983): nothing cancels
            own_squares, own_mean = torch.var_mean(part, correction=0)
            pairs += len(part)
            share, difference = len(part) / pairs, own_mean - mean
            squares = squares + len(part) * (own_squares + difference.square() * (1 - share))
            mean = mean + difference * share
    return _PairCosines(size / pairs, largest, simplex / pairs, (squares / pairs).sqrt())


def _cosines(moments: ClassMoments) -> _PairCosines:
    return _pair_cosines(present_means(moments))


def _centered_cosines(moments: ClassMoments) -> _PairCosines:
    means = present_means(moments)
    return _pair_cosines(centered_means(means, means.mean(dim=0)) if len(means) > 1 else means)
