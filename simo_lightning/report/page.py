"""The report as one HTML file that contains its pictures."""

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from simo_lightning.plotting.canvas import printable
from simo_lightning.report.pictures import Section
from simo_lightning.report.rows import MetricRow


def write_page(
    folder: Path, title: str, details: Mapping[str, str], rows: Sequence[MetricRow], sections: Sequence[Section]
) -> Path:
    """Write ``index.html``, which contains its pictures and loads nothing.

    Args:
        folder: Must exist.
        title: Of the page.
        details: Run, checkpoint, data and so on, by name. Text of all arguments is escaped, and characters that cannot
            be printed are shown as their codes.
        rows: The metrics table.
        sections: The pictures, read from their files.

    Returns:
        The file.

    Raises:
        OSError: If a picture cannot be read or the page cannot be written.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_one_line
    )
    environment.filters["data_uri"] = _data_uri
    text = environment.from_string(template).render(title=title, details=details, rows=rows, sections=sections)
    path = folder / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def _one_line(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _data_uri(path: Path) -> str:
    """The file as a data URI, ``data:image/png;base64,...``."""
    mime_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
