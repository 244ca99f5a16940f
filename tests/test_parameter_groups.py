"""Parameter groups: every parameter once, rates and weight decay of each part, kept by schedules and in checkpoints."""

import csv
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from simo_lightning import ImageEncoder, OneCycle, SimOModule
from simo_lightning.parameter_groups import ParameterGroups
from tests.checkpoint_parts import Flat, fit

MAKE = partial(AdamW, lr=0.01, weight_decay=0.05)


class Proxies(nn.Module):
    """A loss with parameters: cross-entropy to one vector per class."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.eye(10, 16))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(embeddings @ self.vectors.T, labels)


def digits(**arguments: Any) -> SimOModule:
    return SimOModule(ImageEncoder("resnet10", width=0.125, image_size=8, in_channels=1), **arguments)


def by_name(module: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The group of each parameter by its name; every parameter is in exactly one."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = [(names[parameter], group) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


def test_each_part_has_its_rate_and_weight_decay() -> None:
    module = SimOModule(ImageEncoder("resnet18", width=0.125), ArcFaceLoss(10, 16))
    choice = ParameterGroups(backbone_lr_factor=0.1, loss_lr_factor=20, loss_weight_decay=None)
    found = by_name(module, choice.optimizer(MAKE, module).param_groups)
    decays = {"encoder.backbone.conv1.weight": 0.05, "encoder.backbone.bn1.weight": 0, "encoder.backbone.bn1.bias": 0}
    for name, decay in decays.items():
        assert (found[name]["lr"], found[name]["weight_decay"]) == (pytest.approx(0.001), decay)
    assert (found["encoder.projector.weight"]["lr"], found["encoder.projector.weight"]["weight_decay"]) == (0.01, 0.05)
    assert (found["encoder.projector.bias"]["lr"], found["encoder.projector.bias"]["weight_decay"]) == (0.01, 0)
    assert (found["loss.W"]["lr"], found["loss.W"]["weight_decay"]) == (0.2, 0.05)
    assert by_name(module, ParameterGroups().groups(module))["loss.W"]["weight_decay"] == 0
    same = ParameterGroups(norm_weight_decay=None).groups(module)
    assert sorted(group["name"] for group in same) == ["backbone", "loss", "projector"]


def test_layer_decay_of_a_resnet_is_by_stage() -> None:
    module = SimOModule(ImageEncoder("resnet18", width=0.125))
    found = by_name(module, ParameterGroups(0.5, layer_decay=0.8).optimizer(MAKE, module).param_groups)
    for layer, name in enumerate(
        ["conv1", "layer1.0.conv1", "layer2.1.conv2", "layer3.0.downsample.0", "layer4.1.conv1"]
    ):
        group = found[f"encoder.backbone.{name}.weight"]
        assert group["lr"] == pytest.approx(0.01 * 0.5 * 0.8 ** (5 - layer))
        assert group["name"] == f"backbone/layer_{layer}"
    assert found["encoder.projector.weight"]["lr"] == 0.01


def test_layer_decay_of_timm_is_its_own() -> None:
    """Against timm.optim's param_groups_layer_decay, whose last layer is the head."""
    theirs = timm.create_model("test_vit", num_classes=10)
    expected = timm.optim.param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.7)
    names = {parameter: name for name, parameter in theirs.named_parameters()}
    wanted = {names[parameter]: group for group in expected for parameter in group["params"]}
    module = SimOModule(ImageEncoder("timm/test_vit"))
    found = by_name(module, ParameterGroups(layer_decay=0.7).optimizer(MAKE, module).param_groups)
    compared = 0
    for name, group in found.items():
        own = name.removeprefix("encoder.backbone.")
        if own.startswith(("blocks.", "patch_embed.", "cls_token", "pos_embed")):
            scale, decay = wanted[own]["lr_scale"], wanted[own]["weight_decay"]
            assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.01 * scale), decay), own
            compared += 1
    assert compared > 60


@pytest.mark.parametrize(
    ("name", "first", "middle", "last"),
    [
        ("convnext_tiny", "features.0.0", "features.5.3.block.0", "features.7.2.block.0"),
        ("mobilenet_v3_small", "features.0.0", "features.5.block.0.0", "classifier.0"),
        ("vit_b_32", "conv_proj", "encoder.layers.encoder_layer_4.mlp.0", "encoder.ln"),
    ],
)
def test_layers_of_other_backbones_follow_their_order(name: str, first: str, middle: str, last: str) -> None:
    with torch.device("meta"):
        encoder = ImageEncoder(name)
    module = SimOModule(encoder)
    found = by_name(module, ParameterGroups(layer_decay=0.9).groups(module))
    factors = [found[f"encoder.backbone.{each}.weight"]["lr_factor"] for each in (first, middle, last)]
    assert factors == sorted(factors)
    assert len(set(factors)) == 3
    if name == "vit_b_32":
        token = found["encoder.backbone.class_token"]
        assert (token["lr_factor"], token["weight_decay"]) == (min(group["lr_factor"] for group in found.values()), 0)


