"""A file lock between processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_one_process(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock, which ends with the process however that ends.

    Args:
        lock: File of the lock, which is created.
        what: What is written under the lock, for the message.

    Raises:
        ValueError: If another process holds it.
    """
    with lock.open("w") as file:
        if fcntl is not None:
            try:  # not flock, which a worker that outlives a killed process would keep
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{what} is being written by another process") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
