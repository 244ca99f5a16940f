"""Files that keep the decoded images of a folder, and which of its files are broken."""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from simo_lightning.preprocessing import Preprocessing

CACHE = ".simo_lightning_"  # prefix of the file's name
LAYOUT = 4  # increase when the decoding or the content of the file changes


@dataclass(frozen=True)
class Cached:
    """The images of a folder as decoded, or only what is known of its files.

    Args:
        images: uint8 ``(N, C, H, W)`` of the files that decode, in order; no image if they were only checked.
        changes: Number of each conversion.
        broken: Error of each file that does not decode, by its name.
    """

    images: Tensor
    changes: dict[str, int]
    broken: dict[str, str]


def fingerprint(root: Path, names: Iterable[str], decoder: Preprocessing) -> str:
    """Hash of the files' names, sizes and times of change, and of how they are decoded."""
    decoder = replace(decoder, mean=None, std=None)  # which decoding does not use
    digest = hashlib.blake2b(f"{LAYOUT} {decoder}".encode(), digest_size=16)
    for name in names:
        status = os.stat(os.path.join(root, name))
        digest.update(f"\0{name}\0{status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def cache_paths(root: Path, name: str) -> list[Path]:
    """Candidates in order: a hidden file in ``root`` itself, then a file in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    digest = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    return [root / f"{CACHE}{name}.pt", home / "simo_lightning" / f"{root.name}_{digest}_{name}.pt"]


def read_cache(root: Path, name: str, key: str, count: int, shape: tuple[int, ...] | None) -> Cached | None:
    """What is stored under ``key``; None without it. Warns of a damaged file.

    Args:
        root: Folder of the files.
        name: Part of the name of the cache.
        key: Fingerprint of the files.
        count: Number of the files.
        shape: ``(C, H, W)`` of the images; None: the files were only checked.
    """
    for path in cache_paths(root, name):
        if not os.path.isfile(path):  # also where the folder may not be read
            continue
        try:
            kept = torch.load(path, weights_only=True)
            if kept["fingerprint"] != key:
                continue  # the folder has changed since
            images, broken = kept["images"], dict(kept["broken"])
            expected = (0,) if shape is None else (count - len(broken), *shape)
            whole = images.dtype == torch.uint8 and images.shape[: len(expected)] == expected
            if not whole or _checksum(images) != kept["checksum"]:
                raise ValueError("its content does not match its checksum")
        except Exception as error:  # a damaged archive raises many exception types, and none may stop a run
            warnings.warn(f"the cache {str(path)!r} cannot be read and is built again: {error!r}", stacklevel=2)
            continue
        return Cached(images, dict(kept["changes"]), broken)
    return None


def write_cache(root: Path, name: str, key: str, cached: Cached) -> None:
    """Store what was decoded under ``key`` in the first file that can be written, whole or not at all."""
    content = {"fingerprint": key, "checksum": _checksum(cached.images), **vars(cached)}
    failures = []
    for path in cache_paths(root, name):
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
