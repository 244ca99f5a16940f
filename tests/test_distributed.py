from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simo_lightning import SimOLoss
from simo_lightning.distributed import gather_rows, sum_over_ranks

SHARES = [3, 8, 1, 4]  # rows of each rank: unequal
LABELS = torch.tensor([0, 1, 0, 1, 1, 2, 0, 9, 9, 0, 2, 2, 1, 0, 0, 1])  # 9 lives on one rank alone, where W = 2


def data() -> Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def shares(world: int) -> list[int]:
    return [sum(SHARES[rank::world]) for rank in range(world)] if world < 4 else SHARES


def run(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save((gather_job(rank, world), train_job(rank, world)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def gather_job(rank: int, world: int) -> Any:
    own = data().split(shares(world))[rank]
    labels = LABELS.split(shares(world))[rank]
    half = gather_rows(own.bfloat16())
    return gather_rows(own), gather_rows(labels), half, sum_over_ranks(torch.tensor([rank + 1.0]))


def train_job(rank: int, world: int) -> Any:
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rows, labels = data().split(shares(world))[rank], LABELS.split(shares(world))[rank]
    history = []
    for _ in range(3):
        loss = SimOLoss()(gather_rows(model(rows)), gather_rows(labels))
        optimizer.zero_grad()
        loss.backward()
        history.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        optimizer.step()
    return history


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of 2 or 4 real processes returned."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_rows_come_in_the_order_of_the_ranks(results: list[Any]) -> None:
    for (rows, labels, half, total), _ in results:
        assert torch.equal(rows, data())
        assert torch.equal(labels, LABELS)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, data().bfloat16())
        assert total == sum(range(1, len(results) + 1))


def test_loss_and_gradients_are_those_of_one_process(results: list[Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for _ in range(3):
        loss = SimOLoss()(model(data()), LABELS)
        optimizer.zero_grad()
        loss.backward()
        expected.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        optimizer.step()
    for _, history in results:
        for (loss, gradients), (wanted, wanted_gradients) in zip(history, expected, strict=True):
            torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
            torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-10, atol=1e-14)


def test_one_process_gathers_nothing() -> None:
    rows = data()
    assert gather_rows(rows) is rows
    assert sum_over_ranks(rows) is rows
