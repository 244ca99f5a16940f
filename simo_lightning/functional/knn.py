"""k nearest neighbours by cosine similarity: the quality of embeddings without training a classifier."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simo_lightning.functional.moments import check_embeddings

# Neighbours that vote where every class has three times as many images.
_LARGEST_K = 20


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int | None = None,
    num_classes: int | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Class of each query: the most common one among its k nearest neighbours in the bank, by cosine similarity.

    All neighbours have equal votes. With a number k every class is judged by the same k neighbours. With ``k=None`` a
    class of ``n_c`` images in the bank is judged by ``k_c = min(20, ceil(n_c / 3))`` neighbours: the prediction is the
    class with the largest share of the query's ``k_c`` nearest neighbours. Where every class has at least 58 images
    this is k = 20. With k = 20 for all, a class of fewer than ten images could never have most of the votes.

    A tie goes to the class whose votes have the larger mean similarity, and then to the lowest class. An embedding of
    zeros has similarity 0 to everything. Half precision is computed in float32. Memory is
    ``O(chunk_size * (N + C))`` in addition to the inputs.

    Args:
        queries: Float tensor ``(M, D)``.
        bank: Float tensor ``(N, D)``, embeddings of known classes.
        bank_labels: Class of each embedding of the bank, integers >= 0, ``(N,)``.
        k: Neighbours that vote, ``1 <= k <= N``; None: as many for each class as its size allows, at most 20.
        num_classes: C, larger than every label; by default the largest label plus one.
        chunk_size: Queries compared with the bank at a time; does not change the result.

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
    _check_knn(queries, bank, bank_labels, k, chunk_size)
    top_label = int(bank_labels.max())
    num_classes = top_label + 1 if num_classes is None else num_classes
    if int(bank_labels.min()) < 0 or top_label >= num_classes:
        raise ValueError(
            f"bank_labels must be in 0..{num_classes - 1}, got {int(bank_labels.min())}..{top_label}"
            f" (num_classes={num_classes})"
        )
    dtype = torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)
    columns = unit_vectors(bank.to(dtype)).mT  # (D, N)
    labels = bank_labels.long()
    voters = class_voters(labels, k, num_classes)
    predicted = []
    for chunk in queries.split(chunk_size):
        similarities, neighbors = (unit_vectors(chunk.to(dtype)) @ columns).topk(int(voters.max()), dim=1)  # (m, k)
        predicted.append(vote(similarities, labels[neighbors], voters))
    return torch.cat(predicted)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int | None = None,
    num_classes: int | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Share of the queries whose class :func:`knn_predict` predicts.

    Args:
        queries: Float tensor ``(M, D)``.
        query_labels: Class of each query, ``(M,)``.
        bank: Float tensor ``(N, D)``.
        bank_labels: Class of each embedding of the bank, integers >= 0, ``(N,)``.
        k: Neighbours that vote, ``1 <= k <= N``; None: as many for each class as its size allows, at most 20.
        num_classes: C; by default the largest label of the bank plus one.
        chunk_size: Queries compared with the bank at a time.

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
    predicted = knn_predict(queries, bank, bank_labels, k, num_classes, chunk_size)
    return (predicted == query_labels).float().mean()


def _check_knn(queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int | None, chunk_size: int) -> None:
    check_embeddings(queries, name="queries")
    check_embeddings(bank, bank_labels, "bank", "bank_labels")
    check_pair(queries, bank, "queries", "bank")
    if len(bank) == 0:
        raise ValueError("bank must have at least 1 embedding, got none")
    if k is not None and not 1 <= k <= len(bank):
        raise ValueError(f"k must be in 1..{len(bank)}, the size of the bank, got k={k}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
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


def unit_vectors(embeddings: Tensor) -> Tensor:
    """Embeddings ``(N, D)`` divided by their norms; zeros stay zeros, and no square overflows or vanishes."""
    largest = embeddings.abs().amax(dim=1, keepdim=True)
    return normalize(embeddings / torch.where(largest > 0, largest, 1), dim=1)


def class_voters(labels: Tensor, k: int | None, num_classes: int) -> Tensor:
    """Number of neighbours by which each class is judged, (C,) int64, from the labels (N,) of the bank."""
    if k is not None:
        return labels.new_full((num_classes,), k)
    counts = torch.bincount(labels, minlength=num_classes)
    return ((counts + 2) // 3).clamp(min=1, max=_LARGEST_K)


def vote(similarities: Tensor, voted: Tensor, voters: Tensor) -> Tensor:
    """Predicted class (m,) from the nearest neighbours, nearest first, and the voters (C,) of each class.

    ``similarities`` and ``voted``, the class of each neighbour, are (m, k), with k at least the largest of the voters.
    """
    rank = torch.arange(similarities.shape[1], device=voted.device)
    counts = (rank < voters[voted]).to(similarities.dtype)  # 0 or 1
    zeros = similarities.new_zeros(len(similarities), len(voters))
    # an integer over an integer: classes with the same share are equal to the last bit
    votes = zeros.scatter_add(1, voted, counts) / voters
    weight = zeros.scatter_add(1, voted, similarities * counts) / voters
    leads = votes == votes.amax(dim=1, keepdim=True)
    return weight.masked_fill(~leads, float("-inf")).argmax(dim=1)
