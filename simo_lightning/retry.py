"""Reading and writing on a file system that is away for a moment, such as a network share."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RETRY_SECONDS = 60.0
# A file system that does not answer, is gone, or is mounted read-only after an error. A full disk is not among them: it
# does not empty by itself.
_LOST = frozenset(
    {errno.EIO, errno.ENXIO, errno.ENODEV, errno.EROFS, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ENOTCONN, errno.ESTALE, getattr(errno, "EREMOTEIO", errno.EIO)}
)
_logger = logging.getLogger(__name__)


def is_lost(error: BaseException, path: Path) -> bool:
    """Whether an error says that the file system of a path is away, rather than that the path is wrong.

    Args:
        error: What reading or writing the path raised.
        path: File. If it is missing, its file system counts as away when its folder is missing too.

    Returns:
        False for every error that is not the operating system's.
    """
    if not isinstance(error, OSError):
        return False
    return error.errno in _LOST or (error.errno == errno.ENOENT and not path.parent.exists())


def retry_while_lost(
    action: Callable[[], Any],
    path: str | Path,
    seconds: float | None = None,
    largest: Callable[[int], int] = int,
) -> Any:
    """Do something with a file, and again while its file system is away.

    The pauses are 1, 2, 4 and then 8 seconds. One line is printed at the first failure, and one when it is over.

    Args:
        action: Reads or writes the file, from the beginning each time.
        path: File in a folder that exists.
        seconds: After which the error is raised; None: ``RETRY_SECONDS``, a minute.
        largest: Largest of one number per process, if all processes act together and must agree on the outcome.

    Returns:
        What ``action`` returned.

    Raises:
        OSError: If the file system does not come back in time, or another process failed; and any error of ``action``
            that has another reason, at once.

    Example:
        >>> retry_while_lost(lambda: 1, "file")
        1
    """
    path, seconds, start, pause = Path(path), RETRY_SECONDS if seconds is None else seconds, time.monotonic(), 1.0
    while True:
        error, failure = None, 0
        try:
            result = action()
        except Exception as caught:
            error = caught
            in_time = time.monotonic() + pause <= start + seconds
            failure = 1 if in_time and is_lost(caught, path) else 2
        failure = largest(failure)
        if failure == 0:
            if pause > 1:
                _logger.warning("%s can be used again after %.0f s", path, time.monotonic() - start)
            return result
        if failure == 2:
            raise error or OSError(errno.EIO, f"{path} failed on another process")
        if pause == 1 and error is not None:
            _logger.warning("%s: trying again for %.0f s", _named(error, path), seconds)
        time.sleep(pause)
        pause = min(2 * pause, 8.0)


def _named(error: Exception, path: Path) -> str:
    """The error with the name of the file."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text if str(path) in text else f"{path}: {text}"
