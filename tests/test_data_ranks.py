import json
import subprocess
import sys
from pathlib import Path

import torch

from simo_lightning.data import ClassBalancedSampler

SCRIPT = """
import json, os, sys, torch
from lightning.pytorch import LightningModule, Trainer
from simo_lightning.data import LabelledImages, TensorPairDataModule

def numbered(count):
    images = torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    return LabelledImages(images, torch.arange(count) % 4, list("abcd"))

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
        self.seen = {"train": [], "val": [], "bank": []}
    def numbers(self, batch):
        return (batch[0][:, 0, 0, 0] * 255).round().int().tolist()
    def training_step(self, batch, batch_idx):
        self.seen["train"].append(self.numbers(batch))
        return self.net(batch[0]).square().mean()
    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(self.numbers(batch))
        self.log("loss", self.net(batch[0]).square().mean(), sync_dist=True)
    def on_train_end(self):
        for images, _ in self.trainer.datamodule.bank_dataloader():
            self.seen["bank"].append(images[:, 0, 0, 0].tolist())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

if __name__ == "__main__":
    data = TensorPairDataModule(numbered(44), val=numbered(21), classes_per_batch=4, samples_per_class=2, augment=None,
                                eval_batch_size=10, mean=[0.0], std=[1.0])
    model = Model()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2,
                      logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0)
    trainer.fit(model, data)
    with open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w") as file:
        json.dump(model.seen, file)
"""


def test_ranks_share_an_epoch(tmp_path):
    """Two real processes, gloo, ``use_distributed_sampler`` as it comes; 21 images to validate, so shares differ."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    sampler = ClassBalancedSampler(torch.arange(44) % 4, 4, 2)
    for epoch in range(2):  # 5 blocks: the last finds no partner
        dealt = [block for step in range(2 * epoch, 2 * epoch + 2) for block in (rank["train"][step] for rank in seen)]
        assert dealt == sampler.epoch_blocks(epoch)[:4].tolist()
    assert len(seen[0]["train"]) == len(seen[1]["train"]) == 4
    assert len(seen[0]["val"]) == len(seen[1]["val"])
    for part, expected in (("val", [*range(21)] * 2), ("bank", range(44))):
        assert sorted(number for rank in seen for batch in rank[part] for number in batch) == sorted(expected)
