"""The page itself: one HTML file with every picture inside."""

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from simo_lightning.report.pictures import Section
from simo_lightning.report.rows import MetricRow


def write_page(
    folder: Path, title: str, facts: Mapping[str, str], rows: Sequence[MetricRow], sections: Sequence[Section]
) -> Path:
    """Write ``index.html``, which needs no other file: the pictures are in it, and nothing is loaded from anywhere.

    Args:
        folder: Exists.
        title: Of the page.
        facts: What the page is about, by name; any text, escaped here as everything else is.
        rows: The metrics table.
        sections: The pictures; each is read from its file.

    Returns:
        The file.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    text = environment.from_string(template).render(title=title, facts=facts, rows=rows, sections=sections)
    path = folder / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def data_uri(path: Path) -> str:
    """A file as the address of itself.

    Args:
        path: Of a picture, its kind told by its suffix.

    Returns:
        ``data:image/png;base64,...``
    """
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
