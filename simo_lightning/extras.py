"""Which extra of this package installs a missing module."""

import re
from importlib import import_module
from types import ModuleType

EXTRAS = {
    "bokeh": "report",
    "pl_bolts": "bolts",
    "pkg_resources": "bolts",  # of the setuptools release that the extra pins for lightning-bolts
    "faiss": "search",
    "filelock": "stream",
    "boto3": "stream",
    "botocore": "stream",
    "captum": "explain",
    "datasets": "hub",
    "huggingface_hub": "hub",
    "pytorch_metric_learning": "losses",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pyarrow": "parquet",
    "litdata": "stream",
    "peft": "lora",
    "safetensors": "hub",
    "shtab": "completion",
    "timm": "timm",
    "umap": "umap",
}


def missing_extra(message: str) -> str | None:
    """The command that installs a missing module of an extra.

    Args:
        message: Message of an ImportError, or a text that contains one.

    Returns:
        One line; None if the module belongs to no extra.

    Example:
        >>> missing_extra("No module named 'pl_bolts.optimizers'")
        "pl_bolts is missing: pip install 'simo_lightning[bolts]'"
    """
    found = re.search(r"No module named '(\w+)", message)
    if found is None or found.group(1) not in EXTRAS:
        return None
    return f"{found.group(1)} is missing: pip install 'simo_lightning[{EXTRAS[found.group(1)]}]'"


def import_extra(name: str) -> ModuleType:
    """Import a module of an extra.

    Args:
        name: Of the module, such as ``"timm.models"``.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If it is missing; the message is the command that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        message = missing_extra(str(error))
        if message is None:
            raise
        raise ModuleNotFoundError(message, name=error.name) from None
