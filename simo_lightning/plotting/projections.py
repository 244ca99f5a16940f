"""From D dimensions to the plane: one set of embeddings, or the same images along training."""

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
    """Embeddings as points in the plane; those of two dimensions are returned as they are.

    Args:
        embeddings: Float tensor ``(N, D)``.
        method: pca: the two directions of largest variance (of 20,000 embeddings if there are more), each with
            its largest weight positive, so that the same data give the same picture; tsne: scikit-learn's, seconds for
            a few thousand points; umap: umap-learn's, of the extra ``umap``.
        seed: Of tsne and umap, whose distances between far points mean little.

    Returns:
        ``(N, 2)`` on the CPU, float32 or better.

    Raises:
        ValueError: If the embeddings are not ``(N, D)`` and finite, or the method is not one of the three.
        ImportError: If umap-learn is not installed; the text says how to install it.

    Example:
        >>> project_2d(torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).tolist()
        [[-2.0, 0.0], [2.0, 0.0]]

    Source:
        van der Maaten & Hinton, JMLR 9, 2008 (t-SNE); McInnes et al., arXiv 1802.03426 (UMAP).
    """
    if method not in ("pca", "tsne", "umap"):
        raise ValueError(f"method must be 'pca', 'tsne' or 'umap', got {method!r}")
    rows = _finite_rows(embeddings)
    if method == "pca" or rows.shape[1] == 2 or len(rows) == 0:
        return project_sequence([rows])[0]
    if method == "tsne":
        from sklearn.manifold import TSNE  # half a second that most users of this module do not need

        perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
        tsne = TSNE(perplexity=perplexity, init="random", random_state=seed)
        return torch.from_numpy(tsne.fit_transform(rows.numpy()))
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(missing_extra(str(error)) or str(error)) from error
    if len(rows) < 4:  # its spectral start needs more rows than it finds directions
        return project_2d(rows)
    # one thread: only then the result is a function of the seed
    umap = UMAP(n_neighbors=min(15, len(rows) - 1), random_state=seed, n_jobs=1)
    return torch.from_numpy(umap.fit_transform(rows.numpy()))


def project_sequence(sequence: Sequence[Tensor]) -> list[Tensor]:
    """The same images along training as points in one plane, the PCA plane of the last embeddings.

    One map, fitted on the last embeddings, serves for all: what moves in the picture moves in the embedding, and the
    last picture is that of :func:`project_2d`. Earlier embeddings may spread more in directions that it does not show.

    Args:
        sequence: Float tensors ``(N, D)`` of the same shape, in the order of training, at least one.

    Returns:
        As many ``(N, 2)``; those of two dimensions as they are.

    Raises:
        ValueError: If there is none, or shapes differ, or a value is not finite.

    Example:
        >>> still = torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> [points.tolist() for points in project_sequence([2 * still, still])]
        [[[-2.0, 0.0], [6.0, 0.0]], [[-2.0, 0.0], [2.0, 0.0]]]
    """
    rows = [_finite_rows(embeddings) for embeddings in sequence]
    shapes = sorted({tuple(embeddings.shape) for embeddings in rows})
    if len(shapes) != 1:
        raise ValueError(f"sequence must hold one or more tensors of the same shape (N, D), got shapes {shapes}")
    last = rows[-1]
    if last.shape[1] == 2:
        return rows
    if last.numel() == 0:
        return [last.new_zeros(len(last), 2)] * len(rows)
    center, plane = last.mean(dim=0), _principal_plane(last).to(last.dtype)
    return [(embeddings.to(last.dtype) - center) @ plane for embeddings in rows]


def star_coordinates(embeddings: Tensor, means: Tensor) -> Tensor:
    """Embeddings in star coordinates: each class has an axis, and a point is the sum of its cosines along all axes.

    ``sum_c cos(e, m_c) (sin a_c, cos a_c)`` with ``a_c = 2 pi c / C``, the first class on top, clockwise. Tight classes
    with orthogonal means lie at C places on the unit circle, whatever C; embeddings that all have one direction lie at
    the origin. Unlike PCA, which shows two directions of C, the map treats all classes alike and is not fitted: a place
    means the same all along training.

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
        Kandogan, "Star coordinates", IEEE InfoVis 2000; cosines with class means in place of features are ours.
    """
    rows, means = _finite_rows(embeddings), on_cpu("means", means)
    if means.ndim != 2 or means.shape[1] != rows.shape[1]:
        raise ValueError(f"means must have shape (C, {rows.shape[1]}) to match embeddings, got {tuple(means.shape)}")
    angles = torch.arange(len(means), dtype=torch.float64) * (2 * torch.pi / max(len(means), 1))
    axes = torch.stack([angles.sin(), angles.cos()], dim=1).to(rows.dtype)  # (C, 2)
    directions = normalize(means.to(rows.dtype), dim=1).nan_to_num(0)  # (C, D)
    return normalize(rows, dim=1) @ (directions.mT @ axes)  # (N, D) @ (D, 2)


def _finite_rows(embeddings: Tensor) -> Tensor:
    """On the CPU in float32 or better (N, D)."""
    rows = on_cpu("embeddings", embeddings)
    check_embeddings(rows, torch.zeros(rows.shape[:1], dtype=torch.long))
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not rows.isfinite().all():
        raise ValueError(f"embeddings must be finite, got nan or inf in {int((~rows.isfinite()).any(1).sum())} rows")
    return rows


def _principal_plane(rows: Tensor) -> Tensor:
    """Two directions of largest variance (D, 2), the largest weight of each positive; zeros where there is none."""
    from sklearn.utils.extmath import randomized_svd

    rows = rows[subset(len(rows))].double()
    centered = (rows - rows.mean(dim=0)).numpy()
    # exact up to 32 dimensions; above, the variance shown is within a thousandth of the largest
    found = randomized_svd(centered, min(2, *rows.shape), n_oversamples=30, n_iter=10, random_state=0)[2]
    directions = torch.from_numpy(found)  # float64 (2, D) or (1, D)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return pad((directions * largest.sign()).mT, (0, 2 - len(directions)))
