"""Does an image belong to any known class? Scores, and how well they tell known from unknown images.

A score is higher for images that are more likely to belong to a known class. Shapes: N embeddings, D dimensions, C
known classes, B embeddings of known classes in a bank.
"""

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from simo_lightning.functional.decomposition import check_means, span_energy
from simo_lightning.functional.knn import check_finite, check_pair
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.neighbors import unit_vectors

__all__ = ["class_mean_similarity", "fpr_at_recall", "neighbor_similarity", "span_energy", "unknown_auroc"]

# Embeddings compared with the bank, or with the class means, at a time.
_CHUNK = 1024


def class_mean_similarity(embeddings: Tensor, class_means: Tensor) -> Tensor:
    """Cosine similarity to the nearest class mean.

    Args:
        embeddings: Float tensor ``(N, D)``.
        class_means: ``(C, D)``; a row of ``nan`` is a class without a mean.

    Returns:
        ``(N,)`` in [-1, 1], in the wider of the two dtypes, at least float32.

    Raises:
        ValueError: If a shape or type is wrong, an embedding is not finite, or no class has a finite mean.

    Example:
        >>> class_mean_similarity(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]), torch.eye(2)).tolist()
        [1.0, 0.0]

    Source:
        The score of Techapanurak, Suganuma & Okatani, arXiv 1905.10628, with class means in place of a head's weight.
    """
    check_means(embeddings, class_means)
    known = class_means[class_means.isfinite().all(dim=1)]
    if len(known) == 0:
        raise ValueError(f"class_means must have a finite row, got none in {len(class_means)}")
    return _kth_similarity(embeddings, known, 1)


def neighbor_similarity(embeddings: Tensor, bank: Tensor, k: int = 5) -> Tensor:
    """Cosine similarity to the k-th nearest embedding of a bank of known images.

    Args:
        embeddings: Float tensor ``(N, D)``.
        bank: Float tensor ``(B, D)``.
        k: ``1 <= k <= B``.

    Returns:
        ``(N,)`` in [-1, 1], in the wider of the two dtypes, at least float32.

    Raises:
        ValueError: If a shape or type is wrong, k is not in 1..B, or a value is not finite.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> neighbor_similarity(torch.tensor([[5.0, 0.0], [0.0, 3.0]]), bank, k=2).tolist()
        [1.0, 0.0]

    Source:
        Sun, Ming, Zhu & Li, "Out-of-distribution detection with deep nearest neighbors", ICML 2022 (arXiv 2204.06507),
        whose Euclidean distance of embeddings of length 1 gives the same order.
    """
    check_embeddings(embeddings)
    check_embeddings(bank, name="bank")
    check_pair(embeddings, bank, "embeddings", "bank")
    check_finite(embeddings, "embeddings")
    check_finite(bank, "bank")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be in 1..{len(bank)}, the size of the bank, got k={k}")
    return _kth_similarity(embeddings, bank, k)


def _kth_similarity(embeddings: Tensor, bank: Tensor, k: int) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, bank.dtype), torch.float32)
    columns = unit_vectors(bank.to(dtype)).mT
    chunks = [unit_vectors(chunk.to(dtype)) @ columns for chunk in embeddings.split(_CHUNK)]
    return torch.cat([similarity.topk(k, dim=1).values[:, -1] for similarity in chunks])


def unknown_auroc(known: Tensor, unknown: Tensor) -> Tensor:
    """Area under the ROC curve: probability that a known image scores higher than an unknown one, a tie counting half.

    Args:
        known: Scores of images of known classes, ``(N,)``.
        unknown: Scores of other images, ``(M,)``.

    Returns:
        Scalar in [0, 1], float32; 0.5: no better than chance. ``nan`` if one of the two is empty.

    Raises:
        ValueError: If the scores are not finite floats of shape (N,).

    Example:
        >>> unknown_auroc(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.4, 0.1]))
        tensor(0.8333)

    Source:
        Computed by torchmetrics' ``binary_auroc``.
    """
    _check_scores(known, unknown)
    if len(known) == 0 or len(unknown) == 0:
        return known.new_full((), torch.nan, dtype=torch.float32)
    scores = torch.cat((known, unknown))
    # ranks: torchmetrics would apply a sigmoid to scores outside of [0, 1], which could make different ones equal
    _, rank = scores.unique(return_inverse=True)
    ranks = rank.to(torch.float32 if scores.device.type == "mps" else torch.float64) / max(int(rank.max()), 1)
    target = torch.cat((torch.ones_like(known, dtype=torch.long), torch.zeros_like(unknown, dtype=torch.long)))
    return binary_auroc(ranks, target).float()


def fpr_at_recall(known: Tensor, unknown: Tensor, recall: float = 0.95) -> Tensor:
    """Share of unknown images that are accepted where the threshold accepts ``recall`` of the known images.

    The threshold is the largest that accepts at least this share of the known images; a score equal to it is accepted.

    Args:
        known: Scores of images of known classes, ``(N,)``.
        unknown: Scores of other images, ``(M,)``.
        recall: In (0, 1].

    Returns:
        Scalar in [0, 1], float32, lower is better; ``nan`` if one of the two is empty.

    Raises:
        ValueError: If the scores are not finite floats of shape (N,), or recall is not in (0, 1].

    Example:
        >>> fpr_at_recall(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.4, 0.1])).item()
        0.5

    Source:
        Liang, Li & Srikant, ICLR 2018 (arXiv 1706.02690), FPR at 95 % TPR.
    """
    _check_scores(known, unknown)
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be in (0, 1], got {recall}")
    if len(known) == 0 or len(unknown) == 0:
        return known.new_full((), torch.nan, dtype=torch.float32)
    accepted = math.ceil(recall * len(known) - 1e-9)  # 0.95 * 60 may be a little more than 57
    threshold = known.sort(descending=True).values[accepted - 1]
    return (unknown >= threshold).float().mean()


def _check_scores(known: Tensor, unknown: Tensor) -> None:
    for name, scores in (("known", known), ("unknown", unknown)):
        if scores.ndim != 1 or not scores.is_floating_point():
            raise ValueError(f"{name} must be floats of shape (N,), got {scores.dtype} of shape {tuple(scores.shape)}")
        if not scores.isfinite().all():
            raise ValueError(
                f"{name} must be finite, got {int((~scores.isfinite()).sum())} of {len(scores)} that are not"
            )
