"""Retrieval by cosine similarity: recall at k, R-precision and MAP@R, in one search with bounded memory.

Shapes: M queries, N gallery images, D dimensions, C classes. A gallery image is relevant if it has the query's class. R
is the number of relevant images of a query. In leave-one-out every image is a query and all others are its gallery. A
query without a relevant image, such as the only image of its class, has no value and does not count.

Ties. Similarities are computed in float64 and rounded to multiples of 2**-22 (2.4e-7). Of equally similar images the
irrelevant ones come first, so embeddings that are all the same score 0, and the result depends neither on the order of
the gallery, nor on chunks, nor on the number of processes.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from simo_lightning.functional.knn import check_finite, check_pair, query_chunk
from simo_lightning.functional.moments import check_embeddings, class_sums, compact_labels
from simo_lightning.functional.neighbors import check_chunk_bytes, largest_keys, no_key, ties_of

__all__ = ["RetrievalScores", "average_scores", "map_at_r", "r_precision", "recall_at_k", "retrieval_scores"]

Average = Literal["micro", "macro", "none"]

# Ties of an image: whether it is irrelevant.
RELEVANCE_TIES = 2


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
    chunk_bytes: int | None = None,
) -> RetrievalScores:
    """Recall at several k, R-precision and average precision of each query, from one search.

    With ``rel_i`` 1 if the i-th nearest image is relevant, else 0, and ``P_i`` the share of relevant images among the
    i nearest: ``R-precision = P_R`` and ``AP@R = (1 / R) sum_{i <= R} P_i rel_i``.

    Time is ``O(M N D)``. Memory in addition to the inputs is at most about ``10 * chunk_bytes``, whatever M, N and R,
    as long as that holds the R neighbours of one query.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        ks: Values of k, each at least 1. A k above the gallery's size stands for the whole gallery.
        self_index: Position of each query itself in the gallery, where it is left out, ``(M,)``; -1: it is not in the
            gallery. None: no query is in the gallery.
        chunk_bytes: Bytes of similarities that are compared at a time; does not change the result. None: 8 MiB on a
            CPU, whose cache holds them, and 256 MiB on a GPU.

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
    _check(embeddings, labels, gallery, gallery_labels, ks, chunk_bytes)
    own = _check_self_index(self_index, labels, gallery_labels)
    relevant = _count_relevant(labels, gallery_labels, own)
    scores = embeddings.new_full((len(embeddings), len(ks) + 2), float("nan"), dtype=torch.float32)
    # queries with a similar R together, so that a chunk keeps only as many neighbours as its own queries need
    order = relevant.argsort(stable=True, descending=True)
    order = order[relevant[order] > 0]
    while len(order):
        kept = min(max(int(relevant[order[0]]), *ks), len(gallery))
        rows = query_chunk(chunk_bytes, embeddings, kept)
        chunk, order = order[:rows], order[rows:]
        tie = relevance_tie(labels[chunk], gallery_labels)
        keys = largest_keys(embeddings[chunk], gallery, kept, tie, RELEVANCE_TIES, own[chunk], chunk_bytes)
        scores[chunk] = scores_of_keys(keys, relevant[chunk], ks)
    return RetrievalScores(scores[:, :-2], scores[:, -2], scores[:, -1], relevant)


def relevance_tie(labels: Tensor, gallery_labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The tie of :func:`.neighbors.largest_keys` that puts irrelevant images first: 1 if irrelevant, else 0."""
    return lambda query, row: labels[query] != gallery_labels[row]


def scores_of_keys(keys: Tensor, relevant: Tensor, ks: Sequence[int]) -> Tensor:
    """Recall at each k, R-precision and average precision, float32 ``(m, number of ks + 2)``.

    Args:
        keys: Of the nearest images with :func:`relevance_tie`, nearest first, ``(m, K)``.
        relevant: R of each query, ``(m,)``, all at least 1.
        ks: Values of k. K is at least each k and R, or all images are there.

    Returns:
        The scores.
    """
    hits = (ties_of(keys, RELEVANCE_TIES) == 0) & (keys != no_key(RELEVANCE_TIES))
    return _scores(hits, relevant, ks).float()


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
    chunk_bytes: int | None,
) -> None:
    check_embeddings(embeddings, labels)
    check_embeddings(gallery, gallery_labels, "gallery", "gallery_labels")
    check_pair(embeddings, gallery, "embeddings", "gallery")
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {list(ks) if len(ks) != 1 else ks[0]}")
    check_chunk_bytes(chunk_bytes)
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
    chunk_bytes: int | None = None,
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
        chunk_bytes: Bytes of similarities that are compared at a time.

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
    scores = retrieval_scores(embeddings, labels, gallery, gallery_labels, (k,), chunk_bytes=chunk_bytes)
    return average_scores(scores.recall[:, 0], labels, average, num_classes)


def r_precision(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    average: Average = "micro",
    num_classes: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Mean share of relevant images among the R nearest, where R is the number of relevant images of the query.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        average: As in :func:`recall_at_k`.
        num_classes: C, for "none".
        chunk_bytes: Bytes of similarities that are compared at a time.

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
    scores = retrieval_scores(embeddings, labels, gallery, gallery_labels, (1,), chunk_bytes=chunk_bytes)
    return average_scores(scores.r_precision, labels, average, num_classes)


def map_at_r(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    average: Average = "micro",
    num_classes: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Mean average precision at R: as R-precision, but relevant images count more the nearer they are.

    Args:
        embeddings: Queries, float tensor ``(M, D)``.
        labels: Class of each query, integers ``(M,)``.
        gallery: Images that are searched, ``(N, D)``; None: leave-one-out among ``embeddings``.
        gallery_labels: Class of each image of the gallery, ``(N,)``.
        average: As in :func:`recall_at_k`.
        num_classes: C, for "none".
        chunk_bytes: Bytes of similarities that are compared at a time.

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
    scores = retrieval_scores(embeddings, labels, gallery, gallery_labels, (1,), chunk_bytes=chunk_bytes)
    return average_scores(scores.average_precision, labels, average, num_classes)