def test_the_default_is_one_group_and_spares_the_parameters_of_the_loss(tmp_path: Path) -> None:
    module = digits(optimizer=MAKE)
    fit(module, tmp_path, max_steps=1, limit_val_batches=0)
    assert len(module.optimizers().param_groups) == 1  # type: ignore[union-attr]
    module = digits(loss=Proxies(), optimizer=MAKE)
    fit(module, tmp_path, max_steps=1, limit_val_batches=0)
    groups = by_name(module, module.optimizers().param_groups)  # type: ignore[union-attr]
    assert {name: group["weight_decay"] for name, group in groups.items() if group["weight_decay"] != 0.05} == {
        "loss.vectors": 0
    }
    assert {group["lr"] for group in groups.values()} == {0.01}


SCHEDULES: dict[str, Any] = {
    "OneCycle": OneCycle,
    "OneCycleLR": partial(OneCycleLR, max_lr=0.02, total_steps=9),
    "CyclicLR": partial(CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=2, cycle_momentum=False),
    "constant": None,
}


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_keep_the_factors_and_rates_are_logged_by_name(schedule: str, tmp_path: Path) -> None:
    choice = ParameterGroups(backbone_lr_factor=0.1, loss_lr_factor=5)
    module = digits(loss=Proxies(), optimizer=MAKE, lr_scheduler=SCHEDULES[schedule], parameter_groups=choice)
    logger = CSVLogger(tmp_path)
    options = {
        "logger": logger,
        "log_every_n_steps": 1,
        "max_epochs": 3,
        "limit_train_batches": 3,
        "limit_val_batches": 0,
    }
    trainer = fit(module, tmp_path, callbacks=[LearningRateMonitor()], **options)
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key.startswith("lr-")} for row in csv.DictReader(file)]
    rates = [{key: float(value) for key, value in row.items()} for row in rows if all(row.values())]
    assert len(rates) >= 3
    for row in rates:
        peak = row["lr-AdamW/projector"]
        assert row["lr-AdamW/backbone"] == row["lr-AdamW/backbone/norm"] == pytest.approx(0.1 * peak)
        assert row["lr-AdamW/loss"] == pytest.approx(5 * peak)
    assert (len({row["lr-AdamW/projector"] for row in rates}) == 1) == (schedule == "constant")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert SimOModule.load_from_checkpoint(tmp_path / "a.ckpt", loss=Proxies()).parameter_groups == choice


def test_lars_takes_groups() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lars = pytest.importorskip("pl_bolts.optimizers.lars").LARS
    module = digits()
    optimizer = ParameterGroups(backbone_lr_factor=0.5).optimizer(partial(lars, lr=0.1, weight_decay=1e-4), module)
    before = module.encoder.projector.weight.clone()  # type: ignore[union-attr]
    module(torch.randn(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.05}
    assert not torch.equal(before, module.encoder.projector.weight)  # type: ignore[union-attr]


def test_frozen_parameters_are_left_out_and_other_encoders_work() -> None:
    module = digits()
    module.encoder.backbone.requires_grad_(False)  # type: ignore[union-attr]
    assert {group["name"] for group in ParameterGroups().groups(module)} == {"projector", "projector/norm"}
    plain = SimOModule(Flat())
    optimizer = ParameterGroups().optimizer(partial(SGD, lr=0.1, weight_decay=0.1), plain)
    found = by_name(plain, optimizer.param_groups)
    assert found["encoder.layers.1.weight"]["weight_decay"] == 0.1
    assert found["encoder.layers.1.bias"]["weight_decay"] == 0
    with pytest.raises(ValueError, match="need an encoder with a backbone, got Flat without it"):
        ParameterGroups(backbone_lr_factor=0.1).groups(plain)
    plain.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter must require a gradient, got none"):
        ParameterGroups().optimizer(MAKE, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_lr_factor": 0}, "backbone_lr_factor must be above 0, got 0; FreezeBackbone"),
        ({"loss_lr_factor": -1}, "loss_lr_factor must be above 0, got -1"),
        ({"layer_decay": 1.1}, r"layer_decay must lie in \(0, 1\], got 1.1"),
        ({"norm_weight_decay": -0.1}, "norm_weight_decay must be at least 0 or None, got -0.1"),
    ],
)
def test_wrong_arguments_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterGroups(**options)
