"""Class means as classifiers: against a head's weight, and on their own."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simo_lightning.functional.geometry.rounding import centered_means, present_means, undefined
from simo_lightning.functional.moments import ClassMoments, check_embeddings

__all__ = ["nc3", "nearest_class_mean_predict"]

# Embeddings whose distances to all C class means are computed at a time.
_CHUNK = 8192


def nc3(moments: ClassMoments, weight: Tensor) -> Tensor:
    """Self-duality of a linear head and the class means: ``| W / |W|_F - M / |M|_F |_F^2``.

    ``M (P, D)`` are the centred class means ``m_c - m``, ``m`` the mean of the class means.

    Args:
        moments: Class moments of the inputs of the head.
        weight: Weight of the head, ``(C, D)``; rows of classes without embeddings do not count.

    Returns:
        Scalar in [0, 4], lower is better (0: the head's rows are the centred class means up to one factor; 4: up to a
        negative one); ``nan`` with fewer than two classes, or where all class means coincide or the weight is zero.

    Raises:
        ValueError: If the weight is not ``(C, D)``.

    Example:
        >>> from simo_lightning.functional.moments import class_moments
        >>> moments = class_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 1]), num_classes=2)
        >>> nc3(moments, torch.tensor([[-7.0, 0.0], [7.0, 0.0]])).item() < 1e-12
        True

    Source:
        Papyan, Han & Donoho, PNAS 2020 (arXiv 2008.08186), NC3. As there, the weight is not centred: a vector
        added to all its rows changes no prediction but changes this value.
    """
    if weight.shape != moments.sums.shape:
        raise ValueError(
            f"weight must have shape {tuple(moments.sums.shape)}, the moments' (C, D), got {tuple(weight.shape)}"
        )
    means = present_means(moments)
    if len(means) < 2:
        return undefined(moments)
    centered = centered_means(means, means.mean(dim=0))
    rows = weight.detach().to(means)[moments.counts > 0]
    return (rows / rows.norm() - centered / centered.norm()).square().sum()


def nearest_class_mean_predict(
    embeddings: Tensor, means: Tensor, distance: Literal["euclidean", "cosine"] = "euclidean"
) -> Tensor:
    """Class whose mean is nearest to each embedding.

    Args:
        embeddings: Float tensor ``(N, D)``.
        means: ``(C, D)``, usually of the training images; a class whose row is ``nan`` is never predicted.
        distance: "euclidean": the smallest ``|e - m_c|``; "cosine": the largest ``cos(e, m_c)``, where an embedding of
            zeros has cosine 0 with everything.

    Returns:
        Classes ``(N,)``, int64; of classes equally near the lowest. Computed in the wider of the two dtypes, at least
        in float32.

    Raises:
        ValueError: If a type or shape is wrong, the distance is unknown, an embedding is not finite, or no class has a
            finite mean.

    Example:
        >>> means = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
        >>> nearest_class_mean_predict(torch.tensor([[0.0, 2.0]]), means)
        tensor([0])
        >>> nearest_class_mean_predict(means, means, "cosine")
        tensor([0, 1])

    Source:
        Mensink et al., IEEE TPAMI 35(11), 2013; with the Euclidean distance NC4's nearest class centre (Papyan, Han &
        Donoho, PNAS 2020, arXiv 2008.08186).
    """
    _check_nearest(embeddings, means, distance)
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, means.dtype), torch.float32)
    known = means.isfinite().all(dim=1).nonzero().squeeze(1)  # (K,)
    centers = means[known].to(dtype)
    if distance == "cosine":
        centers = normalize(centers, dim=1)
    nearest = [_nearest(chunk.to(dtype), centers, distance) for chunk in embeddings.split(_CHUNK)]
    return known[torch.cat(nearest)]


def _nearest(embeddings: Tensor, centers: Tensor, distance: str) -> Tensor:
    """Index (n,) of the centre (K, D) nearest to each embedding (n, D); for the cosine, centres have length 1."""
    if distance == "cosine":
        return (embeddings @ centers.mT).argmax(dim=1)  # the embedding's own length does not matter
    return torch.cdist(embeddings, centers, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _check_nearest(embeddings: Tensor, means: Tensor, distance: str) -> None:
    check_embeddings(embeddings)
    check_embeddings(means, name="means")
    if embeddings.shape[1] != means.shape[1]:
        raise ValueError(
            f"embeddings and means must have shapes (N, D) and (C, D), "
            f"got {tuple(embeddings.shape)} and {tuple(means.shape)}"
        )
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f'distance must be "euclidean" or "cosine", got {distance!r}')
    invalid = int((~embeddings.isfinite()).any(dim=1).sum())
    if invalid:
        raise ValueError(f"embeddings must be finite, got nan or inf in {invalid} of {len(embeddings)} embeddings")
    if not means.isfinite().all(dim=1).any():
        raise ValueError(f"means must have a finite row, got none in {len(means)}")
