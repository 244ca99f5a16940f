"""Nearest neighbours and retrieval where each process holds a part of the bank and some of the queries.

The bank stays where it is. Blocks of queries are sent to all processes, each finds the nearest embeddings of its own
part, and of these only their keys (:mod:`simo_lightning.functional.neighbors`) are sent back to the process of the
query, which merges them. The result is that of one process with everything: a key holds a similarity that is computed
in float64 and rounded alike everywhere, and a tie that does not depend on the place of an embedding.

With W processes, M queries and N embeddings over all of them, a process receives about ``4 M D`` bytes of queries (8 in
float64) and, for its own M / W queries, ``8 M k`` bytes of keys (4 where a key fits int32, as in retrieval), instead of
``4 N D`` bytes of the bank. 50,000 queries and 1,280,000 embeddings of D = 128 with k = 20 are 26 MB and 8 MB instead
of 655 MB. In retrieval k is R, the images of a class, or less where a process has fewer: at most ``4 N M / W`` bytes.
Memory beside the inputs is about ``10 * chunk_bytes`` on each process. Every process calls these functions, with its
share, which may be empty.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from simo_lightning.distributed import exchange_rows, gather_rows, largest_over_ranks, rank, sum_over_ranks, world_size
from simo_lightning.functional.knn import class_tie, vote_of_keys, voters_of_counts
from simo_lightning.functional.moments import class_sums, compact_labels
from simo_lightning.functional.neighbors import (
    Tie,
    default_chunk_bytes,
    largest_keys,
    similarities_of,
    top_keys,
    unit_vectors,
)
from simo_lightning.functional.retrieval import RELEVANCE_TIES, RetrievalScores, relevance_tie, scores_of_keys


def class_counts_over_ranks(labels: Tensor) -> Tensor:
    """Number of embeddings of each class on all processes.

    Args:
        labels: Of this process, integers >= 0, ``(N,)``.

    Returns:
        int64 ``(C,)``, C - 1 the largest label of any process.
    """
    num_classes = largest_over_ranks(int(labels.max()) + 1 if len(labels) else 0, labels.device)
    return sum_over_ranks(torch.bincount(labels.long(), minlength=num_classes))


def class_means_over_ranks(embeddings: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Means of the embeddings at length 1 of each class over all processes.

    Args:
        embeddings: Of this process, ``(N, D)``.
        labels: ``(N,)``.
        counts: Of :func:`class_counts_over_ranks`, ``(C,)``.

    Returns:
        ``(C, D)``, in float32 or float64; nan for a class without embeddings.
    """
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    exact = dtype if embeddings.device.type == "mps" else torch.float64
    sums = sum_over_ranks(class_sums(unit_vectors(embeddings.to(exact)), labels.long(), len(counts)))
    return (sums / counts.unsqueeze(1)).to(dtype)


