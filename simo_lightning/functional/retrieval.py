"""Retrieval by cosine similarity: recall at k, R-precision and MAP@R, in one search with bounded memory.

Shapes: M queries, N gallery images, D dimensions, C classes. A gallery image is relevant if it has the query's class. R
is the number of relevant images of a query. In leave-one-out every image is a query and all others are its gallery. A
query without a relevant image, such as the only image of its class, has no value and does not count.

Ties. Similarities are computed in float64 and rounded to multiples of 2**-22 (2.4e-7). Of equally similar images the
irrelevant ones come first, so embeddings that are all the same score 0, and the result depends neither on the order of
the gallery, nor on chunks, nor on the number of processes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from simo_lightning.functional.knn import check_finite, check_pair, unit_vectors
from simo_lightning.functional.moments import check_embeddings, class_sums, compact_labels

__all__ = ["RetrievalScores", "average_scores", "map_at_r", "r_precision", "recall_at_k", "retrieval_scores"]

Average = Literal["micro", "macro", "none"]

# Similarities are multiples of 1 / _GRID. A sort key 2 * _GRID * similarity + (0 or 1) is an exact integer in float32.
_GRID = 2.0**22


class RetrievalScores(NamedTuple):
    """Scores of each query; ``nan`` where a query has no relevant image.

    Attributes:
        recall: 1 if one of the k nearest images is relevant, else 0, for each k, ``(M, number of ks)``.
        r_precision: Share of the R nearest images that is relevant, ``(M,)``.
        average_precision: Average precision at R, ``(M,)``; its mean is MAP@R.
        relevant: R, int64 ``(M,)``.
    """

    recall: Tensor
    r_precision: Tensor
    average_precision: Tensor
    relevant: Tensor


@torch.no_grad()
def retrieval_scores(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    self_index: Tensor | None = None,
    chunk_size: int = 2048,
) -> RetrievalScores:
    """Recall at several k, R-precision and average precision of each query, from one search.

    With ``rel_i`` 1 if the i-th nearest image is relevant, else 0, and ``P_i`` the share of relevant images among the
    i nearest: ``R-precision = P_R`` and ``AP@R = (1 / R) sum_{i <= R} P_i rel_i``.

    Time is ``O(M N D)``. Memory is ``O(chunk_size * (R + chunk_size))`` in addition to the inputs in float64.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        ks: Values of k, each at least 1. A k above the gallery's size stands for the whole gallery.
        self_index: Position of each query itself in the gallery, where it is left out, ``(M,)``; -1: it is not in the
            gallery. None: no query is in the gallery.
        chunk_size: Queries, and images of the gallery, compared at a time; does not change the result.

    Returns:
        Scores of each query, float32.

    Raises:
        ValueError: If a type, shape, k or position is wrong, only one of ``gallery`` and ``gallery_labels`` is given,
            or a value is not finite.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
        >>> scores = retrieval_scores(embeddings, torch.tensor([0, 1, 0, 1]), ks=(1, 2))
        >>> scores.recall.tolist()
        [[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
        >>> scores.relevant.tolist()
        [1, 1, 1, 1]

    Source:
        R-precision and MAP@R: Musgrave, Belongie & Lim, "A Metric Learning Reality Check", arXiv 2003.08505, section
        3.2. Recall@k: Jegou, Douze & Schmid, IEEE TPAMI 33(1), 2011, as used since Oh Song et al., arXiv 1511.06452.
        On embeddings of length 1 the values are those of pytorch-metric-learning's AccuracyCalculator, whose Euclidean
        distances give the same order.
    """
    if gallery is None and gallery_labels is None and self_index is None:
        gallery, gallery_labels = embeddings, labels
        self_index = torch.arange(len(embeddings), device=embeddings.device)
    if gallery is None or gallery_labels is None:
        raise ValueError("gallery and gallery_labels must be given both or neither, got one")
    _check(embeddings, labels, gallery, gallery_labels, ks, chunk_size)
    own = _check_self_index(self_index, labels, gallery_labels)
    relevant = _count_relevant(labels, gallery_labels, own)
    dtype = torch.float32 if embeddings.device.type == "mps" else torch.float64  # MPS has no float64
    columns = unit_vectors(gallery.to(dtype)).mT  # (D, N)
    scores = embeddings.new_full((len(embeddings), len(ks) + 2), float("nan"), dtype=torch.float32)
    # queries with a similar R together, so that a chunk keeps only as many neighbours as its own queries need
    order = relevant.argsort(stable=True)
    order = order[relevant[order] > 0]
    for chunk in order.split(chunk_size) if len(order) else ():
        count = relevant[chunk]
        kept = min(max(int(count.max()), *ks), len(gallery))
        queries = unit_vectors(embeddings[chunk].to(dtype)), labels[chunk], own[chunk]
        hits = _hits(queries, columns, gallery_labels, kept, chunk_size)
        scores[chunk] = _scores(hits, count, ks).float()
    return RetrievalScores(scores[:, :-2], scores[:, -2], scores[:, -1], relevant)


def _hits(
    queries: tuple[Tensor, Tensor, Tensor], columns: Tensor, gallery_labels: Tensor, kept: int, chunk_size: int
) -> Tensor:
    """Whether each of the nearest images, nearest first, is relevant, (m, kept) bool; False where there is none."""
    embeddings, labels, own = queries
    rows = torch.arange(len(labels), device=labels.device)
    best = columns.new_empty(len(labels), 0, dtype=torch.float32)
    step = max(chunk_size, kept)  # as wide as the neighbours that are kept, so that these are not sorted too often
    for start in range(0, columns.shape[1], step):
        similarity = embeddings @ columns[:, start : start + step]  # (m, g)
        irrelevant = labels.unsqueeze(1) != gallery_labels[start : start + step]
        keys = similarity.mul_(_GRID).round_().float().mul_(2).add_(irrelevant)
        inside = (own >= start) & (own < start + keys.shape[1])
        keys[rows[inside], own[inside] - start] = float("-inf")
        best = torch.cat((best, keys), dim=1)
        best = best.topk(min(kept, best.shape[1]), dim=1).values
    return best.remainder(2) == 0  # -inf gives nan


def _scores(hits: Tensor, relevant: Tensor, ks: Sequence[int]) -> Tensor:
    """Recall at each k, R-precision and average precision, (m, number of ks + 2)."""
    dtype = torch.float32 if hits.device.type == "mps" else torch.float64
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)  # (K,)
    found = hits & (rank <= relevant.unsqueeze(1))
    precision = found.cumsum(dim=1).to(dtype) / rank
    columns = [hits[:, :k].any(dim=1).to(dtype) for k in ks]
    columns += [found.sum(dim=1) / relevant.to(dtype), (precision * found).sum(dim=1) / relevant]
    return torch.stack(columns, dim=1)


def _count_relevant(labels: Tensor, gallery_labels: Tensor, own: Tensor) -> Tensor:
    """R of each query, (M,)."""
    index, counts = compact_labels(torch.cat((labels, gallery_labels)))
    per_class = torch.bincount(index[len(labels) :], minlength=len(counts))
    return per_class[index[: len(labels)]] - (own >= 0).long()


def _check(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int],
    chunk_size: int,
) -> None:
    check_embeddings(embeddings, labels)
    check_embeddings(gallery, gallery_labels, "gallery", "gallery_labels")
    check_pair(embeddings, gallery, "embeddings", "gallery")
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {list(ks) if len(ks) != 1 else ks[0]}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check_finite(embeddings, "embeddings")
    check_finite(gallery, "gallery")


def _check_self_index(self_index: Tensor | None, labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """The positions (M,), -1 where a query is not in the gallery."""
    if self_index is None:
        return labels.new_full(labels.shape, -1, dtype=torch.long)
    if self_index.shape != labels.shape or self_index.is_floating_point():
        raise ValueError(
            f"self_index must be integers of shape ({len(labels)},) to match embeddings, got {self_index.dtype} of "
            f"shape {tuple(self_index.shape)}"
        )
    if len(labels) and not -1 <= int(self_index.min()) <= int(self_index.max()) < len(gallery_labels):
        raise ValueError(
            f"self_index must be in -1..{len(gallery_labels) - 1}, got {int(self_index.min())}..{int(self_index.max())}"
        )
    inside = self_index >= 0
    if not torch.equal(gallery_labels[self_index[inside]], labels[inside]):
        raise ValueError("self_index must point to images of the gallery with the label of the query, got other labels")
    return self_index.long()


def average_scores(
    scores: Tensor, labels: Tensor, average: Average = "micro", num_classes: int | None = None
) -> Tensor:
    """Mean of the scores of queries: over queries, over classes, or of each class.

    Args:
        scores: Of each query, ``(M,)`` or ``(M, S)``; a query whose scores are ``nan`` does not count.
        labels: Class of each query, ``(M,)``.
        average: "micro": mean over queries; "macro": mean over classes of the mean over their queries; "none": the
            mean of each class.
        num_classes: C, for "none"; None: the largest label plus one.

    Returns:
        float32, ``()`` or ``(S,)``, for "none" ``(C,)`` or ``(C, S)``; ``nan`` where no query counts.

    Raises:
        ValueError: If the average is unknown, or for "none" a label is not in 0..C-1.

    Example:
        >>> scores, labels = torch.tensor([1.0, 1.0, 0.0, float("nan")]), torch.tensor([0, 0, 2, 1])
        >>> average_scores(scores, labels), average_scores(scores, labels, "macro")
        (tensor(0.6667), tensor(0.5000))
        >>> average_scores(scores, labels, "none")
        tensor([1., nan, 0.])
    """
    if average not in ("micro", "macro", "none"):
        raise ValueError(f'average must be "micro", "macro" or "none", got {average!r}')
    if average == "none":
        top = int(labels.max()) if len(labels) else -1
        num_classes = top + 1 if num_classes is None else num_classes
        if len(labels) and (int(labels.min()) < 0 or top >= num_classes):
            raise ValueError(f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{top}")
    values = scores if scores.device.type == "mps" else scores.double()
    counted = ~values.isnan() if values.ndim == 1 else ~values.isnan().any(dim=1)
    values, labels = values[counted], labels[counted]
    if average == "micro":
        return values.mean(dim=0).float()
    if average == "macro":
        index, counts = compact_labels(labels)
        return _class_means(values, index, counts).mean(dim=0).float()
    counts = torch.bincount(labels.long(), minlength=num_classes or 0)
    return _class_means(values, labels.long(), counts).float()


def _class_means(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    sums = class_sums(values, index, len(counts))
    return sums / (counts if values.ndim == 1 else counts.unsqueeze(1))


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    k: int = 1,
    average: Average = "micro",
    num_classes: int | None = None,
    chunk_size: int = 2048,
) -> Tensor:
    """Share of the queries with a relevant image among their k nearest, by cosine similarity.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        k: Neighbours, at least 1.
        average: "micro": mean over queries; "macro": mean over classes of the mean over their queries; "none": the
            mean of each class.
        num_classes: C, for "none"; None: the largest label plus one.
        chunk_size: Queries, and images of the gallery, compared at a time.

    Returns:
        Scalar in [0, 1], float32, or ``(C,)`` for "none"; ``nan`` where no query has a relevant image.

    Raises:
        ValueError: As :func:`retrieval_scores` and :func:`average_scores`.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.3], [0.0, 1.0]])
        >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]), k=1)
        tensor(0.7500)

    Source:
        As :func:`retrieval_scores`.
    """
    scores = retrieval_scores(embeddings, labels, gallery, gallery_labels, (k,), chunk_size=chunk_size)
    return average_scores(scores.recall[:, 0], labels, average, num_classes)


def r_precision(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    average: Average = "micro",
    num_classes: int | None = None,
    chunk_size: int = 2048,
) -> Tensor:
    """Mean share of relevant images among the R nearest, where R is the number of relevant images of the query.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        average: As in :func:`recall_at_k`.
        num_classes: C, for "none".
        chunk_size: Queries, and images of the gallery, compared at a time.

    Returns:
        Scalar in [0, 1], float32, or ``(C,)`` for "none"; ``nan`` where no query has a relevant image.

    Raises:
        ValueError: As :func:`retrieval_scores` and :func:`average_scores`.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.3], [0.0, 1.0]])
        >>> r_precision(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(0.7500)

    Source:
        As :func:`retrieval_scores`.
    """
    scores = retrieval_scores(embeddings, labels, gallery, gallery_labels, (1,), chunk_size=chunk_size)
    return average_scores(scores.r_precision, labels, average, num_classes)


def map_at_r(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    average: Average = "micro",
    num_classes: int | None = None,
    chunk_size: int = 2048,
) -> Tensor:
    """Mean average precision at R: as R-precision, but relevant images count more the nearer they are.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        average: As in :func:`recall_at_k`.
        num_classes: C, for "none".
        chunk_size: Queries, and images of the gallery, compared at a time.

    Returns:
        Scalar in [0, 1], float32, or ``(C,)`` for "none"; ``nan`` where no query has a relevant image.

    Raises:
        ValueError: As :func:`retrieval_scores` and :func:`average_scores`.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.3], [0.0, 1.0]])
        >>> map_at_r(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(0.7500)

    Source:
        As :func:`retrieval_scores`.
    """
    scores = retrieval_scores(embeddings, labels, gallery, gallery_labels, (1,), chunk_size=chunk_size)
    return average_scores(scores.average_precision, labels, average, num_classes)
