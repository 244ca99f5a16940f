"""A backbone that is frozen in the first epochs: by this package's callback and by Lightning's, with exact resume."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch.optim.lr_scheduler import ExponentialLR

from simo_lightning import ImageEncoder, OneCycle, SimOModule
from simo_lightning.callbacks import FreezeBackbone
from simo_lightning.parameter_groups import ParameterGroups
from simo_lightning.schedules import check_finetuning
from tests.checkpoint_parts import Flat, fit, trainer

EPOCHS, THAW = 4, 2


def module(**arguments: Any) -> SimOModule:
    encoder = ImageEncoder("resnet10", width=0.125, image_size=8, in_channels=1)
    return SimOModule(encoder, lr_scheduler=OneCycle, **arguments)


def slow() -> BackboneFinetuning:
    return BackboneFinetuning(THAW, lambda_func=grows)


def grows(epoch: int) -> float:
    return 1.5


class Snapshots(pl.Callback):
    """The backbone's tensors at the start of each epoch and at the end."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append({name: each.clone() for name, each in pl_module.backbone.state_dict().items()})  # type: ignore

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)


def run(
    folder: Path, callback: pl.Callback, last: Path | None = None, **arguments: Any
) -> tuple[SimOModule, Snapshots]:
    seed_everything(0)
    trained, snapshots = module(**arguments), Snapshots()
    each_epoch = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callbacks = [callback, snapshots, each_epoch]
    few = {"limit_train_batches": 3, "limit_val_batches": 0}
    fit(trained, folder, last, max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True, **few)
    return trained, snapshots


def assert_same(first: SimOModule, second: SimOModule) -> None:
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:The provided params to be frozen already")
@pytest.mark.parametrize("make", [lambda: FreezeBackbone(THAW), slow], ids=["FreezeBackbone", "BackboneFinetuning"])
def test_a_frozen_backbone_is_trained_later_and_a_resumed_run_is_the_same(make: Any, tmp_path: Path) -> None:
    whole, snapshots = run(tmp_path / "whole", make())
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before if name.endswith("conv1.weight"))
        for before, after in zip(snapshots.seen, snapshots.seen[1:], strict=False)
    ]
    assert moved == [False] * THAW + [True] * (EPOCHS - THAW)
    for stopped in range(EPOCHS - 1):  # before, at and after the epoch of the change
        again, _ = run(tmp_path / f"again{stopped}", make(), tmp_path / "whole" / f"epoch={stopped}.ckpt")
        assert_same(whole, again)
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_running_statistics_of_a_frozen_backbone_stay(tmp_path: Path) -> None:
    _, snapshots = run(tmp_path, FreezeBackbone(THAW), parameter_groups=ParameterGroups(0.1, layer_decay=0.9))
    first, second, thawed, last, _ = snapshots.seen
    for name in first:
        assert torch.equal(first[name], thawed[name]), name
        if name.endswith("running_mean"):
            assert not torch.equal(thawed[name], last[name]), name
    assert second.keys() == first.keys()


def test_what_cannot_be_frozen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs must be at least 0, or None for the whole run, got -1"):
        FreezeBackbone(-1)
    with pytest.raises(ValueError, match="FreezeBackbone needs a module with a backbone, got SimOModule without it"):
        fit(SimOModule(Flat()), tmp_path, callbacks=[FreezeBackbone()])
    encoder = ImageEncoder("resnet10", width=0.125, image_size=8, in_channels=1, embedding_dim=None, projector="none")
    with pytest.raises(ValueError, match="FreezeBackbone needs parameters outside of the backbone"):
        fit(SimOModule(encoder), tmp_path, callbacks=[FreezeBackbone()])
    two = trainer(tmp_path, strategy="ddp", devices=2, callbacks=[slow()])
    with pytest.raises(ValueError, match=r"BackboneFinetuning needs a single process, .* got 2"):
        check_finetuning(two, None)
    other = SimOModule(module().encoder, lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9))
    with pytest.raises(ValueError, match="BackboneFinetuning adds a parameter group, which the schedule must allow"):
        fit(other, tmp_path, callbacks=[slow()])


def test_a_schedule_may_be_made_by_a_function_as_by_the_command(tmp_path: Path) -> None:
    trained = SimOModule(module().encoder, lr_scheduler=lambda optimizer: OneCycle(optimizer))
    fit(trained, tmp_path, max_epochs=1, callbacks=[slow()])
    assert trained.trainer.global_step > 0
