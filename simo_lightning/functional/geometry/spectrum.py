"""Directions in use: by all embeddings, by each class, and shared between classes."""

import torch
from torch import Tensor

from simo_lightning.functional.geometry.declaration import geometry_metric
from simo_lightning.functional.geometry.rounding import (
    ROUNDING_UNITS,
    class_variances,
    undefined,
    without_rounding,
)
from simo_lightning.functional.moments import ClassMoments

__all__ = [
    "class_participation_ratio",
    "effective_rank",
    "participation_ratio",
    "singular_values",
    "stable_rank",
    "subspace_overlap",
]

# Products of two directions that are computed at a time: 32 MiB in float64 with two directions a class.
_BLOCK = 2**21


def singular_values(moments: ClassMoments) -> Tensor:
    """Singular values of the uncentred ``(N, D)`` matrix of embeddings, largest first.

    Args:
        moments: Class moments; the labels do not matter.

    Returns:
        ``(D,)``, >= 0 in units of the embeddings, the square roots of the eigenvalues of their second moment; 0 where
        rounding explains the eigenvalue; ``nan`` if an embedding is not finite.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> moments = class_moments(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> singular_values(moments).tolist()
        [5.0, 0.0]

    Source:
        Linear algebra: the eigenvalues of ``X^T X`` are the squares of the singular values of ``X``.
    """
    second = moments.second_moment
    if not second.isfinite().all():
        return undefined(moments).expand(len(second))
    eigenvalues = torch.linalg.eigvalsh(second).flip(0)  # (D,)
    return without_rounding(eigenvalues, eigenvalues[0]).clamp(min=0).sqrt()


@geometry_metric(
    interval="[1, min(N, D)]",
    better="higher",
    best="1: all embeddings on one line through the origin",
    undefined="no embeddings, or embeddings that are all zero, or one that is not finite",
)
def effective_rank(moments: ClassMoments) -> Tensor:
    """Number of dimensions in use: ``exp(-sum_k p_k log p_k), p_k = s_k / sum_l s_l``.

    ``s_k`` are the singular values of the uncentred ``(N, D)`` matrix of embeddings, found as the square roots of the
    eigenvalues of its second moment. The labels do not matter.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> moments = class_moments(torch.eye(3), torch.tensor([0, 0, 1]), num_classes=2)
        >>> round(effective_rank(moments).item(), 6)
        3.0

    Source:
        Roy & Vetterli, EUSIPCO 2007; for embeddings RankMe (Garrido et al., arXiv 2210.02885), which adds 1e-7 to each
        ``p_k``; nothing is added here, eigenvalues within rounding of zero count as zero.
    """
    singular = moments.cached(singular_values)
    p = singular / singular.sum()
    return torch.special.entr(p).sum().exp()


@geometry_metric(
    interval="[1, min(N, D)]",
    better="higher",
    best="1: all embeddings on one line through the origin",
    undefined="no embeddings, or embeddings that are all zero, or one that is not finite",
)
def stable_rank(moments: ClassMoments) -> Tensor:
    """Number of dimensions relative to the strongest: ``|X|_F^2 / |X|_2^2``.

    ``X (N, D)`` are the embeddings. At most the rank. The labels do not matter.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> moments = class_moments(torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([0, 1]), num_classes=2)
        >>> round(stable_rank(moments).item(), 6)
        1.25

    Source:
        Rudelson & Vershynin, J. ACM 54(4), 2007 (arXiv math/0503442), there called numerical rank.
    """
    squares = moments.cached(singular_values).square()
    return squares.sum() / squares[0]


def class_participation_ratio(moments: ClassMoments) -> Tensor:
    """Participation ratio of each class's covariance: ``(sum_k l_k)^2 / sum_k l_k^2``, ``l_k`` its eigenvalues.

    Computed by traces, ``tr(Cov)^2 / tr(Cov^2)``, without eigenvalues.

    Args:
        moments: Class moments.

    Returns:
        ``(C,)`` in [1, min(n_c - 1, D)]: over how many directions the class spreads about its mean; ``nan`` for a class
        without spread, so also with fewer than two embeddings.

    Raises:
        ValueError: If the moments are without ``second``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [5.0, 5.0]])
        >>> moments = class_moments(corners, torch.tensor([0, 0, 0, 0, 1]), num_classes=2)
        >>> class_participation_ratio(moments).tolist()
        [2.0, nan]

    Source:
        Gao et al., bioRxiv 214262, 2017 (dimensionality of neural activity), here per class.
    """
    second = moments.required_second("class_participation_ratio")
    variances = class_variances(moments)  # (C,) tr(Cov)
    means, counts = moments.means, moments.counts.view(-1, 1, 1)
    covariances = second / counts - means.unsqueeze(2) * means.unsqueeze(1)  # (C, D, D)
    ratio = variances.square() / covariances.square().sum(dim=(1, 2))
    return torch.where(variances == 0, float("nan"), ratio)


