"""Files of tensors that are opened without running code from them."""

import mmap
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

File = str | Path | IO[bytes]
SHARDED_REST = "meta.pt"  # in the folder of a sharded checkpoint: all but weights and optimizer states
_METADATA_CLASSES = (  # of torch.distributed.checkpoint.metadata, all of them records of plain data
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
    *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)


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


def is_sharded(path: Any) -> bool:
    """Whether a path is the folder of a sharded checkpoint, as Lightning's ModelParallelStrategy writes it."""
    return isinstance(path, str | Path) and Path(path, SHARDED_REST).is_file()


def read_sharded(folder: str | Path, tensors: bool = True) -> dict[str, Any]:
    """Read a sharded checkpoint on one process. Runs no code from it.

    torch lists the shards in a file ``.metadata``, which it reads by pickle. Here that file may name the classes of
    such a list and nothing else.

    Args:
        folder: As Lightning's ModelParallelStrategy writes it.
        tensors: Whether to read weights and optimizer states; False reads and checks the rest.

    Returns:
        The checkpoint in the form of a single file, on the CPU. Weights are float tensors by name; parameters have
        numbers in the optimizer states, as in ``torch.optim.Optimizer.state_dict``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is damaged, or holds more than tensors and plain data.
    """
    folder = Path(folder)
    try:
        size = check_archive(folder / SHARDED_REST)
        checkpoint: dict[str, Any] = torch.load(folder / SHARDED_REST, map_location="cpu", weights_only=True)
        check_sizes(checkpoint, size)
        states = _read_shards(folder, tensors)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file fails anywhere
        reason = reason_of(folder / SHARDED_REST, error, may_trust=False)
        raise ValueError(f"checkpoint {folder} cannot be read: {reason}") from error
    checkpoint["state_dict"] = states.pop("state_dict", {})
    optimizers = [states[name] for name in sorted(states, key=lambda name: int(name.rpartition("_")[2]))]
    if optimizers:
        checkpoint["optimizer_states"] = [_numbered(state) for state in optimizers]
    return checkpoint


def _read_shards(folder: Path, tensors: bool) -> dict[str, Any]:
    """Weights and optimizer states by name, nested as they were saved."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load

    class PlainPlanner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            name = read_item.dest_index.fqn
            try:
                self.state_dict[name] = torch.load(value, weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError(f"its entry {name[:100]!r} holds more than tensors and plain data") from error

    class PlainReader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

    metadata = _read_metadata(folder / ".metadata")
    entries = _places(folder, metadata, tensors)
    planner = PlainPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with shard_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load(entries, storage_reader=PlainReader(folder), planner=planner, no_dist=True)
    nested: dict[str, Any] = {}
    for name, value in entries.items():
        *parents, last = metadata.planner_data[name]
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def _places(folder: Path, metadata: Any, tensors: bool) -> dict[str, Any]:
    """What the entries of a list of shards are read into, by name: empty tensors, and None for all others."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for stored in metadata.storage_data.values():
        if Path(stored.relative_path).name != str(stored.relative_path):
            raise ValueError(f"its shard {str(stored.relative_path)[:100]!r} lies outside of the folder")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    places: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            places[name] = None
        elif tensors:
            size -= entry.size.numel() * entry.properties.dtype.itemsize
            if size < 0:
                raise ValueError(f"its tensors claim more than the files have, among them {name[:100]!r}")
            places[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return places


@contextmanager
def shard_errors() -> Iterator[None]:
    """Raise the error of the first process that failed, in place of torch's CheckpointException, a BaseException."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _read_metadata(path: Path) -> Any:
    """The list of the shards that torch has written, by an unpickler that knows its classes alone."""
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    classes = {
        **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in _METADATA_CLASSES},
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        **{("pathlib", name): PurePosixPath for name in ("PosixPath", "WindowsPath")},
    }

    class ListUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = classes.get((module, name))
            if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                found = getattr(torch, name)
            if found is None:
                raise ValueError(f"its .metadata holds {module}.{name}, which is not part of a list of shards")
            return found

    with path.open("rb") as file:
        found = ListUnpickler(file).load()
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"its .metadata must be a list of shards, got {type(found).__name__}")
    return found


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with a number for each parameter in place of its name."""
    groups = [state["param_groups"][number] for number in sorted(state["param_groups"])]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


# ---- writing


def unfinished_of(path: Path) -> Path:
    """Where a checkpoint is written before it replaces the one at ``path``."""
    return path.with_name(f".{path.name}.unfinished")


def former_of(path: Path) -> Path:
    """Where the former checkpoint of ``path`` is for the moment in which it is replaced."""
    return path.with_name(f".{path.name}.former")


def replace_folder(new: Path, target: Path) -> None:
    """Move a checkpoint to the place of another, of which at least one is a folder.

    No system call replaces a folder that is not empty. A crash between the two steps leaves the former checkpoint at
    :func:`former_of`, where :func:`restore_former` finds it.
    """
    former = former_of(target)
    _remove(former)
    with suppress(FileNotFoundError):
        target.rename(former)
    new.rename(target)
    _remove(former)


def restore_former(target: Path) -> None:
    """Undo a replacement of a folder that a crash has interrupted. All processes of a job may call it at once."""
    with suppress(OSError):  # there is none, or another process was faster
        if not target.exists():
            former_of(target).rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error in a chain of exceptions, to which torch adds its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def named_in_error(path: Path) -> Iterator[None]:
    """Name the checkpoint in the operating system's error, which torch may hide in one of its own.

    Args:
        path: Of the checkpoint that is written in the context.

    Raises:
        OSError: With the same number.
    """
    try:
        yield
    except Exception as error:
        failure = system_error(error)
        if failure is None:
            raise
        kept = "; the one before it is intact" if path.exists() else ""
        reason = failure.strerror or str(failure)
        raise OSError(failure.errno, f"checkpoint {path} cannot be written: {reason}{kept}") from error


# ---- messages


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
