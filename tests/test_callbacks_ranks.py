"""Two real processes log and learn what one does with their rows together."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from simo_lightning import SimOModule
from simo_lightning.callbacks import CollapseAlarm, GeometryMonitor, OnlineProbe
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.testing.trainers import small_trainer
from tests.bounds import UNIT
from tests.callback_parts import Shares, assert_learned, layer
from tests.rank_processes import saved, start_ranks


class Trained(pl.Callback):
    """What the training steps returned."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx) -> None:
        self.batches.append((outputs["embeddings"], outputs["labels"]))


def train(folder: Path, world: int) -> None:
    probe, alarm = (
        OnlineProbe(lr=0.05, every_n_batches=1),
        CollapseAlarm(after_epochs=99, every_n_steps=3, min_separation=3.0),
    )
    options = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trained = Trained()
    options |= {
        "callbacks": [probe, alarm, GeometryMonitor(every_n_steps=4), trained],
        "use_distributed_sampler": False,
    }
    run = small_trainer(folder, max_epochs=3, precision="64-true", **options)
    run.fit(SimOModule(layer().double()), Shares())
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    torch.save((values, probe.head.state_dict(), trained.batches), folder / f"train{world}.{run.global_rank}.pt")


def test_two_processes_log_and_learn_what_one_does(tmp_path):
    train(tmp_path, 1)
    assert start_ranks(2, train, tmp_path, 2) == [0, 0]
    ((one, head, batches),) = saved(tmp_path, "train1", 1)
    (first, first_head, _), (second, second_head, _) = saved(tmp_path, "train2", 2)
    names = [f"{stage}/{name}" for stage in ("train", "val") for name in [*GEOMETRY, "collapsed_classes"]]
    assert set(one) >= {*names, "val/probe"}
    assert one["train/collapsed_classes"] > 0
    assert 0 < one["val/probe"] < 1
    assert first == pytest.approx(one, rel=UNIT, nan_ok=True)  # logged in float32
    assert second == pytest.approx(first, rel=1e-12, nan_ok=True)
    for weights in (head, first_head, second_head):
        linear = torch.nn.Linear(4, 3)
        linear.load_state_dict(weights)
        assert_learned(linear, batches, 0.05)
    assert all(torch.equal(first_head[name], second_head[name]) for name in head)
