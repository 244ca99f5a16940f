"""What the images of a split are called."""

from pathlib import Path
from typing import Any


def file_names(source: Any, count: int) -> list[str] | None:
    """Folder and name of the file of each image, such as ``cat/1.jpg``.

    Args:
        source: Of images, such as the data set of a loader: one of those of ``simo_lightning.data``, or any with a
            method ``path`` from an index to a file.
        count: Number of images.

    Returns:
        Names of images 0 to ``count - 1``; None if not all are files.
    """
    found = [_path(source, index) for index in range(count)]
    if any(path is None for path in found):
        return None
    return ["/".join(path.parts[-2:]) for path in found if path is not None]


def _path(source: Any, index: int) -> Path | None:
    while not callable(getattr(source, "path", None)):
        if callable(getattr(source, "locate", None)):  # of several sources
            source, index = source.locate(index)
        elif hasattr(source, "files"):  # decoded into memory
            source = source.files
        elif hasattr(source, "source"):  # with other labels
            source = source.source
        else:
            return None
    return Path(source.path(index)) if 0 <= index < len(source) else None
