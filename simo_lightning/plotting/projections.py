"""From D dimensions to the plane: one set of embeddings, or the same ones along training."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from simo_lightning.extras import missing_extra
from simo_lightning.functional.moments import check_embeddings

Projection = Literal["pca", "tsne", "umap"]


def project_2d(embeddings: Tensor, method: Projection = "pca", seed: int = 0) -> Tensor:
    """Embeddings as points in the plane; those of two dimensions as they are.

    Args:
        embeddings: Float tensor ``(N, D)``.
        method: pca: the two directions of largest variance, each with its largest weight positive, so that the same
            data give the same picture; tsne: scikit-learn's, seconds for a few thousand points; umap: umap-learn's, of
            the extra ``umap``.
        seed: Of tsne and umap, whose distances between far points mean little.

    Returns:
        ``(N, 2)`` on the CPU, float32 or better.

    Raises:
        ValueError: If the embeddings are not ``(N, D)`` and finite, or the method is not one of the three.
        ImportError: If umap-learn is not installed; the text says how to.

    Example:
        >>> project_2d(torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).tolist()
        [[-2.0, 0.0], [2.0, 0.0]]

    Source:
        van der Maaten & Hinton, JMLR 9, 2008 (t-SNE); McInnes et al., arXiv 1802.03426 (UMAP).
    """
    if method not in ("pca", "tsne", "umap"):
        raise ValueError(f"method must be 'pca', 'tsne' or 'umap', got {method!r}")
    rows = _finite_rows(embeddings)
    if rows.shape[1] == 2 or len(rows) == 0:
        return rows[:, :2] if rows.shape[1] >= 2 else rows.new_zeros(0, 2)
    if method == "tsne":
        return _tsne(rows, seed)
    if method == "umap":
        return _umap(rows, seed)
    return (rows - rows.mean(dim=0)) @ _principal_plane(rows)


def project_frames(frames: Sequence[Tensor]) -> list[Tensor]:
    """The same embeddings along training as points in one plane: that of the last ones.

    The map is fitted once, by PCA on the last frame, and is the same for all: what moves in the picture moves in the
    embedding, and the last picture is :func:`project_2d`'s. Earlier frames may spread more in directions that it does
    not show.

    Args:
        frames: Float tensors ``(N, D)`` of the same shape, in the order of training, at least one.

    Returns:
        As many ``(N, 2)``; those of two dimensions as they are.

    Raises:
        ValueError: If there is none, or shapes differ, or a value is not finite.

    Example:
        >>> still = torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> [points.tolist() for points in project_frames([2 * still, still])]
        [[[-2.0, 0.0], [6.0, 0.0]], [[-2.0, 0.0], [2.0, 0.0]]]
    """
    shapes = sorted({tuple(frame.shape) for frame in frames})
    if len(shapes) != 1:
        raise ValueError(f"frames must be one or more tensors of the same shape (N, D), got shapes {shapes}")
    rows = [_finite_rows(frame) for frame in frames]
    last = rows[-1]
    if last.shape[1] == 2 or len(last) == 0:
        return [project_2d(frame) for frame in rows]
    center, plane = last.mean(dim=0), _principal_plane(last)
    return [(frame.to(last.dtype) - center) @ plane for frame in rows]


def project_wheel(embeddings: Tensor, means: Tensor) -> Tensor:
    """Embeddings on a wheel with a spoke per class, each pulled along every spoke by its cosine with that class's mean.

    ``sum_c cos(e, m_c) (sin a_c, cos a_c)`` with ``a_c = 2 pi c / C``, the first class on top, clockwise. Tight classes
    with orthogonal means sit at C places on the unit circle, whatever C; embeddings that all point one way sit in the
    middle. Unlike PCA, which shows two directions of C, it treats all classes alike, and it needs no fit: the same
    place means the same along training.

    Args:
        embeddings: Float tensor ``(N, D)``.
        means: Class means ``(C, D)``; a class without one, of ``nan``, does not pull.

    Returns:
        ``(N, 2)`` on the CPU, float32 or better; the middle for an embedding of zero.

    Raises:
        ValueError: If the embeddings are not ``(N, D)`` and finite, or the means are not ``(C, D)``.

    Example:
        >>> (project_wheel(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)).round() + 0).tolist()
        [[0.0, 1.0], [0.0, -1.0]]

    Source:
        Star coordinates (Kandogan, IEEE InfoVis 2000) of cosines; ours in this use.
    """
    rows = _finite_rows(embeddings)
    if means.ndim != 2 or means.shape[1] != rows.shape[1]:
        raise ValueError(f"means must have shape (C, {rows.shape[1]}) to match embeddings, got {tuple(means.shape)}")
    angles = torch.arange(len(means), dtype=torch.float64) * (2 * torch.pi / max(len(means), 1))
    spokes = torch.stack([angles.sin(), angles.cos()], dim=1).to(rows.dtype)  # (C, 2)
    unit = torch.nn.functional.normalize(means.detach().cpu().to(rows.dtype), dim=1).nan_to_num(0)
    return torch.nn.functional.normalize(rows, dim=1) @ unit.mT @ spokes


def _finite_rows(embeddings: Tensor) -> Tensor:
    """On the CPU in float32 or better (N, D)."""
    check_embeddings(embeddings, torch.zeros(len(embeddings), dtype=torch.long))
    rows = embeddings.detach().cpu()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not rows.isfinite().all():
        raise ValueError(f"embeddings must be finite, got nan or inf in {int((~rows.isfinite()).any(1).sum())} rows")
    return rows


def _principal_plane(rows: Tensor) -> Tensor:
    """Two directions of largest variance (D, 2), the largest weight of each positive; zeros for those that lack."""
    directions = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[:2]  # (2, D) or (1, D)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    plane = (directions * largest.sign()).mT
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))


def _tsne(rows: Tensor, seed: int) -> Tensor:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    return torch.from_numpy(TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(rows.numpy()))


def _umap(rows: Tensor, seed: int) -> Tensor:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(missing_extra(str(error)) or str(error)) from error
    if len(rows) < 4:  # its spectral start needs more rows than it finds directions
        return project_2d(rows)
    # one thread: only then a seed decides the result
    umap = UMAP(n_neighbors=min(15, len(rows) - 1), random_state=seed, n_jobs=1)
    return torch.from_numpy(umap.fit_transform(rows.numpy()))
