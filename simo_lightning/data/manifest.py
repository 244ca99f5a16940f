"""A table of image files: CSV or Parquet with the columns path, label, and optionally split and coarse."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from simo_lightning.data.folder import SPLIT_NAMES, Listing, list_files, list_image_folder
from simo_lightning.data.sources import Split, name_list
from simo_lightning.extras import missing_extra
from simo_lightning.preprocessing import Preprocessing

COLUMNS = ("path", "label", "split", "coarse")
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


@dataclass(frozen=True)
class Table:
    """Columns of text of a table file.

    Args:
        file: The file.
        columns: Values of each column, stripped; an empty string where there is none. Names in lower case.
        rows: Where each row stands in the file: line of a CSV file, number of a row of a Parquet file, from 1.
        unit: "line" or "row".
    """

    file: Path
    columns: dict[str, list[str]]
    rows: Sequence[int]
    unit: str

    def refuse(self, found: Sequence[int], problem: str) -> None:
        """Raise ValueError if any row was found, naming the first and the number of others."""
        if found:
            others = f" (and {len(found) - 1:,} more rows)" if len(found) > 1 else ""
            raise ValueError(f"manifest {str(self.file)!r}, {self.unit} {self.rows[found[0]]}: {problem}{others}")


@dataclass(frozen=True)
class Manifest:
    r"""Image files and their classes, from a CSV or Parquet file.

    Args:
        table: The file's content.
        root: Folder of relative paths.
        splits: Split of each row.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> written = (folder / "labels.csv").write_text("path,label\na.jpg,cat\nb.jpg,dog\n")
        >>> read_manifest(folder / "labels.csv").classes("train")
        ['cat', 'dog']
    """

    table: Table
    root: Path
    splits: list[Split]

    def classes(self, split: Split) -> list[str]:
        """Names of the classes of one split, sorted."""
        return sorted(
            {label for label, own in zip(self.table.columns["label"], self.splits, strict=True) if own == split}
        )

    def listing(self, split: Split, decoder: Preprocessing, skip: bool = False) -> Listing | None:
        """The images of one split.

        Args:
            split: The split.
            decoder: Reads a file.
            skip: Whether files that do not exist are left out; otherwise they are an error.

        Returns:
            The images; None if no row belongs to the split. The images of "unknown" are one class of that name.

        Raises:
            ValueError: If a file does not exist or is not a file, or none is left.
        """
        rows = [row for row, own in enumerate(self.splits) if own == split]
        if not rows:
            return None
        paths, labels = self.table.columns["path"], self.table.columns["label"]
        missing = {row for row in rows if not _is_file(os.path.join(self.root, paths[row]))}
        found = [row for row in rows if row not in missing]
        if missing and not (skip and found):
            first = sorted(missing)
            self.table.refuse(first, f"path must be a file, relative to {str(self.root)!r}, got {paths[first[0]]!r}")
        classes = ["unknown" if split == "unknown" else labels[row] for row in found]
        images = list_files(self.root, [paths[row] for row in found], classes, decoder)
        return Listing(images, missing=sorted(paths[row] for row in missing))

    def coarse(self) -> dict[str, str]:
        """Coarse class of each class of the training split, from the column "coarse".

        Raises:
            ValueError: If there is no such column, or a class of the training split has no or several coarse classes.
        """
        if "coarse" not in self.table.columns:
            raise ValueError(f"coarse 'manifest' requires a column 'coarse' in {str(self.table.file)!r}")
        labels, coarse = self.table.columns["label"], self.table.columns["coarse"]
        found: dict[str, str] = {}
        for row, split in enumerate(self.splits):
            if split == "train" and (not coarse[row] or found.setdefault(labels[row], coarse[row]) != coarse[row]):
                self.table.refuse(
                    [row],
                    f"coarse must be one name for all images of class {labels[row]!r}, got {coarse[row]!r}"
                    + (f" and {found[labels[row]]!r}" if labels[row] in found else ""),
                )
        return found


def read_manifest(path: str | Path, data_dir: str | Path | None = None) -> Manifest:
    """Read a manifest and check all of it but the existence of the files.

    Args:
        path: CSV or Parquet file (suffix .parquet or .pq) with the columns path and label, and optionally split and
            coarse, named in any case and order; other columns are not used. Looked up in the working directory, then in
            ``data_dir``. A CSV file is UTF-8 and separated by commas, semicolons or tabs.
        data_dir: Folder of relative paths; None: the folder of the manifest.

    Returns:
        The manifest; without a column "split" all rows are the training split.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If a Parquet file is given and pyarrow is not installed.
        ValueError: If the file is not a table, a column is missing or repeated, a path or label is empty, a split is
            unknown, or two rows name the same file; the message gives the row.
    """
    table = read_table(path, data_dir)
    for name in ("path", "label"):
        if name not in table.columns:
            raise ValueError(
                f"manifest {str(table.file)!r} must have the columns path and label, got {name_list(table.columns)}"
            )
    root = table.file.parent if data_dir is None else Path(data_dir).expanduser().absolute()
    splits = _splits(table)
    paths, labels = table.columns["path"], table.columns["label"]
    table.refuse([row for row, name in enumerate(paths) if not name], "path must not be empty")
    empty = [row for row, name in enumerate(labels) if not name and splits[row] != "unknown"]
    table.refuse(empty, "label must not be empty")
    _check_unique(table, root)
    counts = {split: splits.count(split) for split in SPLIT_NAMES if split in splits}
    unused = [name for name in table.columns if name not in COLUMNS]
    rank_zero_info(
        f"{str(table.file)!r}: "
        + ", ".join(f"{count:,} images in the {split} split" for split, count in counts.items())
        + (f"; columns not used: {name_list(unused)}" if unused else "")
    )
    return Manifest(table, root, splits)


def list_split(
    found: Manifest | dict[Split, Path],
    split: Split,
    decoder: Preprocessing,
    class_level: int | None = None,
    skip: bool = False,
) -> Listing | None:
    """List the images of one split of a manifest, or of the folders of splits.

    Args:
        found: The manifest, or what ``find_splits`` returns.
        split: The split.
        decoder: Reads a file.
        class_level: See ``list_image_folder``; not used with a manifest.
        skip: Whether files that are no images, or do not exist, are left out; otherwise they are an error.

    Returns:
        The images; None if there is no such split. The images of "unknown" are one class of that name.
    """
    if isinstance(found, Manifest):
        return found.listing(split, decoder, skip)
    if split not in found:
        return None
    return list_image_folder(found[split], decoder, class_level, skip, "unknown" if split == "unknown" else None)


def read_coarse(path: str | Path, data_dir: str | Path | None = None) -> dict[str, str]:
    """Coarse class of each class, from a CSV or Parquet file with the columns label and coarse.

    A CSV file of two columns needs no header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing, a value is empty, or a class has two coarse classes.
    """
    table = read_table(path, data_dir, headless=("label", "coarse"))
    if not {"label", "coarse"} <= table.columns.keys():
        raise ValueError(f"coarse file {str(table.file)!r} must have the columns label and coarse")
    found: dict[str, str] = {}
    for row, (label, coarse) in enumerate(zip(table.columns["label"], table.columns["coarse"], strict=True)):
        if not label or not coarse or found.setdefault(label, coarse) != coarse:
            table.refuse([row], f"each label must have one coarse class, got {coarse!r} for {label!r}")
    return found


def read_table(path: str | Path, data_dir: str | Path | None = None, headless: Sequence[str] | None = None) -> Table:
    """Columns of a CSV or Parquet file as text.

    Args:
        path: The file, looked up in the working directory, then in ``data_dir``.
        data_dir: See ``path``.
        headless: Names of the columns of a CSV file whose first line holds none of them.
    """
    given = Path(path).expanduser()
    tried = [given.absolute()] + ([Path(data_dir).expanduser().absolute() / given] if data_dir is not None else [])
    file = next((each for each in tried if each.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no file {' nor '.join(repr(str(each)) for each in dict.fromkeys(tried))}")
    if file.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(file)
    return _read_csv(file, headless)


def _read_csv(file: Path, headless: Sequence[str] | None) -> Table:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            delimiter = max(",;\t", key=first.count)  # a comma if there is none
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            rows, numbers = [], []
            for row in reader:
                if any(value.strip() for value in row):
                    rows.append([value.strip() for value in row])
                    numbers.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"manifest {str(file)!r} is not a CSV file in UTF-8: {error}") from error
    names = [name.lower() for name in rows[0]] if rows else []
    if headless is not None and len(names) == len(headless) and not set(headless) & set(names):
        names = list(headless)
    else:
        rows, numbers = rows[1:], numbers[1:]
    _check_columns(file, names)
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(names):
            raise ValueError(
                f"manifest {str(file)!r}, line {number}: must have {len(names)} values as the header, got {len(row)}"
            )
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in names]
    return Table(file, dict(zip(names, columns, strict=True)), numbers, "line")


def _read_parquet(file: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError(missing_extra(str(error)) or str(error)) from error
    try:
        source = pyarrow.parquet.ParquetFile(file)
        names = [name.strip().lower() for name in source.schema_arrow.names]
        _check_columns(file, names)
        used = [name for name, lower in zip(source.schema_arrow.names, names, strict=True) if lower in COLUMNS]
        table = source.read(columns=used)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"manifest {str(file)!r} is not a Parquet file that can be read: {error}") from error
    columns: dict[str, list[str]] = {name: [] for name in names}
    columns |= {name.strip().lower(): [_text(value) for value in table[name].to_pylist()] for name in used}
    return Table(file, columns, range(1, table.num_rows + 1), "row")


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _check_columns(file: Path, names: Sequence[str]) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"manifest {str(file)!r} must name each column once, got {name_list(repeated)} twice")


def _splits(table: Table) -> list[Split]:
    if "split" not in table.columns:
        return ["train"] * len(table.rows)
    given = table.columns["split"]
    wrong = [row for row, name in enumerate(given) if name.lower() not in SPLIT_OF]
    if wrong:
        table.refuse(wrong, f"split must be one of {', '.join(SPLIT_OF)}, got {given[wrong[0]]!r}")
    return [SPLIT_OF[name.lower()] for name in given]


def _check_unique(table: Table, root: Path) -> None:
    """Refuse a file named twice: it would be trained on twice, or be in two splits."""
    first: dict[str, int] = {}
    for row, name in enumerate(table.columns["path"]):
        place = os.path.normpath(os.path.join(root, name))
        if place in first:
            table.refuse(
                [row], f"path must be named once, got {name!r} again after {table.unit} {_row(table, first[place])}"
            )
        first[place] = row


def _row(table: Table, row: int) -> int:
    return table.rows[row]


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def coarse_classes(coarse_of: dict[str, str], class_names: Iterable[str], origin: str) -> dict[str, list[str]]:
    """Classes of each coarse class, both sorted by name.

    Raises:
        ValueError: If a class has no coarse class; the message gives ``origin``.
    """
    names = sorted(class_names)
    missing = [name for name in names if name not in coarse_of]
    if missing:
        raise ValueError(f"coarse {origin!r} must give the coarse class of every class, but lacks {name_list(missing)}")
    members: dict[str, list[str]] = {coarse: [] for coarse in sorted({coarse_of[name] for name in names})}
    for name in names:
        members[coarse_of[name]].append(name)
    return members
