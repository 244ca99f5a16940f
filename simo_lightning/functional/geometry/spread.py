"""Spread within classes: relative to that between classes, between pairs, and along or across the class mean."""

import torch
from torch import Tensor

from simo_lightning.functional.geometry.declaration import geometry_metric
from simo_lightning.functional.geometry.rounding import (
    ROUNDING_UNITS,
    centered_means,
    class_variances,
    present_means,
    undefined,
    without_rounding,
)
from simo_lightning.functional.moments import ClassMoments

__all__ = [
    "alignment",
    "class_variance_across",
    "class_variance_along",
    "nc1",
    "scatter_ratio",
    "variance_across",
    "variance_along",
]


@geometry_metric(
    interval=">= 0, inf where all class means coincide",
    better="lower",
    best="0: every class is one point",
    undefined="fewer than two classes, or embeddings that all coincide",
)
def scatter_ratio(moments: ClassMoments) -> Tensor:
    """Scatter within classes over scatter between them: ``tr(S_W) / tr(S_B)``.

    ``tr(S_W) = sum_i |e_i - m_{y_i}|^2`` and ``tr(S_B) = sum_c n_c |m_c - m|^2`` with ``m`` the mean of all embeddings.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> scatter_ratio(class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)).item()
        0.04

    Source:
        Fisher's scatter ratio; ``(N - C) / (C - 1)`` over it is the Calinski-Harabasz score.
    """
    present = moments.counts > 0
    if int(present.sum()) < 2:
        return undefined(moments)
    means, counts = moments.means[present], moments.counts[present]
    center = moments.sums.sum(dim=0) / counts.sum()
    between = (counts * centered_means(means, center).square().sum(dim=1)).sum()
    total = moments.squared_norms.sum()
    return without_rounding(moments.scatter[present].sum(), total) / between


@geometry_metric(
    interval=">= 0",
    better="lower",
    best="0: no spread within classes in the directions that separate classes",
    undefined="fewer than two classes, or class means that all coincide",
    class_name="NC1",
)
def nc1(moments: ClassMoments) -> Tensor:
    """Variability collapse: ``tr(S_W pinv(S_B)) / C``.

    ``S_W = 1/N sum_i (e_i - m_{y_i})(e_i - m_{y_i})^T`` and ``S_B = 1/C sum_c (m_c - m)(m_c - m)^T``, with ``m`` the
    mean of the class means and C the number of classes that have embeddings.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> round(nc1(class_moments(embeddings, torch.tensor([0, 0, 1, 1]), num_classes=2)).item(), 6)
        0.02

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC1. Their global mean is that of all samples; the two are
        the same where classes are equal in size, as theirs are.
    """
    means = present_means(moments)
    if len(means) < 2:
        return undefined(moments)
    centered = centered_means(means, means.mean(dim=0))
    if not centered.any():
        return undefined(moments)
    # S_B = centered^T centered / P: its pseudo-inverse from the singular values of `centered`, without squaring them;
    # those of a tall matrix are the ones of its R in QR, which costs less
    tall = len(means) > means.shape[1]
    _, singular, directions = torch.linalg.svd(
        torch.linalg.qr(centered, mode="r").R if tall else centered, full_matrices=False
    )  # (R,), (R, D)
    kept = singular > ROUNDING_UNITS * torch.finfo(singular.dtype).eps * singular.max()
    kept &= torch.arange(len(kept), device=kept.device) < len(means) - 1  # centred means have rank P - 1 at most
    between = singular[kept].square() / len(means)
    scatter = moments.second_moment - moments.sums.mT @ moments.means.nan_to_num(nan=0.0)  # N S_W, (D, D)
    within = ((directions[kept] @ scatter) * directions[kept]).sum(dim=1)
    total = moments.squared_norms.sum()
    within = without_rounding(within, total).clamp(min=0) / moments.counts.sum()
    return (within / between).sum() / len(means)


