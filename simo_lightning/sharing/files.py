"""The weights and the config.json of a model, and their download."""

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from simo_lightning.checkpoints import CLASS_MEANS, CONFIG_FILE, FOLDER_FORMAT, WEIGHTS_FILE
from simo_lightning.data.hub import hub_answers
from simo_lightning.extras import import_extra
from simo_lightning.tensor_files import first_line
from simo_lightning.version import __version__


def pretrained_config(module: pl.LightningModule, step: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``from_pretrained`` builds a module from.

    Args:
        module: A module of this package.
        step: Of its weights. Class means of another step are left out.

    Returns:
        The content of config.json, and the content of model.safetensors.

    Raises:
        ValueError: If an argument of the module cannot be written as JSON, or a weight is no plain tensor.
    """
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": step}
    module.on_save_checkpoint(checkpoint)
    stored, weights = checkpoint["simo_module"], checkpoint["state_dict"]
    arguments = dict(stored["init_args"])
    preprocessing, classes = arguments.pop("preprocessing", None), stored.get("classes") or {}
    if classes.get("means") is not None:
        weights = {**weights, CLASS_MEANS: classes["means"]}
    name = type(module).__name__
    config = {
        "library_name": "simo_lightning",
        "format": FOLDER_FORMAT,
        "class_path": stored["class_path"],
        "init_args": {key: _as_json(value, f"{key} of {name}") for key, value in arguments.items()},
        "preprocessing": _as_json(preprocessing and preprocessing["init_args"], f"preprocessing of {name}"),
        "classes": classes.get("names"),
        "loss_sizes": stored.get("loss_sizes"),
        "embedding_dim": getattr(getattr(module, "encoder", None), "embedding_dim", None),
        "versions": {"simo_lightning": __version__, "torch": torch.__version__},
    }
    return config, {name: _plain_tensor(name, value) for name, value in weights.items()}


def write_pretrained(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Write the two files of a model.

    Args:
        config: From :func:`pretrained_config`.
        weights: From :func:`pretrained_config`.
        folder: Exists.

    Raises:
        ImportError: If safetensors is not installed.
    """
    import_extra("safetensors")
    from safetensors.torch import save_file

    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)  # safetensors lets the owner alone read it


def download_pretrained(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Download a model from the Hugging Face Hub, without opening it.

    Args:
        repo_id: Such as ``"name/model"``.
        revision: Branch, tag or commit; None: the newest.
        token: Of a private repository; None: that of ``hf auth login``.
        cache_dir: None: the cache of huggingface_hub.
        force_download: Whether to download what is in the cache again.
        local_files_only: Whether to read the cache alone. Without network it is read alone as well.

    Returns:
        A folder in the cache with config.json, model.safetensors and README.md, all of one commit.

    Raises:
        FileNotFoundError: If there is no such model, or it is not in the cache and the Hub does not answer.
        ImportError: If huggingface_hub is not installed.
        ValueError: If it cannot be downloaded.
    """
    hub = import_extra("huggingface_hub")
    from huggingface_hub import constants

    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        raise FileNotFoundError(f"no folder {str(repo_id)!r}, and no name of a model on the Hugging Face Hub either")
    offline = local_files_only or bool(constants.HF_HUB_OFFLINE) or not hub_answers()
    try:
        folder = hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=offline,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, "README.md"],
        )
    except Exception as error:  # the library raises many exception types
        where = f"no folder {repo_id!r}, and {repo_id!r} cannot be loaded from the Hugging Face Hub"
        missing = "RepositoryNotFound" in type(error).__name__ or offline
        reason = first_line(error)
        if missing and not offline:
            reason = "there is no such model, or it is private: run `hf auth login`"
        elif offline:
            reason = f"it is not in the cache, and {constants.ENDPOINT} is not asked or does not answer"
        raise (FileNotFoundError if missing else ValueError)(f"{where}: {reason}") from error
    if not Path(folder, CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{repo_id!r} on the Hugging Face Hub holds no {CONFIG_FILE}")
    return Path(folder)


def _plain_tensor(name: str, value: Any) -> Tensor:
    """A copy on the CPU, which shares no memory with another one."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
        raise ValueError(f"the weight {name} must be a plain tensor to be shared, got a {type(value).__name__}")
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _as_json(value: Any, where: str) -> Any:
    """Plain data of a checkpoint as JSON holds it: tuples become lists, as in a config."""
    if isinstance(value, dict):
        if "not_stored" in value and not value.get("function"):
            raise ValueError(
                f"the argument {where} must be one that a file can describe to be shared, got a {value['not_stored']}: "
                "let its class inherit from InitArgumentsMixin"
            )
        return {str(key): _as_json(each, where) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each, where) for each in value]
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise ValueError(
        f"the argument {where} must hold finite numbers, strings, lists and dictionaries to be shared, got "
        f"{value if isinstance(value, float) else f'a {type(value).__name__}'}"
    )
