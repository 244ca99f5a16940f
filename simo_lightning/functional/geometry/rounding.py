"""Rounding: a difference that the rounding of the sums alone explains counts as zero."""

import torch
from torch import Tensor

from simo_lightning.functional.moments import ClassMoments

# Sums over many batches lose a few bits: values below this many units of rounding are set to zero.
ROUNDING_UNITS = 1024


def undefined(moments: ClassMoments) -> Tensor:
    """Scalar ``nan`` in the dtype and on the device of the moments."""
    return moments.sums.new_tensor(float("nan"))


def without_rounding(values: Tensor, scale: Tensor) -> Tensor:
    """The values with those below rounding at this scale set to 0; the two broadcast."""
    threshold = ROUNDING_UNITS * torch.finfo(values.dtype).eps * scale
    return torch.where(values.abs() <= threshold, torch.zeros_like(values), values)


def present_means(moments: ClassMoments) -> Tensor:
    """Means of the P classes that have embeddings, ``(P, D)``."""
    return moments.means[moments.counts > 0]


def centered_means(means: Tensor, center: Tensor) -> Tensor:
    """Means minus their centre, ``(P, D)``; means that differ from it by rounding alone are 0."""
    centered = means - center
    norms = without_rounding(centered.norm(dim=1, keepdim=True), means.norm(dim=1).max())
    return torch.where(norms > 0, centered, torch.zeros_like(centered))


def class_variances(moments: ClassMoments) -> Tensor:
    """Mean squared distance to the class mean, ``(C,)``; ``nan`` for empty classes, 0 where rounding explains it."""
    return without_rounding(moments.scatter, moments.squared_norms) / moments.counts
