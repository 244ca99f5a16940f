"""Image encoders: a torchvision backbone (or any module) without its classifier, and a projector to the embedding."""

import difflib
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from simo_lightning.class_paths import InitArgumentsMixin

Norm = Literal["batch", "layer", "group"]
Stem = Literal["imagenet", "small", "small_stride2"]

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class ImageEncoder(InitArgumentsMixin, nn.Module):
    """Images to embeddings: ``projector(backbone(images))``.

    The classifier of a torchvision backbone (its last ``nn.Linear``) is removed; its inputs are the features.

    Args:
        backbone: A ResNet (resnet10, 18, 34, 50, 101, 152), any other torchvision classification model by name, built
            without trained weights, or a module that maps images to features ``(N, F)`` or ``(N, F, 1, 1)``.
        embedding_dim: Dimension D of the embeddings; None for that of the features.
        projector: Maps features to embeddings. none: the identity; linear: one linear layer; mlp: linear, norm, ReLU,
            linear.
        hidden_dim: Width inside the mlp projector; None for that of the features.
        norm: Normalisation of the backbone and the mlp projector. batch: BatchNorm; layer: LayerNorm over channels and
            positions, the paper's choice; group: GroupNorm with 32 groups, or the largest smaller number that divides
            the channels. None: the backbone's own.
        stem: First layers of a ResNet. imagenet: torchvision's, stride 4 in all; small: one 3 x 3 convolution of stride
            1, for images of about 32 pixels; small_stride2: the same with stride 2, a quarter of the work. None: small
            for a ResNet; other backbones have their own.
        width: Multiplier of all channels of a ResNet, such as 0.5 for 32 to 256 instead of 64 to 512.
        in_channels: Channels of the images.
        feature_dim: F of a backbone given as a module; None for its attribute ``feature_dim``.

    Raises:
        ValueError: If an argument does not fit another one or the backbone.

    Example:
        >>> import torch
        >>> encoder = ImageEncoder("resnet10", embedding_dim=16, width=0.25, stem="small_stride2")
        >>> encoder.feature_dim, encoder(torch.zeros(2, 3, 32, 32)).shape
        (128, torch.Size([2, 16]))

    Source:
        The paper (arXiv 2410.05233) trains a ResNet-18 with LayerNorm and, as we recall it, D = 16. The axes of its
        LayerNorm are not public; ours is GroupNorm with one group, over channels and positions. The stem "small" is
        the usual one for CIFAR (He et al., arXiv 1512.03385, and SimCLR, arXiv 2002.05709, B.9).
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        embedding_dim: int | None = 16,
        projector: Literal["none", "linear", "mlp"] = "linear",
        hidden_dim: int | None = None,
        norm: Norm | None = None,
        stem: Stem | None = None,
        width: float = 1.0,
        in_channels: int = 3,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("norm", norm, (None, "batch", "layer", "group"))
        _check_choice("stem", stem, (None, "imagenet", "small", "small_stride2"))
        for name, value in (("embedding_dim", embedding_dim), ("hidden_dim", hidden_dim), ("in_channels", in_channels)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels: int | None = in_channels
        self.min_size = (1, 1)
        if isinstance(backbone, nn.Module):
            _refuse("a backbone given as a module", stem=stem, width=width, in_channels=in_channels)
            self.in_channels = None  # unknown for a module
            self.backbone, self.feature_dim = backbone, _declared_feature_dim(backbone, feature_dim)
        else:
            if feature_dim is not None:
                raise ValueError(f"feature_dim is only for a backbone given as a module, got {feature_dim}")
            model, self.min_size = _named_backbone(backbone, norm, stem, width, in_channels)
            self.backbone, self.feature_dim = _without_classifier(model, backbone)
        self.embedding_dim = self.feature_dim if embedding_dim is None else embedding_dim
        self.projector = _projector(projector, self.feature_dim, self.embedding_dim, hidden_dim, norm)

    def features(self, images: Tensor) -> Tensor:
        """Outputs of the backbone, before the projector.

        Args:
            images: Float tensor ``(N, in_channels, H, W)``.

        Returns:
            Features ``(N, feature_dim)``.

        Raises:
            ValueError: If the images have another shape or are too small for the backbone, or the backbone does not
                return ``feature_dim`` features per image.
        """
        if self.in_channels is not None and (images.ndim != 4 or images.shape[1] != self.in_channels):
            raise ValueError(f"images must have shape (N, {self.in_channels}, H, W), got {tuple(images.shape)}")
        try:
            features = self.backbone(images)
        except (AssertionError, RuntimeError) as error:
            if images.shape[-2] >= self.min_size[0] and images.shape[-1] >= self.min_size[1]:
                raise
            raise ValueError(
                f"images must be at least {self.min_size[0]} x {self.min_size[1]} pixels for this backbone, "
                f"got {images.shape[-2]} x {images.shape[-1]}"
            ) from error
        if isinstance(features, Tensor) and features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.feature_dim:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"backbone must return features of shape (N, feature_dim={self.feature_dim}), got {got}")
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images: Float tensor ``(N, in_channels, H, W)``.

        Returns:
            Embeddings ``(N, embedding_dim)``, not normalised.

        Raises:
            ValueError: As :meth:`features`.
        """
        return self.projector(self.features(images))


