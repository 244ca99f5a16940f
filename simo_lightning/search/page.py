"""The results of a search as one HTML file."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from simo_lightning.preprocessing import Decoder
from simo_lightning.search.images import SearchResult

_SIDE = 240  # pixels of a thumbnail, which is shown at 120 to 180


def write_page(path: str | Path, results: Sequence[SearchResult], index: str | Path) -> None:
    """Write one HTML file with the queries, their neighbours and a thumbnail of each. It loads nothing else.

    Args:
        path: File, which is replaced.
        results: The neighbours of each query.
        index: File that was searched, for the heading.

    Raises:
        OSError: If the file cannot be written.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template)
    path = Path(path).expanduser()
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(page.generate(index=os.path.basename(index), results=_with_pictures(results)))
    temporary.replace(path)


def _with_pictures(results: Sequence[SearchResult]) -> Iterator[tuple[SearchResult, str | None, list[str | None]]]:
    """Each result with the thumbnails of its query and matches, one query in memory at a time."""
    for result in results:
        yield result, thumbnail(result.query), [thumbnail(match.path) for match in result.matches]


def thumbnail(path: str | Path) -> str | None:
    """A small JPEG picture of an image file as a ``data:`` address; None if the file cannot be read."""
    try:
        picture, _ = Decoder()(path, (_SIDE, _SIDE))
    except (OSError, ValueError):
        return None
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
