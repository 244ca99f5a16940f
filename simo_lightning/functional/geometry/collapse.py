"""How far embeddings are from collapse: to a line, to a point, or of one class into another."""

from collections.abc import Iterator

import torch
from torch import Tensor

from simo_lightning.functional.geometry.rounding import ROUNDING_UNITS, undefined
from simo_lightning.functional.geometry.spectrum import effective_rank
from simo_lightning.functional.moments import ClassMoments

__all__ = ["class_separation", "class_separation_blocks", "rank_share", "spread_share"]

# Classes on each side of a block of pairs.
_BLOCK = 1024
# Pairs of means whose differences, of D numbers each, are computed at a time.
_PAIRS = 8192


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

    Moments without ``second`` do not have ``S_a`` and ``S_b``: there ``v_ab = u^T W u`` with the pooled covariance
    within classes, ``W = sum_c (n_c - 1) S_c / sum_c (n_c - 1)``. The two are equal where all classes have the same
    covariance; a class that spreads less than the others then seems less separated than it is, and one that spreads
    more seems more so.

    Args:
        moments: Class moments.

    Returns:
        ``(C, C)``, symmetric, >= 0, free of scale and of rotation (0: the means coincide; ``inf``: two points); of two
        normal classes the nearer mean is right in a share ``Phi(d' / 2)``: 0.5 gives 60 %, 1 gives 69 %, 3 gives 93 %.
        ``nan`` on the diagonal and for classes of fewer than two embeddings. Of many classes, see
        :func:`class_separation_blocks`.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> moments = class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> round(class_separation(moments)[0, 1].item(), 6)
        7.0

    Source:
        The sensitivity index d' of signal detection theory (Green & Swets, 1966) along the line of the means; the
        correction for noise is ours. With the pooled covariance it is the Mahalanobis distance along that line.
    """
    num_classes = len(moments.counts)
    separation = moments.sums.new_empty(num_classes, num_classes)
    for rows, columns, block in class_separation_blocks(moments):
        separation[rows, columns] = block
        separation[columns, rows] = block.mT
    return separation


def class_separation_blocks(moments: ClassMoments) -> Iterator[tuple[slice, slice, Tensor]]:
    """The blocks of :func:`class_separation` on and above the diagonal, without the ``(C, C)`` matrix in memory.

    Args:
        moments: Class moments.

    Yields:
        Rows, columns and the block, of at most 1,024 x 1,024 classes.

    Example:
        >>> moments = ClassMoments.zeros(2_000, 2)
        >>> [tuple(block.shape) for _, _, block in class_separation_blocks(moments)]
        [(1024, 1024), (1024, 976), (976, 976)]
    """
    counts, known = moments.counts, moments.counts > 1
    eps = ROUNDING_UNITS * torch.finfo(moments.sums.dtype).eps
    squares = moments.squared_norms / counts  # (C,) mean |e|^2
    noise = moments.scatter / (counts - 1) / counts  # (C,)
    # one origin amid the means leaves more digits to their differences; classes without embeddings are nan in the end
    means = moments.means - (moments.sums.sum(dim=0) / counts.sum())  # (C, D)
    scaled = _scaled_by_pooled_spread(moments, means) if moments.second is None else None
    blocks = [slice(start, min(start + _BLOCK, len(means))) for start in range(0, len(means), _BLOCK)]
    for index, rows in enumerate(blocks):
        for columns in blocks[index:]:
            scale = (squares[rows].unsqueeze(1) + squares[columns]) / 2  # (n, m)
            distances = _squared_distances(means[rows], means[columns])
            beyond = (distances - noise[rows].unsqueeze(1) - noise[columns]).clamp(min=0)
            beyond = torch.where(distances > eps**2 * scale, beyond, 0)
            if scaled is None:
                along = (_spread_along(moments, rows, columns) + _spread_along(moments, columns, rows).mT) / 2
            else:
                along = _squared_distances(scaled[rows], scaled[columns])
            variances = along / distances
            variances = torch.where(variances > eps * scale, variances, 0)
            separation = torch.where(beyond > 0, (beyond / variances).sqrt(), 0)
            separation = torch.where(known[rows].unsqueeze(1) & known[columns], separation, float("nan"))
            if rows == columns:
                separation = ((separation + separation.mT) / 2).fill_diagonal_(
                    float("nan")
                )  # symmetric to the last digit
            yield rows, columns, separation


def _squared_distances(first: Tensor, other: Tensor) -> Tensor:
    """Squared distances (n, m) of the rows (n, D) and (m, D), each with at least 10 digits in float64."""
    squares = first.square().sum(dim=1).unsqueeze(1) + other.square().sum(dim=1)
    distances = squares - 2 * first @ other.mT
    near = (distances < 1e-5 * squares).nonzero()  # few: by their differences, since here the squares cancel
    for rows, columns in (pairs.unbind(dim=1) for pairs in near.split(_PAIRS)):
        distances[rows, columns] = (first[rows] - other[columns]).square().sum(dim=1)
    return distances


def _scaled_by_pooled_spread(moments: ClassMoments, means: Tensor) -> Tensor:
    """The means (C, D) in a basis in which a squared distance is ``|m_a - m_b|^2 u^T W u``."""
    degrees = (moments.counts - 1).clamp(min=0).sum()
    within = (moments.second_moment - moments.sums.mT @ moments.means.nan_to_num(nan=0.0)) / degrees  # W, (D, D)
    if not within.isfinite().all():  # also where no class has two embeddings
        return torch.full_like(means, float("nan"))
    eigenvalues, vectors = torch.linalg.eigh(within)
    return means @ (vectors * eigenvalues.clamp(min=0).sqrt())


def _spread_along(moments: ClassMoments, rows: slice, columns: slice) -> Tensor:
    """``|m_b - m_a|^2`` times the variance of each class a of the rows along the line to each mean m_b, (n, m)."""
    others, found = moments.means[columns], []
    for index in range(rows.start, rows.stop):
        count, second, mean = (
            moments.counts[index],
            moments.required_second("class_separation")[index],
            moments.means[index],
        )
        differences = others - mean  # (m, D)
        along = (differences @ second * differences).sum(dim=1) - count * (differences @ mean).square()
        found.append(along / (count - 1))
    return torch.stack(found)
