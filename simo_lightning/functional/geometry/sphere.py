"""How evenly embeddings cover the sphere: a mean over all pairs, so not a function of the class moments."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["uniformity"]

# Rows whose distances to all others are held at once.
_CHUNK = 1024


def uniformity(embeddings: Tensor, t: float = 2.0, counts: Tensor | None = None) -> Tensor:
    """Logarithm of the mean Gaussian potential of two embeddings: ``log mean_{i<j} exp(-t |x_i - x_j|^2)``.

    ``x_i = e_i / |e_i|``; an embedding of zeros stays at the origin. Time is O(N^2 D), memory O(N).

    Args:
        embeddings: Float tensor ``(N, D)``; normalised here.
        t: Sharpness of the potential, > 0.
        counts: How often each row occurs, ``(N,)``, positive; by default once.

    Returns:
        Scalar in [-4 t, 0], lower is better (0: all in one direction), float64 (float32 on MPS); ``nan`` with fewer
        than two embeddings or where one is not finite.

    Raises:
        ValueError: If the shapes are not ``(N, D)`` and ``(N,)`` or t is not positive.

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item(), 6)  # |x_1 - x_2|^2 = 2
        -4.0

    Source:
        Wang & Isola, arXiv 2005.10242, uniformity with t = 2; their features are normalised already.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have shape (N, D), got {tuple(embeddings.shape)}")
    if counts is not None and counts.shape != embeddings.shape[:1]:
        raise ValueError(f"counts must have shape ({len(embeddings)},), one a row, got {tuple(counts.shape)}")
    if not t > 0:
        raise ValueError(f"t must be positive, got {t}")
    rows = embeddings.to(torch.float32 if embeddings.device.type == "mps" else torch.float64)
    weights = torch.ones_like(rows[:, 0]) if counts is None else counts.to(rows)
    total = weights.sum()
    if not total > 1 or not rows.isfinite().all():
        return rows.new_tensor(math.nan)
    largest = rows.abs().amax(dim=1, keepdim=True)  # first, so that no square overflows or vanishes
    unit = normalize(rows / torch.where(largest > 0, largest, 1), dim=1)
    chunks = range(0, len(unit), _CHUNK)
    potentials = torch.stack([_log_potential(unit, weights, start, t) for start in chunks])
    return (torch.logsumexp(potentials, dim=0) - torch.log(total * (total - 1))).clamp(max=0)


def _log_potential(unit: Tensor, weights: Tensor, start: int, t: float) -> Tensor:
    """Log of the summed potential of a chunk of rows with all others, ordered pairs; of itself with its copies."""
    chunk = unit[start : start + _CHUNK]  # (n, D)
    squares = unit.square().sum(dim=1)  # 1, or 0 for embeddings of zeros
    own = torch.arange(start, start + len(chunk), device=unit.device)
    distances = (squares[own].unsqueeze(1) + squares - 2 * chunk @ unit.mT).clamp(min=0)  # (n, N)
    logits = weights[own].log().unsqueeze(1) + weights.log() - t * distances
    logits[own - start, own] = torch.log(weights[own] * (weights[own] - 1))
    return logits.flatten().logsumexp(dim=0)