@geometry_metric(
    interval="[1, D]",
    better="neither",
    best="the shape of the spread, not its size",
    undefined="classes without spread",
    needs_second=True,
)
def participation_ratio(moments: ClassMoments) -> Tensor:
    """Number of directions in which a class spreads about its mean: ``mean_c tr(Cov_c)^2 / tr(Cov_c^2)``.

    The mean of :func:`class_participation_ratio` over the classes that spread.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [5.0, 5.0]])
        >>> participation_ratio(class_moments(corners, torch.tensor([0, 0, 0, 0, 1]), num_classes=2)).item()
        2.0

    Source:
        Gao et al., bioRxiv 214262, 2017, averaged over classes.
    """
    spreads = (moments.counts > 0) & (class_variances(moments) != 0)  # values that are not finite are kept
    return class_participation_ratio(moments)[spreads].mean()


@geometry_metric(
    interval="[0, 1]",
    better="lower",
    best="0: the subspaces are orthogonal; about k / D for unrelated ones",
    undefined="fewer than two classes, or a class of zeros, or an embedding that is not finite",
    needs_second=True,
)
def subspace_overlap(moments: ClassMoments, directions: int = 2) -> Tensor:
    """Mean alignment of the leading directions of two classes: ``mean_{a<b} |U_a^T U_b|_F^2 / min(k_a, k_b)``.

    ``U_c (D, k_c)`` are the k leading eigenvectors of the class's second moment ``sum e e^T``, fewer where it has a
    smaller rank; ``|U_a^T U_b|_F^2`` is the sum of the squared cosines of the principal angles of the two subspaces.
    The second moment is not centred, because SimO makes every embedding of one class orthogonal to every embedding
    of another. The first direction is close to that of the class mean, the second is where the class spreads
    most beside it. So this also detects classes that spread towards each other although their means are orthogonal.

    Args:
        moments: Class moments; classes without embeddings do not count.
        directions: k. 2: the class mean and one direction of spread; further directions are mostly noise.

    Raises:
        ValueError: If ``directions`` is below 1, or the moments are without ``second``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, -1.0], [0.0, 2.0, 1.0], [0.0, 2.0, -1.0]])
        >>> moments = class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> subspace_overlap(moments).item()  # the means are orthogonal, the spread is shared
        0.5

    Source:
        Ours; principal angles as Björck & Golub, Math. Comp. 27(123), 1973. Where the k-th and the next eigenvalue are
        equal, the subspace is not unique.
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    present = moments.counts > 0
    second = moments.required_second("subspace_overlap")
    second = second[present] / moments.squared_norms[present].view(-1, 1, 1)  # (P, D, D)
    if len(second) < 2 or not second.isfinite().all():
        return undefined(moments)
    eigenvalues, vectors = torch.linalg.eigh(second)
    eigenvalues, vectors = eigenvalues[:, -directions:], vectors[..., -directions:]  # (P, k), (P, D, k)
    used = eigenvalues > ROUNDING_UNITS * torch.finfo(eigenvalues.dtype).eps * eigenvalues[:, -1:]
    vectors, ranks = vectors * used.unsqueeze(1), used.sum(dim=1)  # zeros where a class has fewer directions
    flat = vectors.permute(1, 2, 0).flatten(1)  # (D, k P)
    total, step = flat.new_zeros(()), max(1, _BLOCK // flat.shape[1])
    for start in range(0, len(vectors) - 1, step):
        block = slice(start, start + step)
        shared = (vectors[block].mT @ flat).square().sum(dim=1).unflatten(1, (-1, len(vectors))).sum(dim=1)  # (n, P)
        shared = (shared / torch.minimum(ranks[block].unsqueeze(1), ranks)).clamp(max=1)
        total = total + shared.triu(diagonal=start + 1).sum()
    return total / (len(vectors) * (len(vectors) - 1) / 2)
