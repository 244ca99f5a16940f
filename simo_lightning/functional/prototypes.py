"""Class prototypes: a fixed unit vector for every label, independent of the data."""

import torch
from torch import Tensor

from simo_lightning.functional.hashing import GOLDEN, splitmix64


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
    signs = 1 - 2 * splitmix64((labels * dim + columns + 1) * GOLDEN).bitwise_and(1)  # (C, D)
    return torch.where(axes.any(dim=1, keepdim=True), axes, signs.to(dtype) / dim**0.5)
