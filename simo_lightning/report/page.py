"""The report as one HTML file that contains its pictures."""

import base64
import mimetypes
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from simo_lightning.plotting.canvas import printable
from simo_lightning.report.contents import Contents
from simo_lightning.report.interactive import as_json, bokeh_script

_VERDICTS = {"good": "Good", "watch": "Worth a look", "bad": "Poor", "undefined": "Undefined"}


def write_page(folder: Path, title: str, details: Mapping[str, str], contents: Contents) -> Path:
    """Write ``index.html``, which contains its pictures and loads nothing.

    Args:
        folder: Must exist.
        title: Of the page.
        details: Run, checkpoint, data and so on, by name. Text of all arguments is escaped, and characters that cannot
            be printed are shown as their codes.
        contents: Numbers, pictures, which are read from their files, rows of images and the map.

    Returns:
        The file.

    Raises:
        OSError: If a picture cannot be read or the page cannot be written.
    """
    path = folder / "index.html"
    bokeh = Markup(bokeh_script()) if contents.data else ""  # not of a user
    render_page(path, "page.html", title=title, details=details, contents=contents, bokeh=bokeh)
    return path


def render_page(path: Path, template: str, **values: Any) -> None:
    """Write a page.

    Args:
        path: File to write.
        template: File of this package.
        values: Of the template.

    Raises:
        OSError: If a picture cannot be read or the page cannot be written.
    """
    package = files(__package__)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_one_line,
        loader=FunctionLoader(lambda name: package.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["as_json"] = lambda value: Markup(as_json(value))  # has no character of HTML
    text = environment.get_template(template).render(verdicts=_VERDICTS, **values)
    path.write_text(text, encoding="utf-8")


def _one_line(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data_uri(path: Path) -> str:
    """The file as a data URI, ``data:image/png;base64,...``."""
    mime_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
