"""The image files that a command was given, as a list on disk: memory does not grow with their number."""

from __future__ import annotations

import csv
import glob
import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from PIL import Image

from simo_lightning.data.folder import IGNORED
from simo_lightning.extras import import_extra
from simo_lightning.preprocessing import FORMATS

TABLES = (".csv", ".parquet", ".pq")
_SORTED_AT_ONCE = 50_000  # names of one folder that are sorted in memory


@dataclass(frozen=True)
class ImageList:
    """Paths of image files, in a file of their own.

    Args:
        file: Holds the paths, each ended by a zero byte.
        count: Number of paths.
        sha256: Digest of the file.
        offsets: Position of every ``part_size``-th path in the file, and the size of the file.
        left_out: Names that are not images, and how often each was found.
    """

    file: Path
    count: int
    sha256: str
    offsets: list[int]
    left_out: Counter[str]

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.offsets) - 1

    def part(self, number: int) -> list[str]:
        """The paths of part ``number``, from 0."""
        start, stop = self.offsets[number : number + 2]
        with self.file.open("rb") as file:
            file.seek(start)
            return [os.fsdecode(path) for path in file.read(stop - start).split(b"\0")[:-1]]


def write_list(
    file: Path, images: Sequence[str | Path], part_size: int, data_dir: str | Path | None = None
) -> ImageList:
    """Write the paths of image files to a file, one by one.

    Args:
        file: Is replaced.
        images: As in :func:`find_images`.
        part_size: Paths of one part of the list.
        data_dir: As in :func:`find_images`.

    Returns:
        The list.

    Raises:
        FileNotFoundError: As :func:`find_images`, or if no image was found.
        OSError: As :func:`find_images`.
        ValueError: As :func:`find_images`.
    """
    left_out: Counter[str] = Counter()
    digest, offsets, count = hashlib.sha256(), [], 0
    with file.open("wb") as output:
        for path in find_images(images, data_dir, left_out):
            if count % part_size == 0:
                offsets.append(output.tell())
            entry = os.fsencode(path) + b"\0"
            output.write(entry)
            digest.update(entry)
            count += 1
        offsets.append(output.tell())
    if not count:
        names = ", ".join(repr(str(each)) for each in images[:3])
        raise FileNotFoundError(f"no image in {names}{describe_left_out(left_out)}")
    return ImageList(file, count, digest.hexdigest(), offsets, left_out)


def describe_left_out(left_out: Counter[str]) -> str:
    """What was not taken as an image, as the end of a sentence.

    Example:
        >>> describe_left_out(Counter({"*.txt": 2}))
        ' (left out: 2 *.txt)'
    """
    names = ", ".join(f"{count:,} {name}" for name, count in left_out.most_common(5))
    return f" (left out: {names})" if names else ""


def find_images(
    images: Sequence[str | Path], data_dir: str | Path | None = None, left_out: Counter[str] | None = None
) -> Iterator[str]:
    """Paths of image files, in an order that depends on nothing but their names.

    Args:
        images: Each a file, which is taken whatever its suffix; a folder, whose files with the suffix of an image are
            taken at any depth, sorted by name; a pattern such as ``"*/front*.jpg"``, with ``**`` for folders at any
            depth; or a table, CSV or Parquet, with a column "path".
        data_dir: Folder of the relative paths in a table; None: that of the table.
        left_out: Counts the files of folders that are not taken.

    Yields:
        Paths, relative if the folder, pattern or table was. A file that is named twice is yielded twice.

    Raises:
        FileNotFoundError: If there is no such file, folder or match.
        OSError: If a folder cannot be read.
        ValueError: If a table cannot be read or has no column "path", or a link leads back to a folder that contains
            it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.jpg", "a.png", "notes.txt"):
        ...     (folder / name).touch()
        >>> [os.path.basename(path) for path in find_images([folder])]
        ['a.png', 'b.jpg']
    """
    left_out = Counter() if left_out is None else left_out
    for each in images:
        path = os.path.expanduser(os.fspath(each))
        if os.path.exists(path):
            yield from _of_path(path, data_dir, left_out)
            continue
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
        if not matches:
            raise FileNotFoundError(f"no file, folder or match of {path!r}")
        for match in matches:
            yield from _of_path(match, data_dir, left_out)


