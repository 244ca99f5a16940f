"""k nearest neighbours by cosine similarity: the quality of embeddings without training a classifier."""

from collections.abc import Callable

import torch
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.neighbors import (
    check_chunk_bytes,
    default_chunk_bytes,
    largest_keys,
    similarities_of,
    ties_of,
)

# Neighbours that vote where every class has three times as many images.
_LARGEST_K = 20

# Pairs of two neighbours of a query that are compared at a time in a vote.
_PAIRS = 2**20


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int | None = None,
    num_classes: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Class of each query: the most common one among its k nearest neighbours in the bank, by cosine similarity.

    All neighbours have equal votes. With a number k every class is judged by the same k neighbours. With ``k=None`` a
    class of ``n_c`` images in the bank is judged by ``k_c = min(20, ceil(n_c / 3))`` neighbours: the prediction is the
    class with the largest share of the query's ``k_c`` nearest neighbours. Where every class has at least 58 images
    this is k = 20. With k = 20 for all, a class of fewer than ten images could never have most of the votes.

    A tie goes to the class whose votes have the larger mean similarity, and then to the lowest class. Similarities are
    computed in float64 and rounded to multiples of 2**-22 (2.4e-7); of equally similar embeddings those of the lowest
    class come first. So the result depends neither on the order of the bank, nor on chunks, nor on the number of
    processes. An embedding of zeros has similarity 0 to everything. Memory in addition to the inputs is at most about
    ``10 * chunk_bytes``, whatever M, N and C.

    Args:
        queries: Float tensor ``(M, D)``.
        bank: Float tensor ``(N, D)``, embeddings of known classes.
        bank_labels: Class of each embedding of the bank, integers >= 0, ``(N,)``.
        k: Neighbours that vote, ``1 <= k <= N``; None: as many for each class as its size allows, at most 20.
        num_classes: C, larger than every label; by default the largest label plus one.
        chunk_bytes: Bytes of similarities that are compared at a time; does not change the result. None: 8 MiB on a
            CPU, whose cache holds them, and 256 MiB on a GPU.

    Returns:
        Predicted classes ``(M,)``, int64.

    Raises:
        ValueError: If a type, shape or label is wrong, k is not in 1..N, the bank is empty, or a value is not finite.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[5.0, 1.0], [0.0, 3.0]]), bank, torch.tensor([7, 7, 2]), k=1)
        tensor([7, 2])

    Source:
        The usual kNN protocol of representation learning (Wu et al., arXiv 1805.01978), with equal votes instead of
        their exp(similarity / temperature). A number of neighbours that grows with the size of the class: Li, Lu & Yu,
        ACM TALIP 3(4), 2004, with another formula.
    """
    _check_knn(queries, bank, bank_labels, k, chunk_bytes)
    top_label = int(bank_labels.max())
    num_classes = top_label + 1 if num_classes is None else num_classes
    if int(bank_labels.min()) < 0 or top_label >= num_classes:
        raise ValueError(
            f"bank_labels must be in 0..{num_classes - 1}, got {int(bank_labels.min())}..{top_label}"
            f" (num_classes={num_classes})"
        )
    labels = bank_labels.long()
    voters = class_voters(labels, k, num_classes)
    reach = min(int(voters.max()), len(bank))
    predicted = [labels[:0]]
    for chunk in queries.split(query_chunk(chunk_bytes, queries, reach)):
        keys = largest_keys(chunk, bank, reach, class_tie(labels, num_classes), num_classes, chunk_bytes=chunk_bytes)
        predicted.append(vote_of_keys(keys, voters))
    return torch.cat(predicted)


def class_tie(labels: Tensor, num_classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The tie of :func:`.neighbors.largest_keys` that puts the lowest class first, by the bank's labels ``(N,)``."""
    return lambda _, row: num_classes - 1 - labels[row]


def vote_of_keys(keys: Tensor, voters: Tensor) -> Tensor:
    """Predicted class ``(m,)`` from keys ``(m, k)`` with :func:`class_tie` and the voters ``(C,)`` of each class."""
    return vote(similarities_of(keys, len(voters)), len(voters) - 1 - ties_of(keys, len(voters)), voters)


