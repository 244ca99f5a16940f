"""Where a stream lies, a local folder or an S3 bucket, and the local copies of its chunks."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from simo_lightning.extras import import_extra

STREAM_FILE = "stream.json"
TRIES = 5  # attempts to read an object
PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
AT_ONCE = 8  # chunks that one process fetches at the same time
ABANDONED = 3600  # seconds without a change after which a part of a copy belongs to no process any more
MOST_OPEN = 64  # chunks that one process holds open
PIECE = 2**20  # bytes read at once
UNITS = {"": 1, "B": 1, **{f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}}
HEADER = 12  # three uint32 before the leaves of an item: the lengths of image, label and path

Content = TypeVar("Content")


@dataclass(frozen=True)
class StoredFile:
    """A file of a stream.

    Attributes:
        name: Relative to the folder of the stream, parts separated by "/".
        size: Bytes.
        sha256: Hexadecimal digest of its content.
    """

    name: str
    size: int
    sha256: str


class Location:
    """Folder of a stream: local, or ``s3://bucket/prefix`` on any store that speaks the S3 protocol.

    Args:
        url: Local path, or URL.
        storage_options: Arguments of ``boto3.client("s3")``, as in litdata: ``endpoint_url``, ``aws_access_key_id``,
            ``aws_secret_access_key``, ``region_name`` and others. None: those of the environment.

    Raises:
        ModuleNotFoundError: If boto3 is missing for an S3 URL (extra ``stream``).
        ValueError: If the URL has another scheme.
    """

    def __init__(self, url: str | Path, storage_options: Mapping[str, Any] | None = None) -> None:
        scheme = re.match(r"(\w+)://", str(url))
        if scheme is not None and scheme[1] != "s3":
            raise ValueError(f"data_dir must be a local folder or s3://BUCKET/PREFIX, got {str(url)!r}")
        self.is_remote = scheme is not None
        self.url = str(url).rstrip("/") if self.is_remote else str(Path(url).expanduser().absolute())
        self.storage_options = dict(storage_options or {})
        self._client: tuple[int, Any] | None = None  # and the process that made it
        if self.is_remote:
            import_extra("boto3")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def where(self, name: str) -> str:
        """URL or path of a file."""
        return f"{self.url}/{name}" if self.is_remote else os.path.join(self.url, *name.split("/"))

    def read(self, name: str) -> bytes:
        """Content of a small file.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it cannot be read, from a bucket after several attempts.
        """
        if not self.is_remote:
            return Path(self.where(name)).read_bytes()
        return self._get(name, None, b"".join)

    def copy(self, file: StoredFile, path: Path) -> None:
        """Copy a file of a bucket to ``path``, which appears only when its content has been verified.

        Raises:
            OSError: As :meth:`read`, or if ``path`` cannot be written; the message names its folder.
            ValueError: If the object is no longer the one that the stream describes.
        """
        part = path.with_name(f"{path.name}.part")

        def save(pieces: Iterable[bytes]) -> str:
            digest = hashlib.sha256()
            with open(part, "r+b", buffering=0) as copied:  # not truncated: its size reserves space in the cache
                for piece in pieces:
                    digest.update(piece)
                    _write(copied, piece, f"{self.where(file.name)!r} of {file.size / 2**20:,.1f} MiB")
            return digest.hexdigest()

        part.touch()
        try:
            self._check(file, self._get(file.name, file.size, save))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def verify(self, file: StoredFile) -> None:
        """ValueError if a local file is no longer the one that the stream describes."""
        self._check(file, hashlib.sha256(Path(self.where(file.name)).read_bytes()).hexdigest())

    def _check(self, file: StoredFile, digest: str) -> None:
        if digest != file.sha256:
            raise ValueError(self._changed(file.name, file.size, "its SHA-256 differs"))

    def _get(self, name: str, size: int | None, use: Callable[[Iterable[bytes]], Content]) -> Content:
        """What ``use`` makes of the pieces of an object; it is called again, later each time, if the connection breaks.

        Raises:
            OSError: After the last try; at once if the store refuses.
            ValueError: If the object does not have ``size`` bytes.
        """
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                return use(self._pieces(name, size))
            except _BrokenConnection as error:
                failure = error
        raise OSError(f"{self.where(name)!r} cannot be read after {TRIES} tries: {failure}") from failure

    def _pieces(self, name: str, size: int | None) -> Iterator[bytes]:
        """The content of an object as it arrives."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        try:
            answer = self.connect().get_object(Bucket=bucket, Key=f"{prefix}/{name}".lstrip("/"))
            length, received = answer["ContentLength"], 0
            if size is not None and length != size:
                raise ValueError(self._changed(name, size, f"it has {length:,} bytes"))
            while piece := answer["Body"].read(PIECE):
                received += len(piece)
                yield piece
        except NoCredentialsError as error:
            raise OSError(f"{self.where(name)!r} cannot be read: {error}; see storage_options") from error
        except ClientError as error:
            status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
            if status == 404:
                raise FileNotFoundError(errno.ENOENT, "there is no such object", self.where(name)) from error
            if status < 500 and status != 429:
                raise OSError(f"{self.where(name)!r} cannot be read: {error}; see storage_options") from error
            raise _BrokenConnection(error) from error
        except (BotoCoreError, OSError) as error:
            raise _BrokenConnection(error) from error
        if received < length:
            raise _BrokenConnection(f"the connection ended after {received:,} of {length:,} bytes")

    def _changed(self, name: str, size: int, found: str) -> str:
        return (
            f"{self.where(name)!r} is not the file of {size:,} bytes that {STREAM_FILE} describes, {found}: it has "
            "changed or is damaged; restore it, or write the stream again"
        )

    def connect(self) -> Any:
        """The S3 client of this process: connections cannot be shared with a forked one."""
        if self._client is None or self._client[0] != os.getpid():
            import boto3
            from botocore.config import Config

            once = Config(
                retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=30, max_pool_connections=AT_ONCE
            )
            options = {**self.storage_options}
            given = options.pop("config", None)
            self._client = (os.getpid(), boto3.client("s3", **options, config=once.merge(given) if given else once))
        return self._client[1]


