"""Which extra of this package brings a module that is not installed."""

import re

EXTRAS = {
    "pl_bolts": "bolts",
    "pkg_resources": "bolts",  # lightning-bolts needs a setuptools that still has it, which the extra pins
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "umap": "umap",
}


def missing_extra(message: str) -> str | None:
    """What to install where Python says that a module is missing that belongs to an extra.

    Args:
        message: Of an ImportError, or any text that quotes one.

    Returns:
        One line, or None if no extra would help.

    Example:
        >>> missing_extra("No module named 'pl_bolts.optimizers'")
        "pl_bolts is missing: pip install 'simo_lightning[bolts]'"
    """
    found = re.search(r"No module named '(\w+)", message)
    if found is None or found.group(1) not in EXTRAS:
        return None
    return f"{found.group(1)} is missing: pip install 'simo_lightning[{EXTRAS[found.group(1)]}]'"
