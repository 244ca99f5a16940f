"""Backbones by name, without their classifiers: this package's ResNets and torchvision's classification models."""

import difflib
import re
from copy import deepcopy
from typing import Any, NamedTuple

from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from simo_lightning.class_paths import weights_are_read
from simo_lightning.encoders.resnet import RESNETS, Norm, PlainResNet, Stem, norm_layer
from simo_lightning.encoders.weights import cached_download, is_file_name, load_file, load_named, stem_kernel
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.tensor_files import read_tensors

_INCEPTIONS = ("googlenet", "inception_v3")


class Backbone(NamedTuple):
    """A backbone without its classifier."""

    module: nn.Module
    feature_dim: int
    min_size: tuple[int, int] = (1, 1)  # of images, height and width
    preprocessing: Preprocessing | None = None  # of its trained weights
    stem: Stem | None = None  # of a ResNet


class Request(NamedTuple):
    """What is asked of a backbone; see ImageEncoder."""

    name: str
    weights: str | None = None
    image_size: int | None = None
    norm: Norm | None = None
    stem: Stem | None = None
    width: float = 1.0
    in_channels: int = 3

    @property
    def file(self) -> str | None:
        """Path of the weights, if they are a file."""
        return self.weights if self.weights is not None and is_file_name(self.weights) else None


def named_backbone(request: Request) -> Backbone:
    """Build a backbone, with its weights if they are asked for.

    Args:
        request: Its name and arguments.

    Returns:
        The backbone.

    Raises:
        ValueError: If an argument does not fit the backbone, or the weights are not found or do not fit.
    """
    if request.name.startswith("timm/"):
        from simo_lightning.encoders.timm_models import timm_backbone

        return timm_backbone(request)
    known = models.list_models(module=models)
    if request.name not in known and request.name not in RESNETS:
        near = difflib.get_close_matches(request.name, [*known, *RESNETS], n=3)
        raise ValueError(
            f"backbone must be a module, one of {', '.join(RESNETS)}, a classification model of torchvision, or "
            f"timm/NAME, got {request.name!r}" + (f"; do you mean {' or '.join(near)}?" if near else "")
        )
    # of a local file the preprocessing is not known: that of the backbone's usual weights is taken
    found = _torchvision_weights(request.name, None if request.file else request.weights)
    if request.file is None and request.norm not in (None, "batch") and request.weights is not None:
        raise ValueError(f"norm must be None or 'batch' with weights {request.weights!r}, got {request.norm!r}")
    if request.name in RESNETS:
        model, stem = _resnet(request)
        min_size = (1, 1)
    else:
        refuse(f"backbone {request.name!r}, which is not one of {', '.join(RESNETS)}", request.stem, request.width)
        model, stem = _torchvision_model(request), None
        min_size = found.meta["min_size"]
        if request.image_size is not None and _is_of_one_size(request.name):
            min_size = (request.image_size, request.image_size)
    backbone, feature_dim, classifier = _without_classifier(model, request.name)
    if request.file is not None and weights_are_read():
        load_file(backbone, request.file, request.name, [classifier])
    preprocessing = None
    if request.weights is not None and found is not None:
        preprocessing = _preprocessing(request.name, found, request.in_channels)
    elif _is_of_one_size(request.name) and request.in_channels in (1, 3):
        preprocessing = Preprocessing(min_size, channels=request.in_channels)
    return Backbone(backbone, feature_dim, min_size, preprocessing, stem)


def _torchvision_weights(name: str, weights: str | None) -> Any:
    """The entry of torchvision's table of weights; the default one for None, which a ResNet-10 lacks."""
    if name not in models.list_models(module=models):
        if weights is None:
            return None
        raise ValueError(
            f"weights of {name} must be a file (.safetensors, .pth), as none are published, got {weights!r}"
        )
    table: Any = models.get_model_weights(name)
    family, _, tag = ("DEFAULT" if weights is None else weights).rpartition(".")
    if family not in ("", table.__name__) or tag not in table.__members__:
        known = ", ".join(dict.fromkeys(["DEFAULT", *(each.name for each in table)]))
        raise ValueError(f"weights of {name} must be {known} or a file (.safetensors, .pth), got {weights!r}")
    return table[tag]


def _resnet(request: Request) -> tuple[nn.Module, Stem]:
    stem: Stem = request.stem or _default_stem(request)
    model = PlainResNet(*RESNETS[request.name], request.norm, stem, request.width, request.in_channels)
    if request.weights is not None and request.file is None:
        if request.width != 1 or stem != "imagenet":
            raise ValueError(
                f"weights {request.weights!r} need width 1 and stem 'imagenet', got width={request.width} and "
                f"stem={stem!r}"
            )
        _load_torchvision(model, request)
    return model, stem