class _BrokenConnection(Exception):
    """Another try may succeed."""


def _write(file: Any, piece: bytes, what: str) -> None:
    """Write a piece to a file in the cache; an error names the cache."""
    try:
        while piece:
            piece = piece[file.write(piece) :]
    except OSError as error:
        raise OSError(
            error.errno,
            f"cache_dir {str(Path(file.name).parent)!r} cannot take {what}: {error.strerror}; free space on its disk, "
            "or set a smaller max_cache_size or another cache_dir",
        ) from error


class Chunks:
    """The chunks of one split: read where they are, or from copies in a cache whose size is bounded.

    The copies of a bucket's chunks lie in ``cache_dir``, named by their content. All processes of a node share it:
    a chunk that several need is fetched once, and where a further one would exceed ``max_bytes`` the copies that were
    used least recently are removed first. A process that still reads one of them keeps it until it is done.
    Every chunk is verified by its SHA-256: a copy when it is fetched, a local one when a process first opens it.

    Args:
        location: Folder of the stream.
        files: The chunks in order.
        counts: Number of images of each.
        cache_dir: Folder of the copies, not used for a local stream.
        max_bytes: Largest size of all copies together.
    """

    def __init__(
        self, location: Location, files: Sequence[StoredFile], counts: Sequence[int], cache_dir: Path, max_bytes: int
    ) -> None:
        self.location, self.files, self.counts = location, list(files), list(counts)
        self.cache_dir, self.max_bytes = cache_dir, max_bytes
        self._open: OrderedDict[int, _OpenChunk] = OrderedDict()
        self._verified: set[int] = set()  # local chunks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_verified": set()}

    def where(self, chunk: int, item: int) -> str:
        """Where an image lies, for messages."""
        return f"{self.location.where(self.files[chunk].name)}, item {item}"

    def fetch(self, chunks: Iterable[int]) -> None:
        """Bring all of these chunks near, several at once; those that were open and are no longer needed are closed."""
        needed = dict.fromkeys(chunks)
        if self.location.is_remote:
            self.location.connect()  # a client may be used, but not made, by several threads
        for chunk in [chunk for chunk in self._open if chunk not in needed]:
            if self._open[chunk].removed:
                self._open.pop(chunk).close()  # its space on the disk becomes free
        missing = [chunk for chunk in needed if chunk not in self._open]
        if len(missing) > 1 and self.location.is_remote:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(self._path, missing):
                    pass
        for chunk in missing:
            self._opened(chunk)

    def image(self, chunk: int, item: int) -> bytes:
        """Bytes of the image file number ``item`` of a chunk.

        Raises:
            OSError: If the chunk cannot be read or copied.
            ValueError: If it is no longer the one that the stream describes.
        """
        return self._opened(chunk).image(item)

    def _opened(self, chunk: int) -> _OpenChunk:
        found = self._open.get(chunk)
        if found is not None and not self.location.is_remote and found.changed:
            self._verified.discard(chunk)
            self._open.pop(chunk).close()
            found = None
        if found is None:
            found = self._open[chunk] = self._open_one(chunk)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(chunk)
        return found

    def _open_one(self, chunk: int) -> _OpenChunk:
        for _ in range(TRIES):
            path = self._path(chunk)
            try:
                return _OpenChunk(path, self.counts[chunk])
            except FileNotFoundError:  # a copy that another process has just removed
                continue
        raise OSError(
            f"{str(path)!r} was removed {TRIES} times before it was read: max_cache_size is too small for the "
            "processes that share cache_dir"
        )

    def _path(self, chunk: int) -> Path:
        """A verified local file of a chunk."""
        file = self.files[chunk]
        if not self.location.is_remote:
            path = Path(self.location.where(file.name))
            if chunk not in self._verified:
                self.location.verify(file)
                self._verified.add(chunk)
            return path
        path = self.cache_dir / f"{file.sha256}.bin"
        if not _touch(path, file.size):
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not _touch(path, file.size):
                    self._make_room(path.with_name(f"{path.name}.part"), file.size)
                    self.location.copy(file, path)
        return path

    def _make_room(self, part: Path, size: int) -> None:
        """Reserve space for a further copy: remove those that were used least recently until it fits."""
        with FileLock(self.cache_dir / "room.lock"):
            with open(part, "wb") as reserved:
                reserved.truncate(size)
            copies = []
            for entry in os.scandir(self.cache_dir):
                if entry.name.endswith((".bin", ".part")):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # finished by another process
                        continue
                    copies.append((status.st_mtime, Path(entry.path), status.st_size))
            total = sum(each for _, _, each in copies)
            for modified, path, each in sorted(copies):
                if total <= self.max_bytes:
                    return
                if path.suffix == ".bin" or time.time() - modified > ABANDONED:
                    path.unlink(missing_ok=True)
                    total -= each


