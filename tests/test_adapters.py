import itertools

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor

from benchmarks.adapters import LinearCrossEntropy, MinedLoss, SimO2Loss
from tests.bounds import assert_stable


def test_simo2_is_its_loops_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % 3
    total = 0.0
    rows = (embeddings / embeddings.norm(dim=1, keepdim=True)).tolist()
    for i in range(12):
        for j in range(i + 1, 12):
            d = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
            o = sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) ** 2
            s = 2**0.5 * o / (1e-3 + d)
            total += 1 / (1 + s) if labels[i] == labels[j] else s
    assert float(SimO2Loss()(embeddings, labels)) == pytest.approx(total / 12, rel=1e-10)
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: SimO2Loss()(rows, labels), [embeddings])
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        SimO2Loss(eps=0)


def test_cross_entropy_is_that_of_its_head() -> None:
    loss = LinearCrossEntropy(3, 4, label_smoothing=0.3)
    embeddings, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    log_p = (embeddings @ loss.head.weight.T + loss.head.bias).log_softmax(dim=1)
    expected = -(0.7 * log_p[torch.arange(6), labels] + 0.3 * log_p.mean(dim=1)).mean()
    torch.testing.assert_close(loss(embeddings, labels), expected)


def test_mined_loss_uses_the_triplets_of_its_miner_and_is_zero_without_any() -> None:
    loss = MinedLoss(TripletMarginLoss(margin=0.2), TripletMarginMiner(margin=0.2, type_of_triplets="semihard"))
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(12) % 3

    def semihard(rows: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(rows, dim=1)
        distance = (unit[:, None] - unit[None]).norm(dim=2)
        found = []
        for a, p, n in itertools.product(range(12), repeat=3):
            gap = distance[a, n] - distance[a, p]
            if a != p and labels[a] == labels[p] and labels[a] != labels[n] and 0 < gap <= 0.2:
                found.append(0.2 - gap)
        return torch.stack(found).mean()

    assert_stable(loss(embeddings, labels), semihard, embeddings.detach())
    alone = loss(embeddings, torch.arange(12))
    alone.backward()
    assert float(alone.detach()) == 0
    assert embeddings.grad is not None
