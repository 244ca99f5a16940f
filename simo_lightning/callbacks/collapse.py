"""What has collapsed in a set of labelled embeddings, by their class moments: the rules behind CollapseAlarm."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from simo_lightning.functional.geometry import effective_rank, rms_norm
from simo_lightning.functional.moments import ClassMoments

#: One thing that has collapsed: ("nan",), ("norm",), ("point",), ("rank",), or ("merged", a, b) for classes a < b.
Fact = tuple[str | int, ...]

# What has collapsed counts as recovered when it is this factor beyond its limit: noise at the limit is no news.
_SLACK = 1.2
# Sums over many batches lose a few bits: what is below this many units of rounding is taken for zero.
_ROUNDING_UNITS = 1024


class Limits(NamedTuple):
    """Beyond which embeddings count as collapsed; all but the norms are free of scale.

    Attributes:
        rank_share: Of :func:`rank_share`, in 0..1.
        spread_share: Of :func:`spread_share`, in 0..1.
        separation: Of :func:`class_separation`, >= 0.
        smallest_norm: Of the RMS norm of the embeddings.
        largest_norm: Of the RMS norm of the embeddings.
    """

    rank_share: float
    spread_share: float
    separation: float
    smallest_norm: float
    largest_norm: float


def rank_share(moments: ClassMoments) -> Tensor:
    """Dimensions in use beyond one line, of those that the classes need: ``(r - 1) / (min(C, D) - 1)``.

    Args:
        moments: Class moments of C classes that have rows; r is the :func:`.geometry.effective_rank`.

    Returns:
        Scalar >= 0, higher is better (0: all embeddings on one line through the origin; 1: as many dimensions as
        classes, or more); ``nan`` where the rank is, or with fewer than two classes or dimensions.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> round(rank_share(class_moments(torch.eye(3), torch.tensor([0, 1, 2]), num_classes=3)).item(), 6)
        1.0

    Source:
        Ours: SimO asks for one orthogonal direction per class.
    """
    needed = min(int((moments.counts > 0).sum()), moments.sums.shape[1])
    return (effective_rank(moments) - 1) / (needed - 1) if needed > 1 else moments.sums.new_tensor(float("nan"))


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
    square = moments.second.diagonal(dim1=1, dim2=2).sum() / count
    return (1 - (moments.sums.sum(dim=0) / count).square().sum() / square).clamp(0, 1)


def class_separation(moments: ClassMoments) -> Tensor:
    """Distance of each two class means in spreads of the classes along the line between them: ``d'``.

    ``d'_ab^2 = (|m_a - m_b|^2 - tr(S_a) / n_a - tr(S_b) / n_b) / v_ab``, where ``S_c`` is the unbiased covariance of
    class c and ``v_ab`` the mean of ``u^T S_a u`` and ``u^T S_b u``, u the unit vector from one mean to the other. The
    subtracted terms are what the noise of two means of so few rows adds to their squared distance.

    Args:
        moments: Class moments.

    Returns:
        ``(C, C)``, symmetric, >= 0, free of scale and of rotation (0: the means coincide; ``inf``: two points); of two
        normal classes the nearer mean is right in a share ``Phi(d' / 2)``: 0.5 gives 60 %, 1 gives 69 %, 3 gives 93 %.
        ``nan`` on the diagonal and for classes of fewer than two rows.

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
    eps = _ROUNDING_UNITS * torch.finfo(means.dtype).eps
    squares = moments.second.diagonal(dim1=1, dim2=2).sum(dim=1) / counts  # (C,) mean |e|^2
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


def measure_collapse(moments: ClassMoments, limits: Limits) -> dict[Fact, float]:
    """Everything that can collapse, each in units of its limit: below 1 it has.

    Args:
        moments: Class moments.
        limits: Beyond which something counts as collapsed.

    Returns:
        Values >= 0 by fact; ``nan`` where one is undefined, as for classes of fewer than two rows. Where an embedding
        is not finite ``("nan",)`` alone, with 0.
    """
    if not moments.second.isfinite().all():
        return {("nan",): 0.0}
    norm = float(rms_norm(moments))
    shares: dict[Fact, float] = {
        ("norm",): min(norm / limits.smallest_norm, limits.largest_norm / norm) if norm else 0.0,
        ("point",): float(spread_share(moments)) / limits.spread_share,
        ("rank",): float(rank_share(moments)) / limits.rank_share,
    }
    separation = (class_separation(moments) / limits.separation).tolist()
    for a, b in combinations(range(len(separation)), 2):
        shares["merged", a, b] = separation[a][b]
    return shares


def find_collapse(shares: dict[Fact, float], known: frozenset[Fact] = frozenset()) -> frozenset[Fact]:
    """What has collapsed.

    Args:
        shares: Of :func:`measure_collapse`.
        known: What had before: it has to come to 1.2 times its limit to have recovered. Where an embedding is not
            finite nothing else can be told, and all of it stays.

    Returns:
        The facts; what is undefined has not collapsed.

    Example:
        >>> find_collapse({("rank",): 1.1, ("point",): 1.1, ("norm",): float("nan")}, known=frozenset({("rank",)}))
        frozenset({('rank',)})
    """
    if ("nan",) in shares:
        return known | {("nan",)}
    return frozenset(fact for fact, share in shares.items() if share < (_SLACK if fact in known else 1))


def merged_groups(facts: frozenset[Fact]) -> list[list[int]]:
    """Classes that are joined by merged pairs, directly or through others.

    Args:
        facts: Of :func:`find_collapse`; those of merged classes count.

    Returns:
        Groups of two classes or more, sorted.

    Example:
        >>> merged_groups(frozenset({("rank",), ("merged", 0, 4), ("merged", 2, 4), ("merged", 1, 3)}))
        [[0, 2, 4], [1, 3]]
    """
    groups: list[set[int]] = []
    for pair in ({int(label) for label in fact[1:]} for fact in facts if fact[0] == "merged"):
        touched = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
    return sorted(sorted(group) for group in groups)


def describe_collapse(moments: ClassMoments, facts: frozenset[Fact], names: Sequence[str] | None = None) -> str:
    """What the facts say, with numbers, in one line.

    Args:
        moments: Class moments in which the facts were found.
        facts: Those to be told. What another one implies is left out.
        names: Of the classes; None: their numbers.

    Returns:
        Such as "effective rank 1.2 for 10 classes in 16 dimensions; classes merged: cat = dog".
    """
    if ("nan",) in facts:
        return "nan or infinite values"
    present, dim = int((moments.counts > 0).sum()), moments.sums.shape[1]
    parts = []
    if ("norm",) in facts:
        parts.append(f"RMS norm {float(rms_norm(moments)):.3g}")
    if ("point",) in facts:
        return "; ".join(
            [*parts, f"all at one point (variance is {float(spread_share(moments)):.2g} of the mean square)"]
        )
    if ("rank",) in facts:
        rank = float(effective_rank(moments))
        parts.append(f"effective rank {rank:.2f} for {present} classes in {dim} dimensions")
    groups = merged_groups(facts)
    if groups and len(groups[0]) == present:
        parts.append(f"all {present} classes merged")
    elif groups:
        named = [" = ".join(names[label] if names else str(label) for label in group) for group in groups]
        parts.append(f"classes merged: {'; '.join(named)}")
    return "; ".join(parts)


def _spread_along(moments: ClassMoments, index: int) -> Tensor:
    """``|m_c - m|^2`` times the variance of the class `index`, of mean m, along the line to each mean m_c; (C,)."""
    count, second, mean = moments.counts[index], moments.second[index], moments.means[index]
    differences = moments.means - mean  # (C, D)
    along = (differences @ second * differences).sum(dim=1) - count * (differences @ mean).square()
    return along / (count - 1)
