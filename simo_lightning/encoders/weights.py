"""Trained weights of a backbone: from the network, a cache or a file, matched to its tensors by name."""

import os
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from simo_lightning.tensor_files import read_tensors

SECONDS_TO_CONNECT = 2.0
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

Tensors = dict[str, Tensor]


def is_file_name(weights: str) -> bool:
    """Whether an argument `weights` is the path of a file."""
    return weights.endswith(_SUFFIXES) or os.sep in weights or Path(weights).is_file()


def is_reachable(url: str) -> bool:
    """Whether an address answers within two seconds, through the proxy of the environment if there is one."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=SECONDS_TO_CONNECT):
                answered.append(True)
        except urllib.error.HTTPError:  # an answer, too
            answered.append(True)
        except (OSError, ValueError):
            pass

    thread = Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(SECONDS_TO_CONNECT)
    return bool(answered)


def cached_download(url: str, name: str) -> Path:
    """A file of torch's cache, downloaded if it is not there.

    Args:
        url: Address.
        name: Of the weights, for the error message.

    Returns:
        Path in ``torch.hub.get_dir()``.

    Raises:
        ValueError: If the file is not in the cache and the address cannot be reached; says where to put it.
    """
    path = Path(get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    if not is_reachable(url):
        raise ValueError(
            f"weights {name} are not on this machine and cannot be downloaded: put {url} at {path}, or pass the path "
            "of a file as weights"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, _, digest = path.stem.rpartition("-")  # such as resnet50-11ad3fa6
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        download_url_to_file(url, str(path), hash_prefix=digest if stem else None)
    except OSError as error:
        raise ValueError(f"weights {name} cannot be downloaded from {url}: {error}") from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def load_named(model: nn.Module, weights: Tensors) -> None:
    """Load weights that were made for a model with three input channels; for one channel, they are summed over RGB."""
    own = model.state_dict()
    model.load_state_dict({name: _for_channels(value, own.get(name)) for name, value in weights.items()})


def load_file(
    model: nn.Module,
    path: str,
    name: str,
    classifier: Sequence[str] = (),
    convert: Callable[[Tensors], Tensors] | None = None,
) -> None:
    """Load a file of weights into a backbone.

    The tensors may lie in nested dictionaries, such as ``{"state_dict": ...}``, and under a common prefix, such as
    ``module.`` or ``encoder.backbone.``: those are taken that hold most of the backbone's names. Parts that the
    backbone does not have, such as a classifier or a projector, are ignored.

    Args:
        model: The backbone.
        path: File, see :func:`~simo_lightning.tensor_files.read_tensors`.
        name: Of the backbone, for error messages.
        classifier: Names of its classifier, which was removed.
        convert: Applied to tensors that do not fit, such as those of another image size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or does not fit.
    """
    own = model.state_dict()
    found = best_match(own, read_tensors(path))
    if convert is not None and not _fits(own, found):
        found = convert(found)
    load_matched(model, found, path, name, classifier)


def best_match(own: Tensors, content: Any) -> Tensors:
    """The tensors of a file that hold most of a model's names, under those names.

    Args:
        own: Tensors of the model by name.
        content: Of the file.

    Returns:
        Tensors by name, without their common prefix; perhaps more than the model's.
    """
    best: tuple[int, Tensors] = (-1, {})
    for tensors in _dictionaries(content):
        counts: Counter[str] = Counter()
        for name in tensors:
            parts = name.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in own:
                    counts["".join(f"{part}." for part in parts[:start])] += 1
        prefix, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if count > best[0]:
            best = count, {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
    return best[1]


def _dictionaries(content: Any, depth: int = 0) -> Iterator[Tensors]:
    """All dictionaries of tensors in a file, the outer ones first."""
    if not isinstance(content, dict):
        return
    yield {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    for value in content.values() if depth < 3 else ():
        yield from _dictionaries(value, depth + 1)


def load_matched(model: nn.Module, found: Tensors, path: str, name: str, classifier: Sequence[str]) -> None:
    """Load tensors into a model, or raise ValueError if they do not fit."""
    own = model.state_dict()
    weights = {key: _for_channels(found[key], own[key]) for key in own if key in found}
    # files of old releases of torch lack the counter
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    parts = {key.partition(".")[0] for key in own}
    unknown = [
        key
        for key in found
        if key not in own
        and key.partition(".")[0] in parts
        and not any(key.startswith(f"{each}.") for each in classifier)
    ]
    shapes = [
        f"{key} {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the backbone"
        for key, value in weights.items()
        if value.shape != own[key].shape
    ]
    if not weights:
        raise ValueError(
            f"weights {path} do not fit backbone {name!r}: none of its {len(own)} tensors is in the file, which holds "
            + (_some(list(found)) if found else "no tensors")
        )
    problems = [(missing, "missing"), (shapes, "of another shape"), (unknown, "not in the backbone")]
    text = "; ".join(f"{len(names)} {what} ({_some(names)})" for names, what in problems if names)
    if text:
        raise ValueError(f"weights {path} do not fit backbone {name!r}, which has {len(own)} tensors: {text}")
    model.load_state_dict(weights, strict=False)


def _fits(own: Tensors, found: Tensors) -> bool:
    return all(name in found and found[name].shape == value.shape for name, value in own.items())


def _for_channels(weight: Tensor, own: Tensor | None) -> Tensor:
    """The weight of a convolution for grey images, from one for RGB images."""
    is_rgb_for_grey = (
        own is not None
        and weight.ndim == own.ndim == 4
        and (weight.shape[1], own.shape[1]) == (3, 1)
        and weight.shape[0] == own.shape[0]
        and weight.shape[2:] == own.shape[2:]
    )
    return weight.sum(1, keepdim=True) if is_rgb_for_grey else weight


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def stem_kernel(path: str) -> int | None:
    """Side of the kernel of a ResNet's first convolution in a file of weights; None if there is none."""
    names = {"conv1.weight": torch.empty(0), "layer1.0.conv1.weight": torch.empty(0)}
    weight = best_match(names, read_tensors(path)).get("conv1.weight")
    return int(weight.shape[-1]) if weight is not None and weight.ndim == 4 else None
