"""How far embeddings are from collapse: to a line, to a point, or of one class into another."""

import torch
from torch import Tensor

from simo_lightning.functional.geometry.rounding import ROUNDING_UNITS, undefined
from simo_lightning.functional.geometry.spectrum import effective_rank
from simo_lightning.functional.moments import ClassMoments

__all__ = ["class_separation", "rank_share", "spread_share"]


def rank_share(moments: ClassMoments) -> Tensor:
    """Dimensions in use beyond one line, as a share of those that the classes need: ``(r - 1) / (min(C, D) - 1)``.

    Args:
        moments: Class moments; C is the number of classes with embeddings, r the :func:`.geometry.effective_rank`.

    Returns:
        Scalar >= 0, higher is better (0: all embeddings on one line through the origin; 1: as many dimensions as
        classes, or more); ``nan`` where the rank is ``nan``, or with fewer than two classes or dimensions.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> round(rank_share(class_moments(torch.eye(3), torch.tensor([0, 1, 2]), num_classes=3)).item(), 6)
        1.0

    Source:
        Ours: the minimum of SimO has one orthogonal direction per class.
    """
    needed = min(int((moments.counts > 0).sum()), moments.sums.shape[1])
    return (effective_rank(moments) - 1) / (needed - 1) if needed > 1 else undefined(moments)


def spread_share(moments: ClassMoments) -> Tensor:
    """Share of the mean squared norm that is variance: ``1 - |mean_i e_i|^2 / mean_i |e_i|^2``.

    Args:
        moments: Class moments; the labels do not matter.

    Returns:
        Scalar in [0, 1] (0: all embeddings are one point; 1: centred); ``nan`` if there is no embedding or all are
        zero.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> spread_share(class_moments(torch.eye(2), torch.tensor([0, 1]), num_classes=2)).item()
        0.5

    Source:
        Ours.
    """
    count = moments.counts.sum()
    square = moments.squared_norms.sum() / count
    return (1 - (moments.sums.sum(dim=0) / count).square().sum() / square).clamp(0, 1)


def class_separation(moments: ClassMoments) -> Tensor:
    """Distance between two class means in standard deviations of the classes along the line between them: ``d'``.

    ``d'_ab^2 = (|m_a - m_b|^2 - tr(S_a) / n_a - tr(S_b) / n_b) / v_ab``, where ``S_c`` is the unbiased covariance of
    class c and ``v_ab`` the mean of ``u^T S_a u`` and ``u^T S_b u``, u the unit vector from one mean to the other. The
    subtracted terms are what the sampling noise of the two means adds to their squared distance.

    Args:
        moments: Class moments.

    Returns:
        ``(C, C)``, symmetric, >= 0, free of scale and of rotation (0: the means coincide; ``inf``: two points); of two
        normal classes the nearer mean is right in a share ``Phi(d' / 2)``: 0.5 gives 60 %, 1 gives 69 %, 3 gives 93 %.
        ``nan`` on the diagonal and for classes of fewer than two embeddings.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> moments = class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> round(class_separation(moments)[0, 1].item(), 6)
        7.0

    Source:
        The sensitivity index d' of signal detection theory (Green & Swets, 1966) along the line of the means; the
        correction for noise is ours.
    """
    means, counts = moments.means, moments.counts
    eps = ROUNDING_UNITS * torch.finfo(means.dtype).eps
    squares = moments.squared_norms / counts  # (C,) mean |e|^2
    scale = (squares + squares.unsqueeze(1)) / 2  # (C, C)
    noise = moments.scatter / (counts - 1) / counts  # (C,)
    distances = torch.stack([(means - mean).square().sum(dim=1) for mean in means])  # (C, C), all squared
    beyond = (distances - noise - noise.unsqueeze(1)).clamp(min=0)
    beyond = torch.where(distances > eps**2 * scale, beyond, 0)
    along = torch.stack([_spread_along(moments, index) for index in range(len(counts))])  # (C, C)
    variances = (along + along.mT) / 2 / distances
    variances = torch.where(variances > eps * scale, variances, 0)
    separation = torch.where(beyond > 0, (beyond / variances).sqrt(), 0)
    known = counts > 1
    separation = torch.where(known & known.unsqueeze(1), separation, float("nan"))
    return separation.fill_diagonal_(float("nan"))


def _spread_along(moments: ClassMoments, index: int) -> Tensor:
    """``|m_c - m|^2`` times the variance of the class `index`, of mean m, along the line to each mean m_c; (C,)."""
    count, second, mean = moments.counts[index], moments.second[index], moments.means[index]
    differences = moments.means - mean  # (C, D)
    along = (differences @ second * differences).sum(dim=1) - count * (differences @ mean).square()
    return along / (count - 1)