def _of_path(path: str, data_dir: str | Path | None, left_out: Counter[str]) -> Iterator[str]:
    if os.path.isdir(path):
        yield from _of_folder(path, frozenset(), left_out)
    elif not os.path.isfile(path):
        raise ValueError(f"{path!r} is neither a file nor a folder")
    elif path.lower().endswith(TABLES):
        root = os.path.dirname(path) if data_dir is None else os.path.expanduser(os.fspath(data_dir))
        rows = _of_csv(path) if path.lower().endswith(".csv") else _of_parquet(path)
        for number, name in enumerate(rows, 1):
            if not name:
                raise ValueError(f"{path!r}, row {number}: path must not be empty")
            yield os.path.join(root, name)
    else:
        yield path


def _of_folder(folder: str, parents: frozenset[str], left_out: Counter[str]) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in parents:
        raise ValueError(f"link {folder!r} leads back to a folder that contains it; remove it")
    for name, is_folder in _sorted_entries(folder, left_out):
        path = os.path.join(folder, name)
        if is_folder:
            yield from _of_folder(path, parents | {here}, left_out)
        else:
            yield path


def _sorted_entries(folder: str, left_out: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Names of the images and folders in a folder, sorted, and whether each is a folder.

    A large folder is sorted in blocks, which are merged from temporary files.
    """
    blocks: list[IO[bytes]] = []
    block: list[tuple[bytes, bool]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if (is_folder := _is_folder(entry, left_out)) is not None:
                block.append((os.fsencode(entry.name), is_folder))
                if len(block) == _SORTED_AT_ONCE:
                    blocks.append(_stored(sorted(block)))
                    block = []
    try:
        for name, is_folder in heapq.merge(sorted(block), *map(_read, blocks)):
            yield os.fsdecode(name), is_folder
    finally:
        for file in blocks:
            file.close()


def _is_folder(entry: os.DirEntry[str], left_out: Counter[str]) -> bool | None:
    """Whether an entry is a folder; None if it is neither a folder nor an image, and left out."""
    if entry.name.startswith(".") or entry.name.lower() in IGNORED:
        return None
    if entry.is_dir():
        return True
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in _suffixes() and (entry.is_file() or entry.is_symlink()):  # a broken link is found when it is read
        return False
    left_out[f"*{suffix}" if suffix else entry.name] += 1
    return None


def _stored(block: list[tuple[bytes, bool]]) -> IO[bytes]:
    file = TemporaryFile()  # noqa: SIM115  # closed by _sorted_entries
    file.writelines(b"%d%s\0" % (is_folder, name) for name, is_folder in block)
    file.seek(0)
    return file


def _read(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    rest = b""
    while content := file.read(2**16):
        *entries, rest = (rest + content).split(b"\0")
        for entry in entries:
            yield entry[1:], entry[:1] == b"1"


def _of_csv(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            delimiter = max(",;\t", key=lines.readline().count)
            lines.seek(0)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            column = _column(path, next(rows, []))
            for row in rows:
                if any(row):
                    yield row[column].strip() if column < len(row) else ""
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path!r} is not a CSV file in UTF-8: {error}") from error


def _of_parquet(path: str) -> Iterator[str]:
    arrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = names[_column(path, names)]
            for batch in file.iter_batches(10_000, columns=[name]):
                yield from (str(value or "") for value in batch.column(0).to_pylist())
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path!r} is not a Parquet file that can be read: {error}") from error


def _column(path: str, names: Sequence[str]) -> int:
    lower = [name.strip().lower() for name in names]
    if lower.count("path") != 1:
        raise ValueError(f"table {path!r} must have one column path, got {', '.join(names) or 'none'}")
    return lower.index("path")


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that are read."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
