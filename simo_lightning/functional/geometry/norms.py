"""Norms of the embeddings: root mean square and spread of the squares, which the class moments give exactly."""

import torch
from torch import Tensor

from simo_lightning.functional.geometry.declaration import geometry_metric
from simo_lightning.functional.geometry.rounding import without_rounding
from simo_lightning.functional.moments import ClassMoments

__all__ = ["class_norm_spread", "class_rms_norm", "norm_spread", "rms_norm"]


@geometry_metric(
    interval=">= 0, in units of the embeddings",
    better="neither",
    best="the scale of the other metrics",
    undefined="no embeddings",
    class_name="RMSNorm",
)
def rms_norm(moments: ClassMoments) -> Tensor:
    """Root mean square norm of the embeddings: ``sqrt(mean_i |e_i|^2)``.

    It reveals embeddings that vanish or explode. The labels do not matter.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> rms_norm(class_moments(torch.tensor([[3.0, 4.0]]), torch.tensor([0]), num_classes=1)).item()
        5.0

    Source:
        Ours.
    """
    return (moments.squared_norms.sum() / moments.counts.sum()).sqrt()


@geometry_metric(
    interval=">= 0",
    better="neither",
    best="0: all embeddings lie on a sphere around the origin",
    undefined="no embeddings, or embeddings that are all zero",
)
def norm_spread(moments: ClassMoments) -> Tensor:
    """Coefficient of variation of the squared norms: ``std_i |e_i|^2 / mean_i |e_i|^2``.

    Small values are twice the coefficient of variation of the norms themselves. The labels do not matter.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> round(norm_spread(class_moments(embeddings, torch.tensor([0, 0]), num_classes=1)).item(), 6)
        0.8

    Source:
        Ours; of squared norms because their first two moments are in the class moments.
    """
    return _variation(moments.fourth.sum(), moments.squared_norms.sum(), moments.counts.sum())


def class_rms_norm(moments: ClassMoments) -> Tensor:
    """Root mean square norm of each class: ``sqrt(mean_{i in c} |e_i|^2)``.

    Args:
        moments: Class moments.

    Returns:
        ``(C,)``, >= 0 in units of the embeddings; ``nan`` for classes without embeddings.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> class_rms_norm(class_moments(embeddings, torch.tensor([0, 2]), num_classes=3)).tolist()
        [5.0, nan, 2.0]

    Source:
        Ours.
    """
    return (moments.squared_norms / moments.counts).sqrt()


def class_norm_spread(moments: ClassMoments) -> Tensor:
    """Coefficient of variation of the squared norms of each class, as :func:`norm_spread`.

    Args:
        moments: Class moments.

    Returns:
        ``(C,)``, >= 0; ``nan`` for classes without embeddings or whose embeddings are all zero.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> embeddings = torch.tensor([[1.0], [3.0], [5.0]])
        >>> spread = class_norm_spread(class_moments(embeddings, torch.tensor([0, 0, 1]), num_classes=2))
        >>> [round(value, 6) for value in spread.tolist()]
        [0.8, 0.0]

    Source:
        Ours.
    """
    return _variation(moments.fourth, moments.squared_norms, moments.counts)


def _variation(fourth: Tensor, squares: Tensor, counts: Tensor) -> Tensor:
    """Coefficient of variation of the squared norms, from the sum of their squares, their sum and their count."""
    ratio = fourth * counts / squares.square()  # mean |e|^4 over (mean |e|^2)^2, >= 1
    return without_rounding(ratio - 1, torch.ones_like(ratio)).clamp(min=0).sqrt()
