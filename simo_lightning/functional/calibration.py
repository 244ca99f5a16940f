"""Does a confidence say how often the answer is right?"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

__all__ = ["Reliability", "reliability"]


class Reliability(NamedTuple):
    """Accuracy by confidence, in B bins of equal width.

    Attributes:
        edges: Of the bins, ``(B + 1,)``, from 0 to 1. A bin contains its lower edge; the last one contains 1 as well.
        counts: Answers in each bin, int64 ``(B,)``.
        confidence: Mean confidence in each bin, ``(B,)``; ``nan`` for an empty one.
        accuracy: Share of right answers in each bin, ``(B,)``; ``nan`` for an empty one.
        error: Expected calibration error, the mean over the answers of ``|accuracy - confidence|`` of their bin, in
            [0, 1]; ``nan`` without answers.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor
    error: Tensor


def reliability(confidence: Tensor, correct: Tensor, bins: int = 10) -> Reliability:
    """The numbers of a reliability diagram.

    Args:
        confidence: Of each answer, such as the largest share of an embedding, floats in [0, 1], ``(N,)``.
        correct: Whether the answer is right, bool ``(N,)``.
        bins: B.

    Returns:
        Counts, mean confidence and accuracy of each bin and the expected calibration error, float64 (float32 on MPS).

    Raises:
        ValueError: If a shape or type is wrong, a confidence is not in [0, 1], or bins is less than 1.

    Example:
        >>> confidence, correct = torch.tensor([0.2, 0.4, 0.9, 0.7]), torch.tensor([False, True, True, True])
        >>> result = reliability(confidence, correct, bins=2)
        >>> result.counts.tolist(), result.accuracy.tolist(), round(result.error.item(), 4)
        ([2, 2], [0.5, 1.0], 0.2)

    Source:
        The error: Naeini, Cooper & Hauskrecht, AAAI 2015, computed by torchmetrics' ``binary_calibration_error``; the
        diagram: Guo, Pleiss, Sun & Weinberger, ICML 2017 (arXiv 1706.04599).
    """
    _check(confidence, correct, bins)
    confidence = confidence.detach().to(torch.float32 if confidence.device.type == "mps" else torch.float64)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=bins - 1)
    counts = index.bincount(minlength=bins)
    sums = confidence.new_zeros(2, bins).index_add_(1, index, torch.stack((confidence, correct.to(confidence.dtype))))
    error = confidence.new_full((), torch.nan)
    if len(confidence):
        below_one = 1 - torch.finfo(confidence.dtype).eps  # torchmetrics would give 1 a bin of its own
        error = binary_calibration_error(confidence.clamp(max=below_one), correct.long(), n_bins=bins)
    return Reliability(edges, counts, sums[0] / counts, sums[1] / counts, error)


def _check(confidence: Tensor, correct: Tensor, bins: int) -> None:
    if confidence.ndim != 1 or not confidence.is_floating_point():
        raise ValueError(
            f"confidence must be floats of shape (N,), got {confidence.dtype} of shape {tuple(confidence.shape)}"
        )
    if correct.dtype != torch.bool or correct.shape != confidence.shape:
        raise ValueError(
            f"correct must be bool of shape {tuple(confidence.shape)}, got {correct.dtype} of shape "
            f"{tuple(correct.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    outside = ~((confidence >= 0) & (confidence <= 1))
    if outside.any():
        raise ValueError(
            f"confidence must be in [0, 1], got {int(outside.sum())} of {len(confidence)} values that are not, such as "
            f"{float(confidence[outside][0]):.4g}"
        )
