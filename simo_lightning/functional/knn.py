"""k nearest neighbours by cosine similarity: the quality of embeddings without training a classifier."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int = 20,
    num_classes: int | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Class of each query: the most common one among its k nearest neighbours in the bank, by cosine similarity.

    All k neighbours have equal votes. A tie goes to the class with the larger sum of similarities, and then to the
    lowest class. An embedding of zeros has similarity 0 to everything. Half precision is computed in float32. Memory is
    ``O(chunk_size * (N + C))`` beside the inputs.

    Args:
        queries: Float tensor ``(M, D)``.
        bank: Float tensor ``(N, D)``, embeddings of known classes.
        bank_labels: Class of each row of the bank, integers >= 0, ``(N,)``.
        k: Neighbours that vote, ``1 <= k <= N``.
        num_classes: C, larger than every label; by default the largest label plus one.
        chunk_size: Queries that are compared with the bank at once; it does not change the result.

    Returns:
        Predicted classes ``(M,)``, int64.

    Raises:
        ValueError: If a shape or a label is wrong, k is not in 1..N, or a value is not finite.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[5.0, 1.0], [0.0, 3.0]]), bank, torch.tensor([7, 7, 2]), k=1)
        tensor([7, 2])

    Source:
        The usual kNN protocol of representation learning (Wu et al., arXiv 1805.01978), with equal votes in place of
        their exp(similarity / temperature).
    """
    _check_knn(queries, bank, bank_labels, k, chunk_size)
    top_label = int(bank_labels.max())
    num_classes = top_label + 1 if num_classes is None else num_classes
    if int(bank_labels.min()) < 0 or top_label >= num_classes:
        raise ValueError(
            f"bank_labels must be in 0..{num_classes - 1}, got {int(bank_labels.min())}..{top_label}"
            f" (num_classes={num_classes})"
        )
    columns = _unit_rows(bank).mT  # (D, N)
    labels = bank_labels.long()
    chunks = [
        _vote(_unit_rows(chunk) @ columns, labels, k, num_classes)
        for chunk in queries.split(chunk_size)
        if len(chunk) > 0
    ]
    return torch.cat(chunks) if chunks else labels.new_empty(0)


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int = 20,
    num_classes: int | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Share of the queries whose class :func:`knn_predict` predicts.

    Args:
        queries: Float tensor ``(M, D)``.
        query_labels: Class of each query, ``(M,)``.
        bank: Float tensor ``(N, D)``.
        bank_labels: Class of each row of the bank, integers >= 0, ``(N,)``.
        k: Neighbours that vote, ``1 <= k <= N``.
        num_classes: C; by default the largest label of the bank plus one.
        chunk_size: Queries that are compared with the bank at once.

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
    if query_labels.shape != queries.shape[:1]:
        raise ValueError(
            f"query_labels must have shape ({len(queries)},) to match queries, got {tuple(query_labels.shape)}"
        )
    predicted = knn_predict(queries, bank, bank_labels, k, num_classes, chunk_size)
    return (predicted == query_labels).float().mean()


def _check_knn(queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int, chunk_size: int) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries and bank must have shapes (M, D) and (N, D), got {tuple(queries.shape)} and {tuple(bank.shape)}"
        )
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(f"bank_labels must have shape ({len(bank)},) to match bank, got {tuple(bank_labels.shape)}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be in 1..{len(bank)}, the rows of the bank, got k={k}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for name, rows in (("queries", queries), ("bank", bank)):
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must be finite, got nan or inf in {int((~rows.isfinite()).any(1).sum())} rows")


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows over their norms, (N, D), in float32 or better; largest entry first, so that no square overflows."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(dim=1, keepdim=True)
    return normalize(rows / torch.where(largest > 0, largest, 1), dim=1)


def _vote(similarities: Tensor, labels: Tensor, k: int, num_classes: int) -> Tensor:
    """Predicted class (m,) from similarities (m, N)."""
    similarity, neighbor = similarities.topk(k, dim=1)  # (m, k)
    voted = labels[neighbor]
    votes = similarity.new_zeros(len(similarity), num_classes).scatter_add(1, voted, torch.ones_like(similarity))
    weight = torch.zeros_like(votes).scatter_add(1, voted, similarity)
    leads = votes == votes.amax(dim=1, keepdim=True)
    return weight.masked_fill(~leads, float("-inf")).argmax(dim=1)