def query_chunk(chunk_bytes: int | None, queries: Tensor, k: int) -> int:
    """Queries whose k keys and float64 copy take as much memory as a chunk of similarities."""
    return max(1, (chunk_bytes or default_chunk_bytes(queries.device)) // (8 * (k + queries.shape[1])))


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int | None = None,
    num_classes: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Share of the queries whose class :func:`knn_predict` predicts.

    Args:
        queries: Float tensor ``(M, D)``.
        query_labels: Class of each query, ``(M,)``.
        bank: Float tensor ``(N, D)``.
        bank_labels: Class of each embedding of the bank, integers >= 0, ``(N,)``.
        k: Neighbours that vote, ``1 <= k <= N``; None: as many for each class as its size allows, at most 20.
        num_classes: C; by default the largest label of the bank plus one.
        chunk_bytes: Bytes of similarities that are compared at a time.

    Returns:
        Scalar in [0, 1], float32; ``nan`` if there is no query.

    Raises:
        ValueError: As :func:`knn_predict`, or if ``query_labels`` does not match ``queries``.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> queries = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
        >>> knn_accuracy(queries, torch.tensor([0, 1]), bank, torch.tensor([0, 1]), k=1)
        tensor(0.5000)
    """
    check_embeddings(queries, query_labels, "queries", "query_labels")
    predicted = knn_predict(queries, bank, bank_labels, k, num_classes, chunk_bytes)
    return (predicted == query_labels).float().mean()


def _check_knn(queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int | None, chunk_bytes: int | None) -> None:
    check_embeddings(queries, name="queries")
    check_embeddings(bank, bank_labels, "bank", "bank_labels")
    check_pair(queries, bank, "queries", "bank")
    if len(bank) == 0:
        raise ValueError("bank must have at least 1 embedding, got none")
    if k is not None and not 1 <= k <= len(bank):
        raise ValueError(f"k must be in 1..{len(bank)}, the size of the bank, got k={k}")
    check_chunk_bytes(chunk_bytes)
    check_finite(queries, "queries")
    check_finite(bank, "bank")


def check_pair(queries: Tensor, bank: Tensor, name: str, bank_name: str) -> None:
    """Raise unless queries ``(M, D)`` and a bank ``(N, D)`` have the same D and device."""
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{name} and {bank_name} must have shapes (M, D) and (N, D), "
            f"got {tuple(queries.shape)} and {tuple(bank.shape)}"
        )
    if queries.device != bank.device:
        raise ValueError(f"{bank_name} must be on {queries.device}, where {name} are, got {bank.device}")


def check_finite(embeddings: Tensor, name: str) -> None:
    """Raise if an embedding ``(N, D)`` has nan or inf."""
    invalid = int((~embeddings.isfinite()).any(dim=1).sum())
    if invalid:
        raise ValueError(f"{name} must be finite, got nan or inf in {invalid} of {len(embeddings)} embeddings")


def class_voters(labels: Tensor, k: int | None, num_classes: int) -> Tensor:
    """Number of neighbours by which each class is judged, (C,) int64, from the labels (N,) of the bank."""
    return voters_of_counts(torch.bincount(labels, minlength=num_classes), k)


def voters_of_counts(counts: Tensor, k: int | None) -> Tensor:
    """As :func:`class_voters`, from the number of images of each class in the bank, (C,) int64."""
    return ((counts + 2) // 3).clamp(min=1, max=_LARGEST_K) if k is None else torch.full_like(counts, k)


def vote(similarities: Tensor, voted: Tensor, voters: Tensor) -> Tensor:
    """Predicted class (m,) from the nearest neighbours, nearest first, and the voters (C,) of each class.

    ``similarities`` and ``voted``, the class of each neighbour, are (m, k), with k at least the largest of the voters.
    Memory is that of pairs of neighbours of a few queries, whatever C.
    """
    rows = max(1, _PAIRS // similarities.shape[1] ** 2)
    parts = zip(similarities.split(rows), voted.split(rows), strict=True)
    return torch.cat([_vote(*part, voters) for part in parts])


def _vote(similarities: Tensor, voted: Tensor, voters: Tensor) -> Tensor:
    rank = torch.arange(similarities.shape[1], device=voted.device)
    own = voters[voted]  # (m, k)
    counts = rank < own
    same = (voted.unsqueeze(2) == voted.unsqueeze(1)) & counts.unsqueeze(1)  # (m, k, k)
    # an integer over an integer: classes with the same share are equal to the last bit
    votes = same.sum(dim=2).to(similarities.dtype) / own
    weight = torch.where(same, similarities.unsqueeze(1), 0).sum(dim=2) / own
    weight = weight.masked_fill(votes < votes.amax(dim=1, keepdim=True), float("-inf"))
    leads = weight == weight.amax(dim=1, keepdim=True)
    return torch.where(leads, voted, len(voters)).amin(dim=1)
