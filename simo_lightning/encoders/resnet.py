"""torchvision's ResNets with scaled channels, a choice of stem and norm, and any number of input channels."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

Norm = Literal["batch", "layer", "group"]
Stem = Literal["imagenet", "small", "small_stride2"]

RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class PlainResNet(ResNet):
    """torchvision's ResNet with scaled channels, a choice of stem and any number of input channels."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        norm: Norm | None,
        stem: Stem,
        width: float,
        in_channels: int,
    ) -> None:
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        self.width = width  # _make_layer, called by the constructor, reads it
        super().__init__(block, layers, norm_layer=norm_layer(norm or "batch"))
        channels = self._scaled(64)
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small_stride2": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = self._norm_layer(channels)
        if stem != "imagenet":
            self.maxpool = nn.Identity()
        self.fc = nn.Linear(self.inplanes, 1)  # gives the number of features; ImageEncoder removes it

    def _scaled(self, channels: int) -> int:
        return max(1, round(channels * self.width))

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if not hasattr(self, "layer1"):
            self.inplanes = self._scaled(64)  # channels of the stem
        return super()._make_layer(block, self._scaled(planes), blocks, stride, dilate)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(next(groups for groups in range(32, 0, -1) if channels % groups == 0), channels)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Maps a number of channels to a layer."""
    if norm == "batch":
        return nn.BatchNorm2d
    return partial(nn.GroupNorm, 1) if norm == "layer" else _group_norm
