"""The loss of all processes from sums over each class, without gathering the embeddings."""

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
from torch.nn.parallel import DistributedDataParallel

from simo_lightning import SimOLoss, SimOModule
from simo_lightning.distributed import total_over_ranks, world_size
from tests.bounds import UNIT
from tests.rank_processes import saved, start_ranks
from tests.test_distributed import LABELS, Step, apart, data, network, whole

# Rows of each rank: unequal, and none on two of eight. Class 9 has its only two rows on one rank.
SHARES = {1: [16], 2: [5, 11], 4: [3, 8, 1, 4], 8: [3, 0, 5, 1, 4, 2, 0, 1]}
FORMS = [(level, form) for level in ("group", "class", "centroid") for form in ("ratio", "log")]
LOSSES = {
    f"{level} {form}": SimOLoss(level, form, eps=0.1, dissimilar_weight=1.0, mean_weight=0.5)
    for level, form in [*FORMS, ("centroid", "softmax")]
} | {"default": SimOLoss(), "paper": SimOLoss.paper()}
DTYPES = [torch.float64, torch.float32]
History = list[tuple[Tensor, list[Tensor]]]


def train(name: str, dtype: torch.dtype, rank: int = 0, world: int = 1, shard: bool = False) -> History:
    """Loss and gradients of two steps on this rank's rows; on one process those of the plain loss."""
    model = network().to(dtype)
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    wrapped = DistributedDataParallel(model) if world > 1 and not shard else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rows, labels = data().to(dtype).split(SHARES[world])[rank], LABELS.split(SHARES[world])[rank]
    history = []
    for _ in range(2):
        embeddings = wrapped(rows)
        if world == 1:
            loss = LOSSES[name](embeddings, labels)
        else:
            loss = sum(LOSSES[name].terms_over_ranks(embeddings, labels, "sums").values(), torch.tensor(0.0))
        optimizer.zero_grad()
        loss.backward()
        history.append((loss.detach(), [whole(parameter.grad) for parameter in model.parameters()]))
        optimizer.step()
    return history


def step(module: SimOModule, rank: int, world: int) -> tuple[Tensor, list[Tensor]]:
    model: nn.Module = DistributedDataParallel(Step(module)) if world > 1 else Step(module)
    loss = model(data().split(SHARES[world])[rank], LABELS.split(SHARES[world])[rank])
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def module(**arguments: Any) -> SimOModule:
    return SimOModule(network(), **{"loss": SimOLoss(), **arguments}).double()


class Doubled(SimOLoss):
    """A user's loss, which sees the global batch."""

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {name: 2 * term for name, term in super().terms(embeddings, labels).items()}


OF_EIGHT = ["group ratio", "class log", "default"]  # one of each level: two cores are slow to run eight processes


def cases(world: int) -> list[tuple[str, torch.dtype]]:
    return [(name, torch.float64) for name in OF_EIGHT] if world == 8 else list(itertools.product(LOSSES, DTYPES))


def other_jobs(trained: dict[Any, Any], rank: int, world: int) -> dict[str, int]:
    """FSDP2, the training step of a module, and what is refused; returns the rows that are gathered at each level."""
    trained["sharded"] = train("default", torch.float64, rank, world, shard=True)
    # 4 classes of 16 rows in 3 dimensions: sums send less at the level centroid only
    sent = {}
    for level in ("centroid", "class", "pair"):
        with Collectives() as collectives:
            step(module(loss=SimOLoss(level)), rank, world)
        sent[level] = collectives.gathered_rows
    for name, arguments in {
        "micro-batches": {"micro_batch_size": 2, "reduce": "sums"},
        "own terms": {"loss": Doubled()},
        "another loss": {"loss": SupConLoss()},
        "gather": {"reduce": "gather"},
    }.items():
        trained[name] = step(module(**arguments), rank, world)
    trained["errors"] = [error_of(rank, world, loss, reduce, rows) for loss, reduce, rows in REFUSED]
    return sent


