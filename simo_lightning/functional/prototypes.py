"""Class prototypes: a fixed unit vector for every label, which does not depend on data."""

import torch
from torch import Tensor

# Odd constants of the finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), as signed 64-bit integers.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def class_prototypes(labels: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit vectors, one for each label, the same in every process and run.

    Labels ``0..D - 1`` have the coordinate axes, which are orthogonal. Any other label has a vector of signs
    ``+-1 / sqrt(D)`` that is a hash of it, with cosines of about ``1 / sqrt(D)`` to all others.

    Args:
        labels: Integers ``(C,)``, any values.
        dim: D.
        dtype: Of the result.

    Returns:
        ``(C, D)`` of length 1.

    Example:
        >>> class_prototypes(torch.tensor([0, 2, 7]), dim=4)
        tensor([[ 1.0000,  0.0000,  0.0000,  0.0000],
                [ 0.0000,  0.0000,  1.0000,  0.0000],
                [ 0.5000,  0.5000, -0.5000, -0.5000]])

    Source:
        Ours. Classifiers with fixed orthogonal or simplex weights: Pernici et al., arXiv 2103.15632; Yang et al.,
        arXiv 2203.09081. More classes than dimensions: near-orthogonal by Johnson & Lindenstrauss, as the paper says.
    """
    labels = labels.long().unsqueeze(1)
    columns = torch.arange(dim, device=labels.device)
    axes = (labels == columns).to(dtype)  # (C, D), a row of zeros where the label has no axis
    if int(axes.sum()) == len(labels):
        return axes
    mixed = (labels * dim + columns + 1) * _STEP  # (C, D), wrapping around as a hash should
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    signs = 1 - 2 * (_shifted(mixed, 31) ^ mixed).bitwise_and(1)
    return torch.where(axes.any(dim=1, keepdim=True), axes, signs.to(dtype) / dim**0.5)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Bits moved right with zeros coming in; torch's own shift of int64 repeats the sign."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
