"""What a process of test_data_hub.py runs; a module of its own, because the libraries read their settings at import."""

import importlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def open_without_network(offline: str, cache: Path, report: Path) -> None:
    """Open a data set of the Hub while a network that is there is shut off, and write down the error and its time."""
    assert "datasets" not in sys.modules
    os.environ |= {"HF_HUB_OFFLINE": offline, "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache)}
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    import huggingface_hub.constants

    importlib.reload(huggingface_hub.constants)  # which the process that started this one may have imported

    from simo_lightning.data.hub import open_splits

    start = time.monotonic()
    try:
        open_splits("uoft-cs/cifar10")
    except FileNotFoundError as error:
        report.write_text(f"{time.monotonic() - start} {error}")


def refuse(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(-2, "Name or service not known")
