"""Projections from D dimensions to the plane, of one set of embeddings or of a sequence of them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from simo_lightning.extras import missing_extra
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.plotting.canvas import on_cpu, subset

Projection = Literal["pca", "tsne", "umap"]


def project_2d(embeddings: Tensor, method: Projection = "pca", seed: int = 0) -> Tensor:
    """Project embeddings to the plane; two-dimensional ones are returned unchanged.

    Args:
        embeddings: Float tensor ``(N, D)``.
        method: pca: the two directions of largest variance (of 20,000 embeddings if there are more), each with
            its largest weight positive, so that the same data give the same picture; tsne: scikit-learn's, seconds for
            a few thousand points; umap: umap-learn's, of the extra ``umap``.
        seed: Seed of tsne and umap. Their distances between far points mean little.

    Returns:
        ``(N, 2)`` on the CPU, float32 or better.

    Raises:
        ValueError: If the embeddings are not ``(N, D)`` and finite, or the method is unknown.
        ImportError: If umap-learn is not installed; the message gives the command that installs it.

    Example:
        >>> project_2d(torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).tolist()
        [[-2.0, 0.0], [2.0, 0.0]]

    Source:
        van der Maaten & Hinton, JMLR 9, 2008 (t-SNE); McInnes et al., arXiv 1802.03426 (UMAP).
    """
    if method not in ("pca", "tsne", "umap"):
        raise ValueError(f"method must be 'pca', 'tsne' or 'umap', got {method!r}")
    embeddings = _finite(embeddings)
    if method == "pca" or embeddings.shape[1] == 2 or len(embeddings) == 0:
        return project_sequence([embeddings])[0]
    if method == "tsne":
        from sklearn.manifold import TSNE  # half a second that most users of this module do not need

        perplexity = min(30.0, max(1.0, (len(embeddings) - 1) / 3))
        tsne = TSNE(perplexity=perplexity, init="random", random_state=seed)
        return torch.from_numpy(tsne.fit_transform(embeddings.numpy()))
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(missing_extra(str(error)) or str(error)) from error
    if len(embeddings) < 4:  # its spectral start needs more embeddings than directions
        return project_2d(embeddings)
    # with more than one thread the result is not reproducible
    umap = UMAP(n_neighbors=min(15, len(embeddings) - 1), random_state=seed, n_jobs=1)
    return torch.from_numpy(umap.fit_transform(embeddings.numpy()))


def project_sequence(sequence: Sequence[Tensor]) -> list[Tensor]:
    """Project embeddings of the same images during training to one plane, the PCA plane of the last embeddings.

    One map, fitted on the last embeddings, is used for all, so that points move only if their embeddings do. The last
    result equals :func:`project_2d`. Earlier embeddings may vary more in directions that the plane does not show.

    Args:
        sequence: Float tensors ``(N, D)`` of the same shape, in the order of training, at least one.

    Returns:
        One ``(N, 2)`` per tensor; two-dimensional embeddings are returned unchanged.

    Raises:
        ValueError: If the sequence is empty, shapes differ, or a value is not finite.

    Example:
        >>> still = torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> [points.tolist() for points in project_sequence([2 * still, still])]
        [[[-2.0, 0.0], [6.0, 0.0]], [[-2.0, 0.0], [2.0, 0.0]]]
    """
    tensors = [_finite(embeddings) for embeddings in sequence]
    shapes = sorted({tuple(embeddings.shape) for embeddings in tensors})
    if len(shapes) != 1:
        raise ValueError(f"sequence must hold one or more tensors of the same shape (N, D), got shapes {shapes}")
    last = tensors[-1]
    if last.shape[1] == 2:
        return tensors
    if last.numel() == 0:
        return [last.new_zeros(len(last), 2)] * len(tensors)
    center, plane = last.mean(dim=0), _principal_plane(last).to(last.dtype)
    return [(embeddings.to(last.dtype) - center) @ plane for embeddings in tensors]


def star_coordinates(embeddings: Tensor, means: Tensor) -> Tensor:
    """Embeddings in star coordinates: each class has an axis, and a point is the sum of its cosines along all axes.

    ``sum_c cos(e, m_c) (sin a_c, cos a_c)`` with ``a_c = 2 pi c / C``, the first class on top, clockwise. Tight classes
    with orthogonal means lie at C equally spaced points of the unit circle for every C; embeddings that all have the
    same direction lie at the origin. Unlike PCA, which shows two directions, the map treats all classes equally. It is
    not fitted: a position has the same meaning throughout training.

    Args:
        embeddings: Float tensor ``(N, D)``.
        means: Class means ``(C, D)``; a class of ``nan`` mean has no influence.

    Returns:
        ``(N, 2)`` on the CPU, float32 or better; the origin for an embedding of zero.

    Raises:
        ValueError: If the embeddings are not ``(N, D)`` and finite, or the means are not ``(C, D)``.

    Example:
        >>> (star_coordinates(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)).round() + 0).tolist()
        [[0.0, 1.0], [0.0, -1.0]]

    Source:
        Kandogan, "Star coordinates", IEEE InfoVis 2000; cosines with class means instead of features are ours.
    """
    embeddings, means = _finite(embeddings), on_cpu("means", means)
    if means.ndim != 2 or means.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"means must have shape (C, {embeddings.shape[1]}) to match embeddings, got {tuple(means.shape)}"
        )
    angles = torch.arange(len(means), dtype=torch.float64) * (2 * torch.pi / max(len(means), 1))
    axes = torch.stack([angles.sin(), angles.cos()], dim=1).to(embeddings.dtype)  # (C, 2)
    directions = normalize(means.to(embeddings.dtype), dim=1).nan_to_num(0)  # (C, D)
    return normalize(embeddings, dim=1) @ (directions.mT @ axes)  # (N, D) @ (D, 2)


def _finite(embeddings: Tensor) -> Tensor:
    """Embeddings (N, D) on the CPU in float32 or better; ValueError unless finite."""
    embeddings = on_cpu("embeddings", embeddings)
    check_embeddings(embeddings, torch.zeros(embeddings.shape[:1], dtype=torch.long))
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    if not embeddings.isfinite().all():
        raise ValueError(
            f"embeddings must be finite, got nan or inf in {int((~embeddings.isfinite()).any(1).sum())} rows"
        )
    return embeddings


def _principal_plane(embeddings: Tensor) -> Tensor:
    """Two directions of largest variance (D, 2), the largest weight of each positive, padded with zeros."""
    from sklearn.utils.extmath import randomized_svd

    embeddings = embeddings[subset(len(embeddings))].double()
    centered = (embeddings - embeddings.mean(dim=0)).numpy()
    # exact up to 32 dimensions; above, the variance shown is within a thousandth of the largest
    found = randomized_svd(centered, min(2, *embeddings.shape), n_oversamples=30, n_iter=10, random_state=0)[2]
    directions = torch.from_numpy(found)  # float64 (2, D) or (1, D)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return pad((directions * largest.sign()).mT, (0, 2 - len(directions)))
