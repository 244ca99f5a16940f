"""Parts of an embeddings file: each is written whole, and all are joined at the end without holding them in memory."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simo_lightning.extras import import_extra

_GROUP_BYTES = 2**25  # of a row group of a Parquet file
_GROUP_ROWS = 2**13
# Columns of a Parquet file and the arrays of an .npz file.
NPZ_NAMES = {
    "path": "paths",
    "embedding": "embeddings",
    "class": "classes",
    "score": "score",
    "scores": "scores",
    "shares": "shares",
    "rest": "rest",
}


class Part(NamedTuple):
    """Content of one part.

    Attributes:
        columns: Rows of each column: text, float32 ``(n,)`` or float32 ``(n, D)``. "path" is always one of them.
        broken: Path of each file that could not be read, and the reason.
    """

    columns: dict[str, np.ndarray]
    broken: list[tuple[str, str]]


class Parts:
    """The parts of an embeddings file that are written so far.

    Args:
        folder: Holds them; must exist.
        count: Number of all parts.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def missing(self) -> list[int]:
        """Numbers of the parts that are not written yet."""
        return [number for number in range(self.count) if not zipfile.is_zipfile(self._file(number))]

    def write(self, number: int, part: Part) -> None:
        """Write one part; a process that is killed meanwhile leaves no part of it."""
        arrays: dict[str, Any] = {f"column_{name}": values for name, values in part.columns.items()}
        arrays["broken"] = np.array(part.broken, dtype=np.str_).reshape(-1, 2)
        temporary = self._file(number).with_suffix(f".{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(self._file(number))

    def read(self, number: int, names: list[str] | None = None) -> Part:
        """Read one part, or the columns ``names`` of it."""
        with np.load(self._file(number), allow_pickle=False) as file:
            found = [each.removeprefix("column_") for each in file.files if each.startswith("column_")]
            columns = {name: file[f"column_{name}"] for name in found if names is None or name in names}
            return Part(columns, [(path, reason) for path, reason in file["broken"].tolist()])

    def rows(self) -> list[int]:
        """Number of rows of each part."""
        return [len(self.read(number, ["path"]).columns["path"]) for number in range(self.count)]

    def groups(self, names: list[str] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Columns of several parts at a time, at most about 8,192 rows or 32 MiB, without those that have no row."""
        waiting: list[dict[str, np.ndarray]] = []
        rows = size = 0
        for number in range(self.count):
            columns = self.read(number, names).columns
            if not len(columns["path"]):
                continue
            waiting.append(columns)
            rows += len(columns["path"])
            size += sum(values.nbytes for values in columns.values())
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                yield _joined(waiting)
                waiting, rows, size = [], 0, 0
        if waiting:
            yield _joined(waiting)

    def write_broken(self, path: Path) -> int:
        """Write the files that could not be read to a CSV file, if there are any; returns their number."""
        path.unlink(missing_ok=True)
        count = 0
        temporary = self.folder / "broken"
        # a name that is not UTF-8 is written with \udc.. for each of its bytes
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "reason"])
            for number in range(self.count):
                broken = self.read(number, []).broken
                writer.writerows(broken)
                count += len(broken)
        if count:
            temporary.replace(path)
        return count

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.npz"


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_parquet(parts: Parts, file: Path, info: dict[str, Any]) -> None:
    """Join parts to a Parquet file; ``info`` becomes JSON in its metadata, under the key "simo_lightning"."""
    arrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    writer = None
    for columns in parts.groups():
        arrays = {name: _arrow_array(arrow, values) for name, values in columns.items()}
        table = arrow.table(arrays).replace_schema_metadata({"simo_lightning": json.dumps(info)})
        if writer is None:
            writer = parquet.ParquetWriter(file, table.schema, compression="zstd", use_dictionary=["class"])
        writer.write_table(table, row_group_size=len(table))
    assert writer is not None
    writer.close()


def _arrow_array(arrow: Any, values: np.ndarray) -> Any:
    if values.ndim == 2:
        return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
    return arrow.array(values.tolist(), arrow.string()) if values.dtype.kind == "U" else arrow.array(values)


def write_npz(parts: Parts, file: Path, info: dict[str, Any]) -> None:
    """Join parts to an .npz file, array by array; ``info`` becomes the JSON text ``info``."""
    total = sum(parts.rows())
    first = next(parts.groups())
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, values in first.items():
            dtype = max((group[name].dtype for group in parts.groups([name, "path"])), key=lambda each: each.itemsize)
            with archive.open(zipfile.ZipInfo(f"{NPZ_NAMES[name]}.npy"), "w", force_zip64=True) as output:
                shape = (total, *values.shape[1:])
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(output, header)
                for group in parts.groups([name, "path"]):
                    output.write(np.ascontiguousarray(group[name], dtype=dtype).tobytes())
        for name, text in (("info", json.dumps(info)), ("class_names", info["class_names"] or [])):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as output:
                np.lib.format.write_array(output, np.array(text, dtype=np.str_), allow_pickle=False)


WRITERS: dict[str, Callable[[Parts, Path, dict[str, Any]], None]] = {".parquet": write_parquet, ".npz": write_npz}
