"""Geometry of labelled embeddings, each number an exact function of the class moments.

Shapes: D dimensions, C classes of which P have rows. Every value is a scalar in the dtype of the moments; undefined is
``nan``, never a flattering 0. A difference that the rounding of the sums alone explains counts as zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from simo_lightning.functional.moments import ClassMoments

# Sums over many batches lose a few bits: what is below this many units of rounding is taken for zero.
_ROUNDING_UNITS = 1024


def orthogonality(moments: ClassMoments) -> Tensor:
    """Mean absolute cosine between class means: ``mean_{a<b} |cos(m_a, m_b)|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better (0: all class means are orthogonal); ``nan`` with fewer than two classes or
        where a class mean is zero.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> orthogonality(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2)).item()
        0.0

    Source:
        What SimO loss asks of class means (Bouhsine et al., arXiv 2410.05233); the number itself is ours.
    """
    return _pair_cosines(_present_means(moments)).abs().mean()


def orthogonality_max(moments: ClassMoments) -> Tensor:
    """Largest absolute cosine between two class means: ``max_{a<b} |cos(m_a, m_b)|``.

    Args:
        moments: Class moments; classes without rows do not count.

    Returns:
        Scalar in [0, 1], lower is better (1: two classes share a direction); ``nan`` as for :func:`orthogonality`.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
        >>> orthogonality_max(class_moments(embeddings, torch.tensor([0, 1, 2]), num_classes=3)).item()
        1.0

    Source:
        The mutual coherence of the class means (Donoho & Huo, IEEE Trans. Inf. Theory 47(7), 2001).
    """
    cosines = _pair_cosines(_present_means(moments)).abs()
    return cosines.max() if len(cosines) else _nan(moments)


def effective_rank(moments: ClassMoments) -> Tensor:
    """Number of dimensions in use: ``exp(-sum_k p_k log p_k)``, ``p_k = s_k / sum_l s_l``.

    ``s_k`` are the singular values of the uncentred ``(N, D)`` matrix of embeddings, found as the square roots of the
    eigenvalues of its second moment.

    Args:
        moments: Class moments; the labels do not matter.

    Returns:
        Scalar in [1, min(N, D)], higher is better (1: all on one line through the origin); ``nan`` if there is no
        embedding, or all are zero, or one is not finite.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> moments = class_moments(torch.eye(3), torch.tensor([0, 0, 1]), num_classes=2)
        >>> round(effective_rank(moments).item(), 6)
        3.0

    Source:
        Roy & Vetterli, EUSIPCO 2007; for embeddings RankMe (Garrido et al., arXiv 2210.02885), which adds 1e-7 to each
        ``p_k``; nothing is added here, eigenvalues within rounding of zero count as zero.
    """
    second = moments.second.sum(dim=0)
    if not second.isfinite().all():
        return _nan(moments)
    eigenvalues = torch.linalg.eigvalsh(second)  # (D,)
    singular = _without_rounding(eigenvalues, eigenvalues.max()).clamp(min=0).sqrt()
    p = singular / singular.sum()
    return torch.special.entr(p).sum().exp()


def within_between(moments: ClassMoments) -> Tensor:
    """Scatter within classes over scatter between them: ``tr(S_W) / tr(S_B)``.

    ``tr(S_W) = sum_i |e_i - m_{y_i}|^2`` and ``tr(S_B) = sum_c n_c |m_c - m|^2`` with ``m`` the mean of all embeddings.

    Args:
        moments: Class moments.

    Returns:
        Scalar >= 0, lower is better (0: every class is one point; ``inf``: all class means coincide); ``nan`` with
        fewer than two classes or where all embeddings coincide.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> within_between(class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)).item()
        0.04

    Source:
        Fisher's scatter ratio; ``(N - C) / (C - 1)`` over it is the Calinski-Harabasz score.
    """
    present = moments.counts > 0
    if int(present.sum()) < 2:
        return _nan(moments)
    means, counts = moments.means[present], moments.counts[present]
    center = moments.sums.sum(dim=0) / counts.sum()
    between = (counts * _centered(means, center).square().sum(dim=1)).sum()
    total = moments.second.diagonal(dim1=1, dim2=2).sum()
    return _without_rounding(moments.scatter[present].sum(), total) / between


def nc1(moments: ClassMoments) -> Tensor:
    """Variability collapse: ``tr(S_W pinv(S_B)) / C``.

    ``S_W = 1/N sum_i (e_i - m_{y_i})(e_i - m_{y_i})^T`` and ``S_B = 1/C sum_c (m_c - m)(m_c - m)^T``, with ``m`` the
    mean of the class means and C the number of classes that have rows.

    Args:
        moments: Class moments.

    Returns:
        Scalar >= 0, lower is better (0: no spread within classes in the directions that tell classes apart); ``nan``
        with fewer than two classes or where all class means coincide.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> round(nc1(class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)).item(), 6)
        0.02

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC1. Their global mean is that of all samples; the two are
        the same where classes are equal in size, as theirs are.
    """
    means = _present_means(moments)
    if len(means) < 2:
        return _nan(moments)
    centered = _centered(means, means.mean(dim=0))
    if not centered.any():
        return _nan(moments)
    # S_B = centered^T centered / P: its pseudo-inverse from the singular values of `centered`, without squaring them
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)  # (R,), (R, D)
    kept = singular > _ROUNDING_UNITS * torch.finfo(singular.dtype).eps * singular.max()
    kept &= torch.arange(len(kept), device=kept.device) < len(means) - 1  # centred means have rank P - 1 at most
    between = singular[kept].square() / len(means)
    scatter = moments.second.sum(dim=0) - moments.sums.mT @ moments.means.nan_to_num(nan=0.0)  # N S_W, (D, D)
    within = ((directions[kept] @ scatter) * directions[kept]).sum(dim=1)
    total = moments.second.diagonal(dim1=1, dim2=2).sum()
    within = _without_rounding(within, total).clamp(min=0) / moments.counts.sum()
    return (within / between).sum() / len(means)


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
    means = _present_means(moments)
    if len(means) < 2:
        return _nan(moments)
    norms = _centered(means, means.mean(dim=0)).norm(dim=1)
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
    means = _present_means(moments)
    if len(means) < 2:
        return _nan(moments)
    return _pair_cosines(_centered(means, means.mean(dim=0))).std(correction=0)


def alignment(moments: ClassMoments) -> Tensor:
    """Mean squared distance between two embeddings of one class, over all such pairs.

    By the moments: ``sum_c n_c * scatter_c / sum_c n_c (n_c - 1) / 2``.

    Args:
        moments: Class moments.

    Returns:
        Scalar >= 0 in squared units of the embeddings, lower is better at a given :func:`rms_norm`; ``nan`` if no
        class has two rows.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [9.0]])
        >>> alignment(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2)).item()
        4.0

    Source:
        Wang & Isola, arXiv 2005.10242, alignment with alpha = 2; there a positive pair is two views of one image.
    """
    present = moments.counts > 0
    counts = moments.counts[present]
    traces = moments.second.diagonal(dim1=1, dim2=2).sum(dim=1)[present]
    scatter = _without_rounding(moments.scatter[present], traces)
    return (counts * scatter).sum() / (counts * (counts - 1) / 2).sum()


def rms_norm(moments: ClassMoments) -> Tensor:
    """Root mean square norm of the embeddings: ``sqrt(mean_i |e_i|^2)``.

    Args:
        moments: Class moments; the labels do not matter.

    Returns:
        Scalar >= 0 in units of the embeddings; neither direction is better: it gives the scale for `alignment`, and
        shows embeddings that vanish or blow up. ``nan`` if there is no embedding.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> rms_norm(class_moments(torch.tensor([[3.0, 4.0]]), torch.tensor([0]), num_classes=1)).item()
        5.0

    Source:
        Ours.
    """
    return (moments.second.diagonal(dim1=1, dim2=2).sum() / moments.counts.sum()).sqrt()


_OF_MEANS = (equiangularity, equinorm, orthogonality, orthogonality_max)
_OF_SPREAD = (alignment, effective_rank, nc1, rms_norm, within_between)
#: Every function of this file by the name it is logged under.
GEOMETRY: dict[str, Callable[[ClassMoments], Tensor]] = {
    function.__name__: function for function in sorted((*_OF_MEANS, *_OF_SPREAD), key=lambda each: each.__name__)
}


def _nan(moments: ClassMoments) -> Tensor:
    return moments.sums.new_tensor(float("nan"))


def _present_means(moments: ClassMoments) -> Tensor:
    """Means of the classes that have rows, (P, D)."""
    return moments.means[moments.counts > 0]


def _without_rounding(values: Tensor, scale: Tensor) -> Tensor:
    """The values, those below rounding at this scale set to 0."""
    floor = _ROUNDING_UNITS * torch.finfo(values.dtype).eps * scale
    return torch.where(values.abs() <= floor, torch.zeros_like(values), values)


def _centered(means: Tensor, center: Tensor) -> Tensor:
    """Means less their centre (P, D); rows that differ from it by rounding alone are 0."""
    centered = means - center
    norms = _without_rounding(centered.norm(dim=1, keepdim=True), means.norm(dim=1).max())
    return torch.where(norms > 0, centered, torch.zeros_like(centered))


def _pair_cosines(vectors: Tensor) -> Tensor:
    """Cosines of the P (P - 1) / 2 pairs of rows; nan where a row is zero."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return (unit @ unit.mT)[first, second].clamp(-1, 1)