class _OpenChunk:
    """A chunk file in litdata's layout: the number N of items, N + 1 offsets, all uint32, then the items.

    An item is three uint32, the lengths of its leaves, and then these: the image file, the label and the path. It is
    read by ``pread`` rather than mapped, so that what was read does not stay in the memory of the process.
    """

    _file = -1

    def __init__(self, path: Path, count: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._stamp = self._state()
        table = os.pread(self._file, 4 * (count + 2), 0)
        if len(table) != 4 * (count + 2) or struct.unpack_from("<I", table)[0] != count:
            self.close()
            raise ValueError(f"{str(path)!r} must be a chunk of {count:,} items, but its header differs")
        self._offsets = np.frombuffer(table, dtype="<u4", offset=4)

    def __del__(self) -> None:
        self.close()

    @property
    def changed(self) -> bool:
        """Whether the file was written to since it was opened."""
        return self._state() != self._stamp

    @property
    def removed(self) -> bool:
        """Whether the file no longer has a name."""
        return os.fstat(self._file).st_nlink == 0

    def image(self, item: int) -> bytes:
        start, end = self._offsets[item : item + 2].tolist()
        content = os.pread(self._file, end - start, start)
        (length,) = struct.unpack_from("<I", content)
        return content[HEADER : HEADER + length]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


def _touch(path: Path, size: int) -> bool:
    """Whether a whole copy is there; if so it counts as used now."""
    try:
        whole = path.stat().st_size == size
        if whole:
            os.utime(path)
    except FileNotFoundError:
        return False
    return whole


def parse_size(value: int | str) -> int:
    """Bytes of a size such as ``"100GB"``, ``"1.5 TB"`` or a number of bytes; KB, MB, GB and TB are powers of 1000.

    Raises:
        ValueError: If it is not such a size, or not positive.

    Example:
        >>> parse_size("1.5GB")
        1500000000
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?B?)\s*", str(value).upper())
    try:
        size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f"max_cache_size must be a size such as '100GB' or a number of bytes, got {value!r}")
    return size