def run(world: int, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    trained: dict[Any, Any] = {key: train(*key, rank, world) for key in cases(world)}
    sent = {} if world == 8 else other_jobs(trained, rank, world)
    torch.save((trained, sent), folder / f"ranks.{rank}.pt")
    dist.destroy_process_group()


class Collectives:
    """Counts the floating-point rows of embeddings that are gathered."""

    def __enter__(self) -> "Collectives":
        self.gathered_rows = 0
        self.original = dist.all_gather

        def counted(parts: list[Tensor], own: Tensor) -> None:
            self.original(parts, own)
            if own.is_floating_point():
                self.gathered_rows += sum(map(len, parts))

        dist.all_gather = counted
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_gather = self.original


BROKEN = data()
BROKEN[2, 1] = torch.nan  # on the first rank of two and of four
REFUSED = [
    (SimOLoss("pair"), "sums", data()),
    (SupConLoss(), "sums", data()),
    (Doubled(), "sums", data()),
    (SimOLoss(), "auto", BROKEN),
]


def error_of(rank: int, world: int, loss: nn.Module, reduce: Any, rows: Tensor) -> str:
    own, labels = rows.split(SHARES[world])[rank], LABELS.split(SHARES[world])[rank]
    try:
        Step(SimOModule(nn.Identity(), loss, reduce=reduce).double())(own, labels)
    except ValueError as error:
        return str(error)
    return "none"


def results_of(world: int, folder: Path) -> list[Any]:
    """What each of the processes returned."""
    assert start_ranks(world, run, world, folder) == [0] * world
    return saved(folder, "ranks", world)


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results_of_eight(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of(8, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_one_process(results: list[Any], name: str, dtype: torch.dtype) -> None:
    """Float64 to 1e-10; float32 errs against float64 at most four times as much as one process in float32 does."""
    exact = train(name, torch.float64)
    largest = max(apart(trained[name, dtype], exact) for trained, _ in results)
    allowed = 1e-10 if dtype == torch.float64 else 4 * max(apart(train(name, dtype), exact), UNIT)
    print(f"largest relative error, {len(results)} processes, {name}, {dtype}: {largest:.1e}")  # pytest -rP shows it
    assert largest <= allowed


@pytest.mark.slow  # eight processes import torch
@pytest.mark.parametrize("name", OF_EIGHT)
def test_eight_processes_of_which_two_have_no_rows(results_of_eight: list[Any], name: str) -> None:
    exact = train(name, torch.float64)
    largest = max(apart(trained[name, torch.float64], exact) for trained, _ in results_of_eight)
    print(f"largest relative error, 8 processes, {name}, {torch.float64}: {largest:.1e}")
    assert largest <= 1e-10


def test_sharded_weights_have_the_gradients_of_one_process(results: list[Any]) -> None:
    wanted = train("default", torch.float64)
    assert max(apart(trained["sharded"], wanted) for trained, _ in results) <= 1e-10


@pytest.mark.parametrize("name", ["micro-batches", "own terms", "another loss", "gather"])
def test_a_training_step_is_that_of_one_process(results: list[Any], name: str) -> None:
    loss = {"own terms": Doubled(), "another loss": SupConLoss()}.get(name, SimOLoss())
    wanted = step(module(loss=loss), 0, 1)
    for trained, _ in results:
        assert apart([trained[name]], [wanted]) <= 1e-10


def test_sums_are_chosen_where_they_are_fewer_bytes(results: list[Any]) -> None:
    """4 bytes of 4 classes twice forward and back against 16 rows three times; at the level class 4 x 3 x 3 more."""
    for _, sent in results:
        assert sent["centroid"] == 0
        assert sent["class"] >= 16
        assert sent["pair"] >= 16


def test_what_cannot_be_followed_is_refused_on_every_process(results: list[Any]) -> None:
    for rank, (trained, _) in enumerate(results):
        pair, other, own, broken = trained["errors"]
        assert pair.endswith("reduce='sums' requires level centroid, class or group and no compile(), got level 'pair'")
        assert "got SupConLoss in SimOModule" in other
        assert "got Doubled in SimOModule" in own
        here = "got nan or inf in 1 of" if rank == 0 else "got nan or inf on another process"
        assert here in broken


def test_one_process_adds_nothing_up() -> None:
    rows = data()
    assert world_size() == 1
    assert total_over_ranks(rows) is rows
    loss = LOSSES["default"]
    wanted = loss.terms(rows, LABELS)
    for name, term in loss.terms_over_ranks(rows, LABELS, "sums").items():
        assert float((term - wanted[name]).abs()) <= 1e-14


def test_reduce_is_checked() -> None:
    with pytest.raises(ValueError, match="reduce must be one of auto, gather, sums, got 'mean'"):
        SimOModule(network(), reduce="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce must be one of auto, gather, sums, got 'mean'"):
        SimOLoss().terms_over_ranks(data(), LABELS, "mean")  # type: ignore[arg-type]
