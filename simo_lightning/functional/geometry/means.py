"""Angles and lengths of class means, as they are and centred.

Centred means are the class means less their own mean, every class counting alike. Of P of them at most P - 1 are
independent, so they cannot be orthogonal: the best they can be is a simplex, all cosines ``-1 / (P - 1)``.
"""

import torch
from torch import Tensor

from simo_lightning.functional.geometry.rounding import centered_means, undefined
from simo_lightning.functional.moments import ClassMoments


def class_cosine(moments: ClassMoments) -> Tensor:
    """Mean absolute cosine between class means: ``mean_{a<b} |cos(m_a, m_b)|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better (0: all class means are orthogonal); ``nan`` with fewer than two classes or
        where a class mean is zero.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> class_cosine(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2)).item()
        0.0

    Source:
        What SimO loss asks of class means (Bouhsine et al., arXiv 2410.05233); the number itself is ours.
    """
    return pair_cosines(present_means(moments)).abs().mean()


def class_cosine_max(moments: ClassMoments) -> Tensor:
    """Largest absolute cosine between two class means: ``max_{a<b} |cos(m_a, m_b)|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better (1: two classes share a direction); ``nan`` as for :func:`class_cosine`.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
        >>> class_cosine_max(class_moments(embeddings, torch.tensor([0, 1, 2]), num_classes=3)).item()
        1.0

    Source:
        The mutual coherence of the class means (Donoho & Huo, IEEE Trans. Inf. Theory 47(7), 2001).
    """
    cosines = pair_cosines(present_means(moments)).abs()
    return cosines.max() if len(cosines) else undefined(moments)


def equinorm(moments: ClassMoments) -> Tensor:
    """Unevenness of the class means' distances to their centre: ``std_c |m_c - m| / mean_c |m_c - m|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar >= 0, lower is better (0: all equally far; always so with two classes); ``nan`` with fewer than two
        classes or where all class means coincide.

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


def equiangularity(moments: ClassMoments) -> Tensor:
    """Unevenness of the angles between centred class means: ``std_{a<b} cos(m_a - m, m_b - m)``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better (0: all angles are equal, as in a simplex; always so with two classes);
        ``nan`` with fewer than two classes or where a class mean lies on the centre.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> equiangularity(class_moments(torch.eye(3), torch.tensor([0, 1, 2]), num_classes=3)).item() < 1e-12
        True

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC2, equiangularity; ``m`` is the mean of the class means.
        Orthogonal class means of equal norm are a simplex once centred: SimO's aim implies 0 here and in `equinorm`.
    """
    cosines = _centered_cosines(moments)
    return cosines.std(correction=0) if len(cosines) else undefined(moments)


def centered_cosine(moments: ClassMoments) -> Tensor:
    """Mean absolute cosine between centred class means: ``mean_{a<b} |cos(m_a - m, m_b - m)|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better; in a simplex, and so for orthogonal class means of equal norm, it is
        ``1 / (P - 1)`` with P the classes that have rows, the least that means of equal distance to their centre can
        have. ``nan`` with fewer than two classes or where a class mean lies on the centre.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> round(centered_cosine(class_moments(torch.eye(3), torch.arange(3), num_classes=3)).item(), 6)
        0.5

    Source:
        The cosines of NC2 (Papyan, Han & Donoho, PNAS 2020, arXiv 2008.08186); the mean of their sizes is ours.
    """
    return _centered_cosines(moments).abs().mean()


def centered_cosine_max(moments: ClassMoments) -> Tensor:
    """Largest absolute cosine between two centred class means: ``max_{a<b} |cos(m_a - m, m_b - m)|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better; in a simplex it is ``1 / (P - 1)``, and always 1 with two classes. ``nan``
        as for :func:`centered_cosine`.

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


def simplex_deviation(moments: ClassMoments) -> Tensor:
    """How far the centred class means are from a simplex: ``mean_{a<b} |cos(m_a - m, m_b - m) + 1 / (P - 1)|``.

    Args:
        moments: Class moments; classes without rows do not count, P are left.

    Returns:
        Scalar in [0, 2), lower is better (0: all angles are those of a simplex; always so with two classes); ``nan``
        as for :func:`centered_cosine`.

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


def present_means(moments: ClassMoments) -> Tensor:
    """Means of the classes that have rows, (P, D)."""
    return moments.means[moments.counts > 0]


def pair_cosines(vectors: Tensor) -> Tensor:
    """Cosines of the P (P - 1) / 2 pairs of rows; nan where a row is zero."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.mT)[first, second].clamp(-1, 1)


def _centered_cosines(moments: ClassMoments) -> Tensor:
    """Cosines of the pairs of centred class means; none with fewer than two classes."""
    means = present_means(moments)
    if len(means) < 2:
        return means.new_empty(0)
    return pair_cosines(centered_means(means, means.mean(dim=0)))
