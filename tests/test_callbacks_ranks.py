"""Two real processes log and learn what one does with their rows together."""

from pathlib import Path

import pytest
import torch

from simo_lightning import SimOModule
from simo_lightning.callbacks import CollapseAlarm, GeometryMonitor, OnlineProbe
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.testing.trainers import small_trainer
from tests.callback_parts import Shares, layer
from tests.rank_processes import saved, start_ranks


def watch(folder: Path, world: int) -> None:
    probe, alarm = (
        OnlineProbe(lr=0.05, every_n_batches=1),
        CollapseAlarm(after_epochs=99, every_n_steps=3, min_separation=3.0),
    )
    options = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    options |= {"callbacks": [probe, alarm, GeometryMonitor(every_n_steps=4)], "use_distributed_sampler": False}
    run = small_trainer(folder, max_epochs=3, precision="64-true", **options)
    run.fit(SimOModule(layer().double()), Shares())
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    torch.save((values, probe.head.state_dict()), folder / f"watch{world}.{run.global_rank}.pt")


def test_two_processes_log_and_learn_what_one_does(tmp_path):
    watch(tmp_path, 1)
    assert start_ranks(2, watch, tmp_path, 2) == [0, 0]
    ((one, head),) = saved(tmp_path, "watch1", 1)
    (first, first_head), (second, second_head) = saved(tmp_path, "watch2", 2)
    names = [f"{stage}/{name}" for stage in ("train", "val") for name in [*GEOMETRY, "collapsed_classes"]]
    assert set(one) >= {*names, "val/probe"}
    assert one["train/collapsed_classes"] > 0
    assert 0 < one["val/probe"] < 1
    assert first == pytest.approx(one, rel=1e-6, nan_ok=True)
    assert second == pytest.approx(first, rel=1e-12, nan_ok=True)
    for name, weight in head.items():
        assert torch.equal(first_head[name], second_head[name])
        torch.testing.assert_close(first_head[name], weight, rtol=1e-5, atol=1e-6)
