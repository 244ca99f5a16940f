"""Backbones of timm, the extra ``timm``."""

import difflib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from simo_lightning.class_paths import weights_are_read
from simo_lightning.encoders.backbones import Backbone, Request, for_channels, refuse
from simo_lightning.encoders.weights import Tensors, cached_download, is_reachable, load_file
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.tensor_files import first_line, read_tensors

_RESIZE: dict[str, Any] = {"center": "crop", "squash": "squash", "border": "pad"}


def timm_backbone(request: Request) -> Backbone:
    """Build a model of timm without its classifier.

    Args:
        request: Its name begins with ``timm/``.

    Returns:
        The backbone.

    Raises:
        ModuleNotFoundError: If timm is not installed.
        ValueError: If an argument does not fit the model, or the weights are not found or do not fit.
    """
    refuse(f"backbone {request.name!r}", request.stem, request.width)
    if request.norm is not None:
        raise ValueError(f"norm must be left at None for backbone {request.name!r}, got {request.norm!r}")
    name, config = _full_name(request)
    options: dict[str, Any] = {"in_chans": request.in_channels}
    if request.image_size is not None and config.fixed_input_size:
        options["img_size"] = request.image_size
    weights: Tensors | None = None
    if request.weights is not None and request.file is None and weights_are_read():
        weights = read_tensors(_weights_file(name, config))
    try:
        model = _build(name, options, weights, config)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"backbone {request.name!r} cannot be built with {given}: {first_line(error)}") from error
    if request.file is not None and weights_are_read():
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        classifier = config.classifier or ()
        names = (classifier,) if isinstance(classifier, str) else classifier
        load_file(model, request.file, request.name, names, convert and partial(_converted, convert, model))
    known: Any = model  # timm's models declare these attributes
    min_size = _min_size(request, config)
    preprocessing = None
    if request.weights is not None:
        preprocessing = _preprocessing(model, request.in_channels)
    elif config.fixed_input_size and request.in_channels in (1, 3):
        preprocessing = Preprocessing(min_size, channels=request.in_channels)
    return Backbone(model, _feature_dim(known), min_size, preprocessing)


def _full_name(request: Request) -> tuple[str, Any]:
    """Name of the model with the tag of its weights, and timm's description of them."""
    import timm

    name, _, tag = request.name.removeprefix("timm/").partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"backbone must be a model of timm, got {request.name!r}"
            + (f"; do you mean {' or '.join(f'timm/{each}' for each in near)}?" if near else "")
        )
    if request.file is None and request.weights not in (None, "DEFAULT", "pretrained"):
        if tag not in ("", request.weights):
            raise ValueError(f"weights must be the tag in {request.name!r}, or pretrained, got {request.weights!r}")
        tag = str(request.weights)
    full = f"{name}.{tag}" if tag else name
    known = timm.list_pretrained(f"{name}*")
    tags = [each.partition(".")[2] for each in known if each.partition(".")[0] == name]
    if tag and tag not in tags:
        raise ValueError(f"weights of timm/{name} must be {', '.join(['pretrained', *tags])} or a file, got {tag!r}")
    if not tags and request.weights is not None and request.file is None:
        raise ValueError(f"weights of timm/{name} must be a file, as none are published, got {request.weights!r}")
    return full, timm.get_pretrained_cfg(full)


def _build(name: str, options: dict[str, Any], weights: Tensors | None, config: Any) -> nn.Module:
    """The model without its classifier; weights by name are loaded strictly, with their classifier."""
    import timm

    if weights is None:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
        return model
    overlay = {"state_dict": weights}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    if config.num_classes:
        model.reset_classifier(0)
    model.pretrained_cfg.pop("state_dict", None)  # the model keeps a reference to it
    return model


def _weights_file(name: str, config: Any) -> Path:
    """Path of the file of weights, downloaded if it is not in the cache."""
    if not config.hf_hub_id:
        return cached_download(config.url, f"timm/{name}")
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for each in names:
        cached = try_to_load_from_cache(config.hf_hub_id, each)
        if isinstance(cached, str):
            return Path(cached)
    url = hf_hub_url(config.hf_hub_id, names[0])
    if constants.HF_HUB_OFFLINE or not is_reachable(url):
        raise ValueError(
            f"weights timm/{name} are not on this machine and cannot be downloaded: get {url} and pass the path of the "
            f"file as weights, or copy the folder {constants.HF_HUB_CACHE} of a machine that has them"
        )
    try:
        return Path(hf_hub_download(config.hf_hub_id, names[0]))
    except Exception as error:  # of the client's many kinds
        raise ValueError(f"weights timm/{name} cannot be downloaded from {url}: {first_line(error)}") from error


def _converted(convert: Any, model: nn.Module, weights: Tensors) -> Tensors:
    """Weights of another image size or of the original authors, as timm converts them."""
    try:
        converted: Tensors = convert(weights, model)
        return converted
    except Exception:  # of weights that are not of this model, which the caller reports
        return weights


def _preprocessing(model: nn.Module, in_channels: int) -> Preprocessing:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    _, height, width = config["input_size"]
    return Preprocessing(
        image_size=height if height == width else (height, width),
        mean=for_channels(config["mean"], in_channels),
        std=for_channels(config["std"], in_channels),
        channels=in_channels,
        resize=_RESIZE.get(config["crop_mode"], "crop"),
        crop_fraction=min(1.0, config["crop_pct"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )


def _feature_dim(model: Any) -> int:
    # the pooled features of some models pass one more layer, such as MobileNetV3's
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def _min_size(request: Request, config: Any) -> tuple[int, int]:
    if config.fixed_input_size:
        size = request.image_size
        return config.input_size[1:] if size is None else (size, size)
    return config.min_input_size[1:] if config.min_input_size else (1, 1)
