"""Files of tensors that are opened without running code from them."""

import mmap
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

File = str | Path | IO[bytes]


def read_tensors(path: str | Path) -> Any:
    """Read a file of weights. Runs no code from it.

    Args:
        path: A .safetensors file, or one that ``torch.save`` wrote, in its present or its older format.

    Returns:
        Tensors by name for .safetensors, else the content of the file, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors and plain data.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of weights at {path}")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path, device="cpu")
        size = check_archive(path) if _is_archive(Path(path)) else _check_pickle(Path(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_sizes(content, size)
        return content
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a damaged file fails anywhere
        raise ValueError(f"weights {path} cannot be read: {reason_of(path, error, may_trust=False)}") from error


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_pickle(path: Path) -> int:
    """Size of a file in torch's format before 1.6, which is no archive."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray\n") >= 0:
            raise ValueError("it holds a bytearray, which is not plain data")
        return len(content)


def check_archive(file: File) -> int:
    """Size of a file in bytes. Raises if an entry is larger than the file or would become larger when it is read."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.filename.startswith("/") or ".." in PurePosixPath(entry.filename).parts or "\\" in entry.filename:
                raise ValueError(f"its entry {entry.filename!r} lies outside of the archive")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its entry {entry.filename!r} is compressed, as torch.save never writes it")
        assert archive.fp is not None
        archive.fp.seek(0)
        if archive.fp.read(4) != b"PK\x03\x04":  # torch.load would read what comes before the archive
            raise zipfile.BadZipFile("the archive does not start at its first byte")
        size = archive.fp.seek(0, 2)
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError(f"its entries claim more than the {size} bytes of the file")
        for entry in entries:  # the one call allowed by torch.load that makes a large object from a small number
            if entry.filename.endswith("data.pkl") and b"bytearray\n" in archive.read(entry):
                raise ValueError("it holds a bytearray, which is not plain data")
    if not isinstance(file, str | Path):
        file.seek(0)
    return size


def check_sizes(checkpoint: Any, size: int) -> None:
    """Raise if tensors have no data, or claim more than the file has: memory that copying them would take."""
    storages: dict[int, int] = {}
    for tensor in _tensors(checkpoint):
        if tensor.is_meta:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no data")
        if tensor.layout is not torch.strided:
            continue
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.nbytes > storage.nbytes() or sum(storages.values()) > size:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} claims more than the {size} bytes of the file")


def _tensors(value: Any) -> Iterator[Tensor]:
    seen, pending = set(), [value]
    while pending:
        each = pending.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict | list | tuple | set) and id(each) not in seen:
            seen.add(id(each))
            pending += [*each.keys(), *each.values()] if isinstance(each, dict) else each


def reason_of(path: File, error: Exception, may_trust: bool = True) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(error, zipfile.BadZipFile):
        return f"it is cut short, or not a checkpoint ({first_line(error)})"
    if not str(error).startswith("Weights only load failed"):
        return first_line(error)
    names: list[str] = []
    if isinstance(path, str | Path):
        with suppress(Exception):  # of a damaged file
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    reason = f"it holds {', '.join(names[:3])}" if names else first_line(error.__context__ or error)
    reason += "; only tensors, numbers, strings, lists and dictionaries are read"
    if may_trust:
        reason += ", unless you trust the file: weights_only=False reads it, and runs the code it holds"
    return reason


def first_line(error: BaseException) -> str:
    """First line of an error message, cut to 300 characters; the name of its class if it has none."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
