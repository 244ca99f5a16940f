"""Files of embeddings, Parquet or .npz, read in chunks. No pickled object is read."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from simo_lightning.extras import import_extra

_CHUNK_BYTES = 2**25  # of embeddings that are read at a time


def sha256_of(path: str | Path) -> str:
    """SHA-256 digest of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_info(path: str | Path) -> dict[str, Any]:
    """What an embeddings file says about its model.

    Args:
        path: File.

    Returns:
        The JSON object that ``simo embed`` wrote; empty for the file of another program.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file.
    """
    with open_embeddings(path) as file:
        return file.info


def open_embeddings(path: str | Path) -> EmbeddingsFile:
    """Open a file of embeddings.

    Args:
        path: A Parquet file with a column "embedding", lists of one length, or an .npz file with an array
            ``embeddings``, such as ``simo embed`` and ``simo predict`` write.

    Returns:
        The file, to be used in a ``with`` statement.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If it is a Parquet file and pyarrow is not installed.
        ValueError: If it is no such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "embeddings.npz")
        >>> np.savez(path, embeddings=np.eye(3, dtype=np.float32), paths=np.array(["a.jpg", "b.jpg", "c.jpg"]))
        >>> with open_embeddings(path) as file:
        ...     file.rows, file.dim, file.column("path", [2, 0])
        (3, 3, ['c.jpg', 'a.jpg'])
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file of embeddings at {str(path)!r}")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _ParquetFile(path)
    if path.suffix.lower() == ".npz":
        return _NpzFile(path)
    raise ValueError(f"a file of embeddings must end in .parquet, .pq or .npz, got {str(path)!r}")


class EmbeddingsFile:
    """An open file of embeddings.

    Attributes:
        path: The file.
        rows: N, number of embeddings.
        dim: D.
        info: What ``simo embed`` wrote about the model; empty if another program wrote the file.
        columns: Names of the columns; in an .npz file those that are not the names of its arrays are given as in a
            Parquet file.
    """

    path: Path
    rows: int
    dim: int
    info: dict[str, Any]
    columns: list[str]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The embeddings in chunks of bounded size.

        Yields:
            Row of the first, and float32 ``(n, D)``.
        """
        raise NotImplementedError

    def column(self, name: str, rows: Sequence[int]) -> list[Any]:
        """Values of a column in some rows; a list of floats each where the column has lists."""
        raise NotImplementedError

    def labels(self) -> tuple[list[str], np.ndarray]:
        """Names of the classes and the class of each embedding, int64 ``(N,)``.

        Raises:
            ValueError: If the file has none.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_dim(self) -> None:
        if self.dim < 1:
            raise ValueError(f"embeddings of {str(self.path)!r} must have at least 1 dimension, got {self.dim}")

    def _chunk_rows(self) -> int:
        return max(1, _CHUNK_BYTES // (4 * self.dim))


class _ParquetFile(EmbeddingsFile):
    def __init__(self, path: Path) -> None:
        self.arrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
        self.path = path
        try:
            self.file = parquet.ParquetFile(path, memory_map=True)
        except (OSError, self.arrow.ArrowException) as error:
            raise ValueError(f"{str(path)!r} is not a Parquet file that can be read: {error}") from error
        schema, metadata = self.file.schema_arrow, self.file.metadata
        self.columns, self.rows = schema.names, metadata.num_rows
        if "embedding" not in schema.names or not self.arrow.types.is_fixed_size_list(schema.field("embedding").type):
            self.file.close()
            raise ValueError(
                f"{str(path)!r} must have a column embedding, fixed-size lists, got {', '.join(schema.names)}"
            )
        self.dim = schema.field("embedding").type.list_size
        self._check_dim()
        self.info = _json((schema.metadata or {}).get(b"simo_lightning", b"{}"), path)
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.ends = np.cumsum(counts)  # row after the last of each row group

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        for batch in self.file.iter_batches(self._chunk_rows(), columns=["embedding"]):
            column = batch.column(0)
            if column.null_count:
                raise ValueError(f"embedding of {str(self.path)!r} must not be null, got {column.null_count} of them")
            values = np.array(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
            yield start, values.reshape(-1, self.dim)
            start += len(batch)

    def column(self, name: str, rows: Sequence[int]) -> list[Any]:
        wanted = np.asarray(rows, dtype=np.int64)
        groups = np.searchsorted(self.ends, wanted, side="right")
        found: dict[int, Any] = {}
        for group in np.unique(groups).tolist():
            inside = wanted[groups == group]
            first = int(self.ends[group - 1]) if group else 0
            column = self.file.read_row_group(group, columns=[name]).column(0)
            found |= zip(inside.tolist(), column.take(inside - first).to_pylist(), strict=True)
        return [found[row] for row in wanted.tolist()]

    def labels(self) -> tuple[list[str], np.ndarray]:
        if "label" not in self.columns:
            raise ValueError(f"{str(self.path)!r} must have a column label, got {', '.join(self.columns)}")
        labels = [str(label) for label in self.file.read(columns=["label"]).column(0).to_pylist()]
        names, numbers = np.unique(np.array(labels, dtype=np.str_), return_inverse=True)
        return names.tolist(), numbers

    def close(self) -> None:
        self.file.close()


_COLUMN_OF = {"paths": "path", "embeddings": "embedding", "classes": "class"}


class _NpzFile(EmbeddingsFile):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                names = file.files
                self.info = _json(str(file["info"]), path) if "info" in names else {}
                self.class_names = file["class_names"].tolist() if "class_names" in names else []
            large = [name for name in names if name not in ("info", "class_names")]
            self.arrays = {_COLUMN_OF.get(name, name): _mapped(path, name) for name in large}
        except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{str(path)!r} is not an .npz file that can be read: {error}") from error
        embeddings = self.arrays.get("embedding")
        if embeddings is None or embeddings.ndim != 2 or embeddings.dtype.kind != "f":
            raise ValueError(f"{str(path)!r} must have an array embeddings of floats (N, D), got {', '.join(names)}")
        self.rows, self.dim = embeddings.shape
        self._check_dim()
        self.columns = [name for name, values in self.arrays.items() if values.shape[:1] == (self.rows,)]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        step = self._chunk_rows()
        for start in range(0, self.rows, step):
            yield start, np.array(self.arrays["embedding"][start : start + step], dtype=np.float32)

    def column(self, name: str, rows: Sequence[int]) -> list[Any]:
        values: list[Any] = self.arrays[name][np.asarray(rows, dtype=np.int64)].tolist()
        return values

    def labels(self) -> tuple[list[str], np.ndarray]:
        labels = self.arrays.get("labels")
        if labels is None or labels.shape != (self.rows,) or labels.dtype.kind not in "iu":
            raise ValueError(f"{str(self.path)!r} must have an array labels of {self.rows} integers")
        numbers = np.array(labels, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self.class_names)):
            raise ValueError(f"labels of {str(self.path)!r} must be in 0..{len(self.class_names) - 1}")
        return self.class_names, numbers


def _mapped(path: Path, name: str) -> np.ndarray:
    """An array of an .npz file, mapped into memory if it is stored as it is."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        entry = archive.getinfo(f"{name}.npy")
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version in read_header and entry.compress_type == zipfile.ZIP_STORED:
            shape, fortran, dtype = read_header[version](member)
            length = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or entry.file_size != member.tell() + length:
                raise ValueError(f"array {name} must hold plain values of shape {shape}")
            if length == 0:
                return np.empty(shape, dtype)
            return np.memmap(
                path, dtype, "r", _content_start(path, entry) + member.tell(), shape, "F" if fortran else "C"
            )
    with np.load(path, allow_pickle=False) as file:
        values: np.ndarray = file[name]
        return values


def _content_start(path: Path, entry: zipfile.ZipInfo) -> int:
    """Position of the content of an entry, after its local header of 30 bytes, name and extra field."""
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"metadata of {str(path)!r} must be JSON, got {text[:100]!r}") from error
    if not isinstance(found, dict):
        raise ValueError(f"metadata of {str(path)!r} must be a JSON object, got {text[:100]!r}")
    return found
