"""Orthogonal decomposition of an embedding: how much of its energy belongs to each class, and how much to none.

Shapes: N embeddings, D dimensions, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from simo_lightning.functional.knn import check_finite
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.neighbors import unit_vectors

__all__ = ["OrthogonalBasis", "OrthogonalShares", "orthogonal_basis", "orthogonal_shares"]


class OrthogonalBasis(NamedTuple):
    """The orthonormal directions that are nearest to the directions of the class means.

    Attributes:
        vectors: One direction per class, ``(C, D)``; zeros for a class without a mean. ``vectors.T @ vectors`` is the
            projection on the span of the class means.
        rank: Dimensions of that span, at most C and D.
        deviation: Root mean square distance of the class means, scaled to length 1, to their directions; 0 if the means
            are orthogonal, ``nan`` if no class has a mean.
    """

    vectors: Tensor
    rank: int
    deviation: Tensor


class OrthogonalShares(NamedTuple):
    """Shares of the energy of each embedding; they sum to 1.

    Attributes:
        shares: Of each class, ``(N, C)``, >= 0.
        rest: Outside of the span of the class means, ``(N,)``, >= 0.
    """

    shares: Tensor
    rest: Tensor


def orthogonal_basis(class_means: Tensor) -> OrthogonalBasis:
    """Symmetric (Loewdin) orthonormalisation of the class means.

    With the class means scaled to length 1 as rows of ``M = U S V^T``, the directions are the rows of the polar factor
    ``Q = U V^T``, over the singular values that are not zero. Of all orthonormal rows these have the smallest sum of
    squared distances to the rows of M, and no class comes first, unlike in Gram-Schmidt.

    If there are more classes than dimensions, or the means are linearly dependent, C orthonormal directions do not
    exist. The rows of Q are then the Parseval frame of the span that is nearest to M: shorter than 1 and not
    orthogonal, but their squared projections still sum to the energy in the span.

    How large the difference is: with the cosines ``G = M M^T`` of the means, ``M = G^(1/2) Q``. To first order each
    direction is its mean less half of every other mean times their cosine, ``q_c = m_c - 1/2 sum_d G_cd m_d`` over
    d != c, so that of two similar classes neither is preferred. The deviation is ``sqrt(sum_i (1 - s_i)^2 / C)`` over
    the singular values s_i of M that are not zero, and so 0 if the means are orthogonal. For C > D classes it is at
    least ``1 - sqrt(D / C)`` where they span all dimensions.

    Args:
        class_means: Float tensor ``(C, D)``; a row of zeros or ``nan`` is a class without a mean.

    Returns:
        The directions in float64, their rank, and how far the class means are from orthogonal.

    Raises:
        ValueError: If the shape or type is wrong, or a mean is infinite.

    Example:
        >>> basis = orthogonal_basis(torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
        >>> basis.vectors.tolist(), basis.rank, basis.deviation.item()
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], 2, 0.0)

    Source:
        Loewdin, J. Chem. Phys. 18, 1950; that the polar factor is the nearest: Higham, SIAM J. Sci. Stat. Comput. 7(4),
        1986.
    """
    directions, present = _directions(class_means)
    left, _, right, rank = _svd(directions)
    vectors = left @ right
    distance = (directions - vectors)[present].square().sum(dim=1)
    return OrthogonalBasis(vectors, rank, distance.mean().sqrt())


def orthogonal_shares(embeddings: Tensor, class_means: Tensor) -> OrthogonalShares:
    """Share of the energy of each embedding along each class, and outside of the span of the class means.

    With the embedding x scaled to length 1 and the directions q_c of :func:`orthogonal_basis`, the share of a class is
    ``(q_c . x)^2``, and the rest is ``1 - sum_c (q_c . x)^2``, the squared length of the part of x that is orthogonal
    to all class means. If the class means span all D dimensions, as C >= D of them usually do, the rest is 0.

    If the means m_c of length 1 are orthogonal, the share of a class is the squared cosine with its mean,
    ``(m_c . x)^2``. Otherwise they differ by at most ``|q_c - m_c| (|q_c| + 1) <= 2 |q_c - m_c|``, and so by at most
    twice the deviation of :func:`orthogonal_basis` in the root mean square over the classes. The squared cosines do not
    sum to 1 then: what two similar classes have in common would count twice. A share has no sign, so that of an
    embedding opposite to a class mean is large too, and the class with the largest share need not be that with the
    largest cosine. A share is at most ``|q_c|^2``: 1 for linearly independent means, and ``D / C`` in the mean over
    C > D classes that span all dimensions.

    Args:
        embeddings: Float tensor ``(N, D)``.
        class_means: Float tensor ``(C, D)``; a row of zeros or ``nan`` is a class without a mean, whose share is 0.

    Returns:
        Shares ``(N, C)`` and rest ``(N,)``, float64 (float32 on MPS), in [0, 1]. An embedding of zeros has rest 1.

    Raises:
        ValueError: If a shape or type is wrong, an embedding is not finite, or a mean is infinite.

    Example:
        >>> means = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> shares, rest = orthogonal_shares(torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 4.0]]), means)
        >>> shares.round(decimals=4).tolist(), rest.round(decimals=4).tolist()
        ([[0.5, 0.5], [0.0, 0.36]], [0.0, 0.64])
    """
    check_means(embeddings, class_means)
    vectors = orthogonal_basis(class_means).vectors
    shares = (unit_vectors(embeddings.to(vectors.dtype)) @ vectors.mT).square()
    return OrthogonalShares(shares, (1 - shares.sum(dim=1)).clamp(min=0))


def span_energy(embeddings: Tensor, class_means: Tensor) -> Tensor:
    """``1 - rest`` of :func:`orthogonal_shares`, ``(N,)``, without the shares of the classes."""
    check_means(embeddings, class_means)
    directions, _ = _directions(class_means)
    _, _, right, _ = _svd(directions)
    return (unit_vectors(embeddings.to(right.dtype)) @ right.mT).square().sum(dim=1).clamp(max=1)


def check_means(embeddings: Tensor, class_means: Tensor) -> None:
    """Raise unless embeddings ``(N, D)`` are finite and class means are ``(C, D)``."""
    check_embeddings(embeddings)
    check_embeddings(class_means, name="class_means")
    if embeddings.shape[1] != class_means.shape[1]:
        raise ValueError(
            f"embeddings and class_means must have shapes (N, D) and (C, D), "
            f"got {tuple(embeddings.shape)} and {tuple(class_means.shape)}"
        )
    check_finite(embeddings, "embeddings")


def _directions(class_means: Tensor) -> tuple[Tensor, Tensor]:
    """Class means of length 1, zeros for a class without one, (C, D); and which classes have one, (C,)."""
    check_embeddings(class_means, name="class_means")
    if class_means.isinf().any():
        rows = int(class_means.isinf().any(dim=1).sum())
        raise ValueError(f"class_means must be finite or nan, got inf in {rows} of {len(class_means)} means")
    dtype = torch.float32 if class_means.device.type == "mps" else torch.float64  # MPS has no float64
    known = ~class_means.isnan().any(dim=1, keepdim=True)
    directions = unit_vectors(torch.where(known, class_means, 0).to(dtype))
    return directions, directions.any(dim=1)


def _svd(directions: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Singular vectors (C, r), values (r,) and vectors (r, D) of the singular values that are not zero."""
    left, values, right = torch.linalg.svd(directions, full_matrices=False)
    limit = max(directions.shape) * torch.finfo(directions.dtype).eps
    rank = int((values > limit * values.max()).sum()) if values.numel() and values.max() > 0 else 0
    return left[:, :rank], values[:rank], right[:rank], rank