class _PlainResNet(ResNet):
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
        super().__init__(block, layers, norm_layer=_norm_layer(norm or "batch"))
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


def _norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    if norm == "batch":
        return nn.BatchNorm2d
    return partial(nn.GroupNorm, 1) if norm == "layer" else _group_norm


def _named_backbone(
    name: str, norm: Norm | None, stem: Stem | None, width: float, in_channels: int
) -> tuple[nn.Module, tuple[int, int]]:
    """The model with its classifier, and the smallest height and width of its images."""
    if name in _RESNETS:
        return _PlainResNet(*_RESNETS[name], norm, stem or "small", width, in_channels), (1, 1)
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *_RESNETS], n=3)
        raise ValueError(
            f"backbone must be a module, one of {', '.join(_RESNETS)}, or a classification model of torchvision, "
            f"got {name!r}" + (f"; do you mean {' or '.join(near)}?" if near else "")
        )
    _refuse(f"backbone {name!r}, which is not one of {', '.join(_RESNETS)}", stem=stem, width=width)
    model = models.get_model(name, weights=None, **_quiet(name))
    if norm is not None:
        model = _with_norm(model, name, norm)
    if in_channels != 3:
        _replace_first_conv(model, in_channels)
    return model, models.get_model_weights(name)["DEFAULT"].meta["min_size"]


def _quiet(name: str) -> dict[str, bool]:
    """Arguments that avoid a warning, or more than one output in training."""
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _with_norm(model: nn.Module, name: str, norm: Norm) -> nn.Module:
    """The model if it has this norm, else a new one with it."""
    refusal = f"norm={norm!r} does not fit backbone {name!r}: leave norm None, or take one of {', '.join(_RESNETS)}"
    if not _has_batch_norm(model):  # it has none, or it normalises tokens or channels in the last dimension
        raise ValueError(refusal)
    if norm == "batch":
        return model
    try:
        model = models.get_model(name, weights=None, norm_layer=_norm_layer(norm), **_quiet(name))
    except TypeError as error:
        raise ValueError(refusal) from error
    if _has_batch_norm(model):
        raise ValueError(refusal)
    return model


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    """Replace the model's first convolution by one for this number of channels, with the same initial scale."""
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = deepcopy(old)
    new.in_channels = in_channels
    new.weight = nn.Parameter(old.weight.new_empty(old.out_channels, in_channels, *old.kernel_size))
    nn.init.normal_(new.weight, std=float(old.weight.detach().std()))
    model.set_submodule(name, new)


def _without_classifier(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """The model without its last linear layer, and the number of inputs of that layer."""
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"backbone {name!r} has no linear classifier to remove; give the backbone as a module")
    path, classifier = linear[-1]
    model.set_submodule(path, nn.Identity())
    return model, classifier.in_features


def _declared_feature_dim(backbone: nn.Module, feature_dim: int | None) -> int:
    found = getattr(backbone, "feature_dim", None) if feature_dim is None else feature_dim
    if not isinstance(found, int) or found < 1:
        raise ValueError(
            f"feature_dim, the features per image, must be given for a backbone without that attribute, got {found!r} "
            f"for {type(backbone).__name__}"
        )
    return found


def _projector(kind: str, features: int, embedding: int, hidden: int | None, norm: Norm | None) -> nn.Module:
    _check_choice("projector", kind, ("none", "linear", "mlp"))
    if hidden is not None and kind != "mlp":
        raise ValueError(f"hidden_dim is only for projector='mlp', got hidden_dim={hidden} with projector={kind!r}")
    if kind == "none":
        if embedding != features:
            raise ValueError(
                f"projector='none' returns the {features} features unchanged: embedding_dim must be {features} or "
                f"None, got {embedding}"
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, embedding)
    hidden = features if hidden is None else hidden
    middle = nn.BatchNorm1d(hidden) if norm in (None, "batch") else _norm_layer(norm)(hidden)
    return nn.Sequential(nn.Linear(features, hidden), middle, nn.ReLU(inplace=True), nn.Linear(hidden, embedding))


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _refuse(backbone: str, stem: str | None, width: float, in_channels: int = 3) -> None:
    """Raise if an argument was set that applies only to the ResNets of this file."""
    for name, value, default in (("stem", stem, None), ("width", width, 1.0), ("in_channels", in_channels, 3)):
        if value != default:
            raise ValueError(f"{name} must be left at {default} for {backbone}, got {value!r}")
