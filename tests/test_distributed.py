import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from simo_lightning import SimOLoss, SimOModule
from simo_lightning.distributed import gather_rows, largest_over_ranks, sum_over_ranks
from tests.bounds import UNIT
from tests.rank_processes import saved, start_ranks

SHARES = [3, 8, 1, 4]  # rows of each rank: unequal
LABELS = torch.tensor([0, 1, 0, 1, 1, 2, 0, 9, 9, 0, 2, 2, 1, 0, 0, 1])  # 9 lives on one rank alone, where W = 2

HALVES = [torch.bfloat16, torch.float16]


def data() -> Tensor:
    """Numbers that float32 holds, so that both dtypes compute the same thing."""
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).double()


def network() -> nn.Module:
    torch.manual_seed(0)  # weights that float32 holds
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def shares(world: int) -> list[int]:
    return [sum(SHARES[rank::world]) for rank in range(world)] if world < 4 else SHARES


FORMS = [("group", "ratio"), ("group", "log"), ("class", "ratio"), ("class", "log")]
FORMS += [(level, form) for level in ("centroid", "pair") for form in ("ratio", "log", "softmax")]
LOSSES = {
    f"{level} {form}": SimOLoss(level, form, eps=0.1, dissimilar_weight=1.0, mean_weight=0.5) for level, form in FORMS
} | {"default": SimOLoss(), "SupCon": SupConLoss()}
DTYPES = [torch.float64, torch.float32]
History = list[tuple[Tensor, list[Tensor]]]


def run(world: int, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    trained = {key: train(*key, rank, world) for key in itertools.product(LOSSES, DTYPES)}
    trained["sharded"] = train("centroid softmax", torch.float64, rank, world, shard=True)
    trained["micro-batches"] = train_in_parts(2, rank, world)
    torch.save((gather_job(rank, world), trained), folder / f"ranks.{rank}.pt")
    dist.destroy_process_group()


def gather_job(rank: int, world: int) -> Any:
    own = data().split(shares(world))[rank]
    labels = LABELS.split(shares(world))[rank]
    total, largest = sum_over_ranks(torch.tensor([rank + 1.0])), largest_over_ranks(rank, torch.device("cpu"))
    return gather_rows(own), gather_rows(labels), [half_job(own, dtype) for dtype in HALVES], (total, largest)


def half_job(own: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gathered rows, and the gradient of a sum that weighs row i of all with i."""
    own = own.to(dtype).requires_grad_()
    rows = gather_rows(own)
    (rows * torch.arange(len(rows)).unsqueeze(1).to(dtype)).sum().backward()
    assert own.grad is not None
    return rows.detach(), own.grad


def train(name: str, dtype: torch.dtype, rank: int = 0, world: int = 1, shard: bool = False) -> History:
    """Loss and gradients of three steps on this rank's share of the rows, by DDP or FSDP2 (``shard``)."""
    model = network().to(dtype)
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    wrapped = DistributedDataParallel(model) if world > 1 and not shard else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rows, labels = data().to(dtype).split(shares(world))[rank], LABELS.split(shares(world))[rank]
    history = []
    for _ in range(3):
        loss = LOSSES[name](gather_rows(wrapped(rows)), gather_rows(labels))
        optimizer.zero_grad()
        loss.backward()
        history.append((loss.detach(), [whole(parameter.grad) for parameter in model.parameters()]))
        optimizer.step()
    return history


def whole(gradient: Tensor | None) -> Tensor:
    """A gradient, or all shards of it together."""
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


class Step(nn.Module):
    """The training step as forward pass, which is what DDP wraps."""

    def __init__(self, module: SimOModule) -> None:
        super().__init__()
        self.module = module
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]  # no trainer here

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.module.training_step((rows, labels), 0)["loss"]
        return loss


def train_in_parts(size: int | None, rank: int = 0, world: int = 1) -> History:
    """As ``train``, with a SimOModule of the given micro-batch size."""
    model: nn.Module = Step(SimOModule(network(), SimOLoss(), micro_batch_size=size).double())
    model = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rows, labels = data().split(shares(world))[rank], LABELS.split(shares(world))[rank]
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(rows, labels)
        loss.backward()
        history.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        optimizer.step()
    return history


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the size of the whole tensor."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def apart(history: History, wanted: History) -> float:
    """Largest error of a loss or gradient in a history."""
    pairs = [
        pair for (loss, gradients), (exact, expected) in zip(history, wanted, strict=True)
        for pair in zip([loss, *gradients], [exact, *expected], strict=True)
    ]  # fmt: skip
    return max(error(found, exact) for found, exact in pairs)


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of 2 or 4 real processes returned."""
    folder = tmp_path_factory.mktemp("ranks")
    assert start_ranks(request.param, run, request.param, folder) == [0] * request.param
    return saved(folder, "ranks", request.param)


def test_gathered_tensors_are_in_the_order_of_the_ranks_and_keep_their_dtype(results: list[Any]) -> None:
    for (rows, labels, halves, (total, largest)), _ in results:
        assert torch.equal(rows, data())
        assert torch.equal(labels, LABELS)
        for dtype, (half, _) in zip(HALVES, halves, strict=True):
            assert half.dtype == dtype
            assert torch.equal(half, data().to(dtype))
        assert total == sum(range(1, len(results) + 1))
        assert largest == len(results) - 1


def test_gradients_of_half_precision_keep_their_dtype(results: list[Any]) -> None:
    for index in range(len(HALVES)):
        gradients = torch.cat([halves[index][1] for (_, _, halves, _), _ in results])
        assert gradients.dtype == HALVES[index]
        # the sum over processes of the same gradient, in whole numbers that half precision holds
        expected = len(results) * torch.arange(16.0).unsqueeze(1).expand(16, 5)
        assert torch.equal(gradients.float(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_one_process(results: list[Any], name: str, dtype: torch.dtype) -> None:
    """Float64 to 1e-10; float32 errs against float64 at most four times as much as one process in float32 does."""
    exact = train(name, torch.float64)
    largest = max(apart(histories[name, dtype], exact) for _, histories in results)
    allowed = 1e-10 if dtype == torch.float64 else 4 * max(apart(train(name, dtype), exact), UNIT)
    print(f"largest relative error, {len(results)} processes, {name}, {dtype}: {largest:.1e}")  # pytest -rP shows it
    assert largest <= allowed


def test_sharded_weights_have_the_gradients_of_one_process(results: list[Any]) -> None:
    wanted = train("centroid softmax", torch.float64)
    largest = max(apart(histories["sharded"], wanted) for _, histories in results)
    print(f"largest relative error, {len(results)} processes, FSDP2: {largest:.1e}")
    assert largest <= 1e-10


def test_micro_batches_of_every_process_make_the_plain_step_of_one(results: list[Any]) -> None:
    largest = max(apart(histories["micro-batches"], train_in_parts(None)) for _, histories in results)
    print(f"largest relative error, {len(results)} processes, micro_batch_size 2: {largest:.1e}")
    assert largest <= 1e-10


def test_one_process_gathers_nothing() -> None:
    rows = data()
    assert gather_rows(rows) is rows
    assert sum_over_ranks(rows) is rows
