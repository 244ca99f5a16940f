"""One file that keeps the decoded images of a folder."""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from simo_lightning.preprocessing import Preprocessing

CACHE = ".simo_lightning_"  # prefix of the file's name
LAYOUT = 3  # increase when the decoding or the content of the file changes


def fingerprint(root: Path, names: Iterable[str], decoder: Preprocessing) -> str:
    """Hash of the files' relative names, sizes and times of change, and of how they are decoded."""
    digest = hashlib.blake2b(f"{LAYOUT} {decoder}".encode(), digest_size=16)
    for name in names:
        status = os.stat(os.path.join(root, name))
        digest.update(f"\0{name}\0{status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def cache_paths(root: Path, image_size: int) -> list[Path]:
    """Candidates in order: a hidden file in ``root`` itself, then a file in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    digest = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    return [
        root / f"{CACHE}{image_size}.pt",
        home / "simo_lightning" / f"{root.name}_{digest}_{image_size}.pt",
    ]


def read_cache(root: Path, image_size: int, key: str, count: int) -> tuple[Tensor | None, dict[str, int]]:
    """The ``count`` images stored under ``key`` and their conversions; None without one. Warns of a damaged file."""
    for path in cache_paths(root, image_size):
        if not os.path.isfile(path):  # also where the folder may not be read
            continue
        try:
            kept = torch.load(path, weights_only=True)
            if kept["fingerprint"] != key:
                continue  # the folder has changed since
            images: Tensor = kept["images"]
            whole = images.dtype == torch.uint8 and images.shape == (count, 3, image_size, image_size)
            if not whole or _checksum(images) != kept["checksum"]:
                raise ValueError("its content does not match its checksum")
        except Exception as error:  # a damaged archive raises many exception types, and none may stop a run
            warnings.warn(f"the cache {str(path)!r} cannot be read and is built again: {error!r}", stacklevel=2)
            continue
        return images, dict(kept["changes"])
    return None, {}


def write_cache(root: Path, image_size: int, key: str, images: Tensor, changes: dict[str, int]) -> None:
    """Store ``images`` under ``key`` in the first file that can be written, whole or not at all."""
    content = {"fingerprint": key, "images": images, "changes": changes, "checksum": _checksum(images)}
    failures = []
    for path in cache_paths(root, image_size):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, content)
            return
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            failures.append(f"{str(path)!r}: {error}")
    warnings.warn(f"decoded images could not be cached and are decoded again next time ({failures})", stacklevel=2)


def _write_whole(path: Path, content: dict[str, object]) -> None:
    """Write a file beside ``path``, then rename it, so that readers see the old or the new content."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with partial.open("xb") as file:
            torch.save(content, file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _checksum(images: Tensor) -> int:
    return zlib.crc32(memoryview(images.numpy()))  # type: ignore[arg-type]
