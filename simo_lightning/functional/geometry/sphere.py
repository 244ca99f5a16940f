"""How evenly embeddings cover the sphere: a mean over all pairs, so not a function of the class moments."""

import math

import torch
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.neighbors import unit_vectors

__all__ = ["uniformity"]

# Embeddings whose distances to all others are computed at a time.
_CHUNK = 1024


def uniformity(embeddings: Tensor, t: float = 2.0, counts: Tensor | None = None) -> Tensor:
    """Logarithm of the mean Gaussian potential of two embeddings: ``log mean_{i<j} exp(-t |x_i - x_j|^2)``.

    ``x_i = e_i / |e_i|``; an embedding of zeros stays at the origin. Time is O(N^2 D), memory O(N).

    Args:
        embeddings: Float tensor ``(N, D)``; normalised here.
        t: Sharpness of the potential, > 0.
        counts: How often each embedding occurs, ``(N,)``, positive; by default once.

    Returns:
        Scalar in [-4 t, 0], lower is better (0: all in one direction), float64 (float32 on MPS); ``nan`` with fewer
        than two embeddings or where one is not finite.

    Raises:
        ValueError: If the embeddings are not floats ``(N, D)``, the counts not ``(N,)``, or t is not positive.

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item(), 6)  # |x_1 - x_2|^2 = 2
        -4.0

    Source:
        Wang & Isola, arXiv 2005.10242, uniformity with t = 2; their features are normalised already.
    """
    check_embeddings(embeddings)
    if counts is not None and counts.shape != embeddings.shape[:1]:
        raise ValueError(
            f"counts must have shape ({len(embeddings)},), one for each embedding, got {tuple(counts.shape)}"
        )
    if not t > 0:
        raise ValueError(f"t must be positive, got {t}")
    embeddings = embeddings.to(torch.float32 if embeddings.device.type == "mps" else torch.float64)
    weights = torch.ones_like(embeddings[:, 0]) if counts is None else counts.to(embeddings)
    total = weights.sum()
    if not total > 1 or not embeddings.isfinite().all():
        return embeddings.new_tensor(math.nan)
    unit = unit_vectors(embeddings)
    chunks = range(0, len(unit), _CHUNK)
    potentials = torch.stack([_log_potential(unit, weights, start, t) for start in chunks])
    return (torch.logsumexp(potentials, dim=0) - torch.log(total * (total - 1))).clamp(max=0)


def _log_potential(unit: Tensor, weights: Tensor, start: int, t: float) -> Tensor:
    """Log of the summed potential of the ordered pairs of a chunk's embeddings with all others, copies included."""
    chunk = unit[start : start + _CHUNK]  # (n, D)
    squares = unit.square().sum(dim=1)  # 1, or 0 for embeddings of zeros
    own = torch.arange(start, start + len(chunk), device=unit.device)
    distances = (squares[own].unsqueeze(1) + squares - 2 * chunk @ unit.mT).clamp(min=0)  # (n, N)
    logits = weights[own].log().unsqueeze(1) + weights.log() - t * distances
    logits[own - start, own] = torch.log(weights[own] * (weights[own] - 1))
    return logits.flatten().logsumexp(dim=0)