def _default_stem(request: Request) -> Stem:
    """As the weights have it, else by the size of the images."""
    if request.weights is not None and request.file is None:
        return "imagenet"
    if request.file is not None and weights_are_read():
        kernel = stem_kernel(request.file)
        if kernel is not None:
            return "imagenet" if kernel == 7 else "small"
    return "small" if request.image_size is not None and request.image_size <= 64 else "imagenet"


def _is_of_one_size(name: str) -> bool:
    """Whether the model is built for one size of images."""
    return name.startswith("vit_")


def _torchvision_model(request: Request) -> nn.Module:
    options: dict[str, Any] = {}
    if request.name in _INCEPTIONS:  # avoids a warning, and more than one output in training
        options = {"aux_logits": False, "init_weights": True}
    if request.image_size is not None and _is_of_one_size(request.name):
        options["image_size"] = request.image_size
    model = models.get_model(request.name, weights=None, **options)
    if request.norm is not None:
        model = _with_norm(model, request.name, request.norm, options)
    if request.in_channels != 3:
        _replace_first_conv(model, request.in_channels)
    if request.weights is not None and request.file is None:
        _load_torchvision(model, request)
    return model


def _load_torchvision(model: nn.Module, request: Request) -> None:
    """Load torchvision's weights by name, without their classifier where the model has another one."""
    if not weights_are_read():
        return
    entry = _torchvision_weights(request.name, request.weights)
    weights = read_tensors(cached_download(entry.url, str(entry)))
    # torchvision renames the layers of its first DenseNets when it loads them
    weights = {
        re.sub(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12])", r"\1\2", key): each for key, each in weights.items()
    }
    weights = {key: each for key, each in weights.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    if request.image_size is not None and _is_of_one_size(request.name):
        weights = interpolate_embeddings(request.image_size, model.patch_size, weights)
    if isinstance(model, PlainResNet):
        weights = {key: each for key, each in weights.items() if not key.startswith("fc.")}
        weights |= {f"fc.{key}": each for key, each in model.fc.state_dict().items()}
    load_named(model, weights)


def _preprocessing(name: str, entry: Any, in_channels: int) -> Preprocessing:
    """As ``entry.transforms()`` does it."""
    transform = entry.transforms()
    size, resized = transform.crop_size[0], transform.resize_size[0]
    mean, std = transform.mean, transform.std
    if name in _INCEPTIONS:  # torchvision builds these with a first step that has the same effect
        mean = std = (0.5, 0.5, 0.5)
    return Preprocessing(
        image_size=size,
        mean=for_channels(mean, in_channels),
        std=for_channels(std, in_channels),
        channels=in_channels,
        crop_fraction=size / resized,
        interpolation=transform.interpolation.value,
    )


def for_channels(values: Any, in_channels: int) -> tuple[float, ...]:
    """Values of three channels, or their mean for grey images."""
    values = tuple(float(value) for value in values)
    return (sum(values) / len(values),) if in_channels == 1 else values


def refuse(backbone: str, stem: str | None, width: float, in_channels: int = 3) -> None:
    """Raise ValueError if an argument was set that applies only to the ResNets of this package."""
    for name, value, default in (("stem", stem, None), ("width", width, 1.0), ("in_channels", in_channels, 3)):
        if value != default:
            raise ValueError(f"{name} must be left at {default} for {backbone}, got {value!r}")


def _with_norm(model: nn.Module, name: str, norm: Norm, options: dict[str, Any]) -> nn.Module:
    """The model if it has this norm, else a new one with it."""
    refusal = f"norm={norm!r} does not fit backbone {name!r}: leave norm None, or take one of {', '.join(RESNETS)}"
    if not _has_batch_norm(model):  # it has none, or it normalises tokens or channels in the last dimension
        raise ValueError(refusal)
    if norm == "batch":
        return model
    try:
        model = models.get_model(name, weights=None, norm_layer=norm_layer(norm), **options)
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


def _without_classifier(model: nn.Module, name: str) -> tuple[nn.Module, int, str]:
    """The model without its last linear layer, the number of inputs of that layer, and its name."""
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"backbone {name!r} has no linear classifier to remove; give the backbone as a module")
    path, classifier = linear[-1]
    model.set_submodule(path, nn.Identity())
    return model, classifier.in_features, path
