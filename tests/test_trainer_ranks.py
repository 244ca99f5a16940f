from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
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


def train(
    folder: Path, data: Pairs, size: int | None = None, rate: float = 0.02, **arguments: Any
) -> dict[str, Tensor]:
    """Weights after two epochs."""
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet10", width=0.125, norm="group", embedding_dim=6)
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    trainer = small_trainer(folder, max_epochs=2, **arguments)
    module = SimOModule(encoder, optimizer=optimizer, micro_batch_size=size)
    trainer.fit(module, data)
    assert trainer.global_step == 8 * (2 if trainer.world_size == 1 and not isinstance(data, Joined) else 1)
    return module.state_dict()


def run(folder: Path) -> None:
    weights = {}
    for size in (None, 5):
        trained = train(folder, Pairs(), size, devices=2, strategy="ddp", precision="64-true")
        weights[size] = {name: weight.clone() for name, weight in trained.items()}
    rank = torch.distributed.get_rank()
    torch.save(weights, folder / f"ranks.{rank}.pt")


def test_two_processes_train_to_the_weights_of_one_with_their_batches_joined(tmp_path: Path) -> None:
    assert start_ranks(2, run, tmp_path) == [0, 0]
    wanted = train(tmp_path, Joined(), precision="64-true", reload_dataloaders_every_n_epochs=1)
    largest = 0.0
    for weights in saved(tmp_path, "ranks", 2):
        for size in (None, 5):
            for name, weight in weights[size].items():
                assert weight.dtype == torch.float64
                largest = max(largest, float((weight - wanted[name]).norm() / wanted[name].norm()))
    print(f"largest relative error of a weight after 8 steps: {largest:.1e}")  # pytest -rP shows it
    assert largest <= 1e-10


def test_fp16_with_a_gradient_scaler_under_the_trainer(tmp_path: Path) -> None:
    """By the plugin: the Trainer's flag "16-mixed" means bf16 on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)
    found = train(tmp_path, Pairs(), rate=1e-4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    wanted = train(tmp_path, Pairs(), rate=1e-4)
    assert scaler.get_scale() == 2.0**8  # 16 steps, none of which overflowed
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()
        assert (weight - wanted[name]).norm() <= 0.01 * wanted[name].norm() + 1e-3, name
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU"):
        assert small_trainer(tmp_path, precision="16-mixed").precision == "bf16-mixed"