@geometry_metric(
    interval=">= 0, in squared units of the embeddings",
    better="lower",
    best="at equal rms_norm; 0: every class is one point",
    undefined="classes without two embeddings",
)
def alignment(moments: ClassMoments) -> Tensor:
    """Mean squared distance between two embeddings of one class: ``mean_{i<j, y_i = y_j} |e_i - e_j|^2``.

    Over all such pairs; by the moments ``sum_c n_c * scatter_c / sum_c n_c (n_c - 1) / 2``.

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
    scatter = without_rounding(moments.scatter, moments.squared_norms)[present]
    return (counts * scatter).sum() / (counts * (counts - 1) / 2).sum()


def class_variance_along(moments: ClassMoments) -> Tensor:
    """Variance of each class along the direction of its own mean: ``u_c^T Cov_c u_c``, ``u_c = m_c / |m_c|``.

    ``Cov_c = 1/n_c sum (e_i - m_c)(e_i - m_c)^T``.

    Args:
        moments: Class moments.

    Returns:
        ``(C,)``, >= 0 in squared units of the embeddings; ``nan`` for a class with fewer than two embeddings or a
        mean of zero.

    Raises:
        ValueError: If the moments are without ``second``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> class_variance_along(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2)).tolist()
        [1.0, nan]

    Source:
        Ours: spread along its own mean leaves a class orthogonal to others.
    """
    scale = moments.squared_norms / moments.counts
    return without_rounding(_variance_along(moments), scale).clamp(min=0)


def class_variance_across(moments: ClassMoments) -> Tensor:
    """Variance of each class per direction orthogonal to its own mean: ``(tr Cov_c - u_c^T Cov_c u_c) / (D - 1)``.

    Args:
        moments: Class moments.

    Returns:
        ``(C,)``, >= 0 in squared units of the embeddings; ``nan`` as for :func:`class_variance_along` and everywhere in
        one dimension.

    Raises:
        ValueError: If the moments are without ``second``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, -2.0]])
        >>> class_variance_across(class_moments(embeddings, torch.tensor([0, 0]), num_classes=1)).tolist()
        [2.0]

    Source:
        Ours: see :func:`class_variance_along`.
    """
    rest = class_variances(moments) - _variance_along(moments)
    rest = without_rounding(rest, moments.squared_norms / moments.counts).clamp(min=0)
    dim = moments.sums.shape[1]
    return rest / (dim - 1) if dim > 1 else torch.full_like(rest, float("nan"))


@geometry_metric(
    interval=">= 0, in squared units of the embeddings",
    better="neither",
    best="spread along its own mean does not make a class less orthogonal to others",
    undefined="classes without two embeddings, or a class of several whose mean is zero",
    needs_second=True,
)
def variance_along(moments: ClassMoments) -> Tensor:
    """Variance of a class along its own mean: ``mean_c u_c^T Cov_c u_c, u_c = m_c / |m_c|``.

    The mean of :func:`class_variance_along` over the classes of two embeddings or more.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> variance_along(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2)).item()
        1.0

    Source:
        Ours: see :func:`class_variance_along`.
    """
    return class_variance_along(moments)[moments.counts > 1].mean()


@geometry_metric(
    interval=">= 0, in squared units of the embeddings",
    better="lower",
    best="at equal rms_norm; 0: every class lies on a line through the origin",
    undefined="one dimension, classes without two embeddings, or a class of several whose mean is zero",
    needs_second=True,
)
def variance_across(moments: ClassMoments) -> Tensor:
    """Variance of a class per direction orthogonal to its own mean: ``mean_c (tr Cov_c - u_c^T Cov_c u_c) / (D - 1)``.

    The mean of :func:`class_variance_across` over the classes of two embeddings or more.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, -2.0]])
        >>> variance_across(class_moments(embeddings, torch.tensor([0, 0]), num_classes=1)).item()
        2.0

    Source:
        Ours: see :func:`class_variance_along`.
    """
    return class_variance_across(moments)[moments.counts > 1].mean()


def _variance_along(moments: ClassMoments) -> Tensor:
    """Variance of each class along its mean, ``(C,)``, with rounding errors."""
    means = torch.where(moments.counts.unsqueeze(1) > 1, moments.means, float("nan"))
    norms = means.norm(dim=1)
    unit = means / norms.unsqueeze(1)  # (C, D); nan where there is no direction
    projected = (moments.required_second("variance along a class mean") @ unit.unsqueeze(2)).squeeze(2)  # (C, D)
    return (projected * unit).sum(dim=1) / moments.counts - norms.square()
