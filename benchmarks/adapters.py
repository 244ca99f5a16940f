"""Losses of the baselines that no library gives as ``(embeddings, labels) -> scalar``: for recipes, by class path."""

import math

import torch
from torch import Tensor, nn


class MinedLoss(nn.Module):
    """A pair or triplet loss on what a miner finds in the batch.

    Args:
        loss: ``(embeddings, labels, found) -> scalar``, such as TripletMarginLoss of pytorch-metric-learning.
        miner: ``(embeddings, labels) -> found``, such as its TripletMarginMiner.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``(N, D)``.
            labels: ``(N,)``.

        Returns:
            Scalar; a zero with a gradient where the miner finds nothing.
        """
        value: Tensor = self.loss(embeddings, labels, self.miner(embeddings, labels))
        return value


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of a linear classifier on the embedding, trained with the encoder.

    Args:
        num_classes: C.
        embedding_dim: D.
        label_smoothing: Share of the target spread over all classes, in 0..1.
    """

    def __init__(self, num_classes: int, embedding_dim: int, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.head = nn.Linear(embedding_dim, num_classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``(N, D)``.
            labels: ``(N,)``, in 0..C-1.

        Returns:
            Scalar >= 0.
        """
        return nn.functional.cross_entropy(self.head(embeddings), labels, label_smoothing=self.label_smoothing)


class SimO2Loss(nn.Module):
    """The later per-pair form of SimO's first author, on L2-normalised embeddings.

    With ``s = sqrt(2) * o / (eps + d)``, d the squared distance and o the squared dot product of a pair,

        (sum of 1 / (1 + s) over similar pairs + sum of s over dissimilar pairs) / N

    over the unordered pairs i < j of a batch of N rows. Time and memory are O(N^2).

    Args:
        eps: Added to the distance, > 0.

    Raises:
        ValueError: If eps is not positive.

    Example:
        >>> loss = SimO2Loss(eps=1.0)
        >>> loss(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
        tensor(0.1381)

    Source:
        "SimO2", public JAX code of the first author of arXiv 2410.05233. Each pair is counted once here.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        self.eps = eps

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``(N, D)``, N >= 1.
            labels: ``(N,)``.

        Returns:
            Scalar >= 0.
        """
        rows = nn.functional.normalize(embeddings, dim=1)
        cosines = rows @ rows.T  # (N, N)
        ratio = math.sqrt(2) * cosines.square() / (self.eps + (2 - 2 * cosines).clamp(min=0))
        similar = labels.unsqueeze(0) == labels.unsqueeze(1)
        pairs = torch.where(similar, 1 / (1 + ratio), ratio)
        return pairs.triu(diagonal=1).sum() / len(rows)