def knn_predict_over_ranks(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    counts: Tensor,
    k: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Class of each query of this process, as :func:`.functional.knn_predict` with the bank of all processes.

    Args:
        queries: Of this process, finite floats ``(M, D)``, of one dtype on all processes.
        bank: This process's part of the bank, finite, ``(N, D)``.
        bank_labels: Integers >= 0, ``(N,)``.
        counts: Of :func:`class_counts_over_ranks`, of a bank that is not empty, ``(C,)``.
        k: Neighbours that vote, at most the number of embeddings of the bank; None: as many as a class's size allows.
        chunk_bytes: As for :func:`.functional.knn_predict`; the same on every process.

    Returns:
        Predicted classes ``(M,)``, int64.
    """
    voters = voters_of_counts(counts, k)
    reach = torch.full((len(queries),), min(int(voters.max()), int(counts.sum())), device=queries.device)
    predicted = torch.zeros_like(reach)
    tie = class_tie(bank_labels.long(), len(counts))
    for mine, keys in _search(queries, reach, bank, lambda _: tie, len(counts), chunk_bytes=chunk_bytes):
        predicted[mine] = vote_of_keys(keys, voters)
    return predicted


def kth_similarity_over_ranks(queries: Tensor, bank: Tensor, k: int, chunk_bytes: int | None = None) -> Tensor:
    """Cosine of each query of this process with its k-th nearest embedding of the bank of all processes.

    Args:
        queries: Of this process, finite floats ``(M, D)``, of one dtype on all processes.
        bank: This process's part of the bank, finite, ``(N, D)``.
        k: At most the number of embeddings of the bank.
        chunk_bytes: As for :func:`.functional.knn_predict`; the same on every process.

    Returns:
        ``(M,)``, a multiple of 2**-22.
    """
    reach = torch.full((len(queries),), k, device=queries.device)
    similarity = queries.new_zeros(len(queries))
    for mine, keys in _search(queries, reach, bank, lambda _: _no_tie, 1, chunk_bytes=chunk_bytes):
        similarity[mine] = similarities_of(keys[:, k - 1], 1).to(similarity.dtype)
    return similarity


def _no_tie(query: Tensor, row: Tensor) -> Tensor:
    return torch.zeros_like(query + row)


def retrieval_scores_over_ranks(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int],
    self_index: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> RetrievalScores:
    """Scores of the queries of this process, as :func:`.functional.retrieval_scores` with the gallery of all processes.

    Args:
        embeddings: Queries of this process, finite floats ``(M, D)``, of one dtype on all processes.
        labels: Integers ``(M,)``.
        gallery: This process's part of the gallery, finite, ``(N, D)``.
        gallery_labels: ``(N,)``.
        ks: Values of k of Recall@k.
        self_index: Position of each query itself in this process's part of the gallery, ``(M,)``; None: no query is in
            the gallery.
        chunk_bytes: As for :func:`.functional.retrieval_scores`; the same on every process.

    Returns:
        Scores of each query, float32.
    """
    own = torch.full_like(labels, -1) if self_index is None else self_index
    relevant = _count_relevant(labels, gallery_labels) - (own >= 0).long()
    total = int(sum_over_ranks(torch.tensor(len(gallery), device=gallery.device)))
    reach = relevant.clamp(min=max(ks)).clamp(max=total) * (relevant > 0)
    scores = embeddings.new_full((len(embeddings), len(ks) + 2), float("nan"), dtype=torch.float32)

    def tie(query_labels: Tensor) -> Tie:
        return relevance_tie(query_labels, gallery_labels)

    for mine, keys in _search(embeddings, reach, gallery, tie, RELEVANCE_TIES, labels.long(), own, chunk_bytes):
        counted = relevant[mine] > 0
        scores[mine[counted]] = scores_of_keys(keys[counted], relevant[mine[counted]], ks)
    return RetrievalScores(scores[:, :-2], scores[:, -2], scores[:, -1], relevant)


def _count_relevant(labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """Images of each query's class in the gallery of all processes, (M,)."""
    classes, counts = gallery_labels.long().unique(return_counts=True)
    classes, counts = gather_rows(classes), gather_rows(counts)
    index, _ = compact_labels(torch.cat((labels.long(), classes)))
    totals = counts.new_zeros(len(index)).index_add_(0, index[len(labels) :], counts)
    return totals[index[: len(labels)]]


def _search(
    queries: Tensor,
    reach: Tensor,
    bank: Tensor,
    tie: Callable[[Tensor], Tie],
    ties: int,
    labels: Tensor | None = None,
    own: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of this process's queries, block by block, and the keys (m, k) of their neighbours on all processes.

    ``reach (M,)`` is how many neighbours a query needs; one that needs none may be left out. ``tie`` maps the labels of
    a block of queries, of any process, to the tie of :func:`largest_keys`.
    """
    device = queries.device
    blank = torch.full((len(queries),), -1, device=device)
    about = torch.stack((blank + 1 + rank(), blank if own is None else own, blank if labels is None else labels), dim=1)
    order = reach.argsort(stable=True, descending=True)  # in blocks of queries that need about as many neighbours
    largest_part, width = largest_over_ranks(len(bank), device), queries.shape[1]
    while k := largest_over_ranks(int(reach[order[0]]) if len(order) else 0, device):
        sent = min(k, largest_part)  # keys that one process can have
        rows = max(1, (chunk_bytes or default_chunk_bytes(device)) // (8 * world_size() * (sent + width)))
        mine, order = order[:rows], order[rows:]
        asked = gather_rows(queries[mine])
        owner, place, asked_labels = gather_rows(about[mine]).unbind(dim=1)
        places = torch.where(owner == rank(), place, -1)
        keys = largest_keys(asked, bank, sent, tie(asked_labels), ties, None if own is None else places, chunk_bytes)
        received = exchange_rows(keys, torch.bincount(owner, minlength=world_size()))  # (W, m, sent)
        yield mine, top_keys(received.transpose(0, 1).flatten(1), k)
