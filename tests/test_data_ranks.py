import json
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from simo_lightning.data import ClassBalancedSampler, LabelledImages, TensorPairDataModule
from tests.rank_processes import start_ranks

CASES = list(product((True, False), (0, 1)))  # use_distributed_sampler, workers


def numbered(count: int) -> LabelledImages:
    images = torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    return LabelledImages(images, torch.arange(count) % 4, list("abcd"))


class Model(pl.LightningModule):
    """Remembers the numbers of the images that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "bank": []}

    def numbers(self, batch: Any) -> list[int]:
        return (batch[0][:, 0, 0, 0] * 255).round().int().tolist()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(self.numbers(batch))
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(self.numbers(batch))
        self.log("loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def on_train_end(self) -> None:
        for images, _ in self.trainer.datamodule.bank_dataloader():  # type: ignore[attr-defined]
            self.seen["bank"].append(images[:, 0, 0, 0].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(folder: Path) -> None:
    """A fit of two epochs for each case; 21 images to validate, so that the ranks' shares differ."""
    for use, workers in CASES:
        data = TensorPairDataModule(
            numbered(44), val=numbered(21), classes_per_batch=4, samples_per_class=2, augment=None, eval_batch_size=10,
            mean=[0.0], std=[1.0], num_workers=workers,
        )  # fmt: skip
        model = Model()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=use,
        )  # fmt: skip
        trainer.fit(model, data)
        (folder / f"{use}.{workers}.{trainer.global_rank}.json").write_text(json.dumps(model.seen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    assert start_ranks(2, run, folder) == [0, 0]
    return folder


@pytest.mark.parametrize("use, workers", CASES)
def test_ranks_share_an_epoch(folder: Path, use: bool, workers: int) -> None:
    """Two real processes, gloo; whatever ``use_distributed_sampler`` says, with persistent workers and without."""
    seen = [json.loads((folder / f"{use}.{workers}.{rank}.json").read_text()) for rank in range(2)]
    labels = torch.arange(44) % 4
    sampler = ClassBalancedSampler(labels, 4, 2)
    for epoch in range(2):  # 5 blocks: the last finds no partner
        dealt = [block for step in range(2 * epoch, 2 * epoch + 2) for block in (rank["train"][step] for rank in seen)]
        assert dealt == sampler.epoch_blocks(epoch)[:4].tolist()
        assert len({number for block in dealt for number in block}) == 4 * 8
        assert all(labels[block].bincount().tolist() == [2, 2, 2, 2] for block in dealt)
    assert len(seen[0]["train"]) == len(seen[1]["train"]) == 4
    assert len(seen[0]["val"]) == len(seen[1]["val"])
    for part, expected in (("val", [*range(21)] * 2), ("bank", range(44))):
        assert sorted(number for rank in seen for batch in rank[part] for number in batch) == sorted(expected)
