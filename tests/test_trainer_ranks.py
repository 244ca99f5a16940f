from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from simo_lightning import ImageEncoder, SimOModule
from simo_lightning.data import ClassBalancedSampler, LabelledImages, TensorPairDataModule
from simo_lightning.testing.trainers import small_trainer
from tests.rank_processes import saved, start_ranks


class Pairs(TensorPairDataModule):
    """128 images: 4 batches an epoch on each of 2 processes."""

    def __init__(self, **arguments: Any) -> None:
        pixels = torch.randint(256, (128, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        images = LabelledImages(pixels, torch.arange(128) % 4, list("abcd"))
        super().__init__(images, classes_per_batch=4, samples_per_class=4, val_fraction=0, augment=None, **arguments)


class Joined(Pairs):
    """The batches of two processes, each pair of them as one."""

    def train_dataloader(self) -> DataLoader:  # type: ignore[override]
        source = self._need("train")
        sampler = ClassBalancedSampler(source.labels, 4, 4)
        assert self.trainer is not None
        blocks = sampler.epoch_blocks(self.trainer.current_epoch).reshape(-1, 2 * sampler.batch_size)
        batches = [source.__getitems__(block.tolist()) for block in blocks]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Sharded(SimOModule):
    """Spreads the encoder's weights over the processes where the strategy is Lightning's for that (FSDP2)."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])


def train(
    folder: Path, data: Pairs, size: int | None = None, rate: float = 0.02, **arguments: Any
) -> dict[str, Tensor]:
    """Weights after two epochs."""
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", norm="group", embedding_dim=6)
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    trainer = small_trainer(folder, max_epochs=2, **arguments)
    module = Sharded(encoder, optimizer=optimizer, micro_batch_size=size)
    if isinstance(arguments.get("strategy"), ModelParallelStrategy):
        module = module.double()  # it knows no precision="64-true"
    trainer.fit(module, data)
    assert trainer.global_step == 8 * (2 if trainer.world_size == 1 and not isinstance(data, Joined) else 1)
    return {name: whole(weight) for name, weight in module.state_dict().items()}


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()


def run(folder: Path) -> None:
    weights = {
        f"DDP, micro_batch_size {size}": train(folder, Pairs(), size, devices=2, strategy="ddp", precision="64-true")
        for size in (None, 5)
    }
    sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    weights["FSDP2"] = train(folder, Pairs(), devices=2, strategy=sharding)
    rank = torch.distributed.get_rank()
    torch.save(weights, folder / f"ranks.{rank}.pt")


def test_two_processes_train_to_the_weights_of_one_with_their_batches_joined(tmp_path: Path) -> None:
    assert start_ranks(2, run, tmp_path) == [0, 0]
    wanted = train(tmp_path, Joined(), precision="64-true", reload_dataloaders_every_n_epochs=1)
    for runs in saved(tmp_path, "ranks", 2):
        for kind, weights in runs.items():
            assert {weight.dtype for weight in weights.values()} == {torch.float64}
            largest = max(float((weights[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
            print(f"largest relative error of a weight after 8 steps, {kind}: {largest:.1e}")  # pytest -rP shows it
            assert largest <= 1e-10


def test_fp16_with_a_gradient_scaler_under_the_trainer(tmp_path: Path) -> None:
    """By the plugin: the Trainer's flag "16-mixed" means bf16 on the CPU. bf16 has three bits less than fp16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)
    found = train(tmp_path, Pairs(), rate=1e-4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 2.0**8  # 16 steps, none of which overflowed
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    exact = train(tmp_path, Pairs(), rate=1e-4, precision="64-true")
    coarse = train(tmp_path, Pairs(), rate=1e-4, precision="bf16-mixed")

    def error(weights: dict[str, Tensor]) -> float:
        return float(torch.stack([(weights[name].double() - exact[name]).norm() for name in exact]).norm())

    assert error(found) <= error(coarse)
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU"):
        assert small_trainer(tmp_path, precision="16-mixed").precision == "bf16-mixed"
