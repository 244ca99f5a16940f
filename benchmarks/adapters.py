"""Losses of the baselines that no library provides as ``(embeddings, labels) -> scalar``."""

import math
from typing import Any

import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn

from simo_lightning import ClassifierLoss, SimOLoss, losses


class MinedLoss(nn.Module):
    """A loss of pytorch-metric-learning on the pairs or triplets that one of its miners finds; 0 without any."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.loss(embeddings, labels, self.miner(embeddings, labels))
        return value


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of a linear classifier on the embedding, trained with the encoder."""

    def __init__(self, num_classes: int, embedding_dim: int, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.head = nn.Linear(embedding_dim, num_classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(embeddings), labels, label_smoothing=self.label_smoothing)


class SimO2Loss(nn.Module):
    """The later per-pair form of SimO's first author, on L2-normalised embeddings; time and memory are O(N^2).

    With ``s = sqrt(2) * o / (eps + d)``, d the squared distance and o the squared dot product of a pair, the loss is
    ``(sum of 1 / (1 + s) over similar pairs + sum of s over dissimilar pairs) / N`` over all pairs i < j of N.

    Source:
        "SimO2", public JAX code of the first author of arXiv 2410.05233. Each pair is counted once here.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        self.eps = eps

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        units = nn.functional.normalize(embeddings, dim=1)
        cosines = units @ units.T  # (N, N)
        ratio = math.sqrt(2) * cosines.square() / (self.eps + (2 - 2 * cosines).clamp(min=0))
        pairs = torch.where(labels[:, None] == labels, 1 / (1 + ratio), ratio)
        return pairs.triu(diagonal=1).sum() / len(units)


class JointLoss(losses.JointLoss):
    """Cross-entropy of a linear classifier, plus ``weight`` times another loss, with one list of arguments to sweep.

    Args:
        weight: Of the other loss.
        label_smoothing: Of the classifier.
        other: "supcon" or "simo".
        arguments: Of the other loss.
    """

    def __init__(self, weight: float, label_smoothing: float, other: str, **arguments: Any) -> None:
        make = {"supcon": SupConLoss, "simo": SimOLoss}[other]
        parts = {"classifier": ClassifierLoss(label_smoothing=label_smoothing), other: make(**arguments)}
        super().__init__(parts, {other: weight})
