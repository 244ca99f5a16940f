"""The map and the matrix of cosines as Bokeh documents, which page.js connects with the controls of the page."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simo_lightning.plotting import Projection, class_colors, class_cosines, class_markers
from simo_lightning.plotting.canvas import printable
from simo_lightning.plotting.scatter import square_around

# Of matplotlib's markers, as class_markers gives them.
_MARKERS = {
    "o": "circle",
    "^": "triangle",
    "s": "square",
    "D": "diamond",
    "v": "inverted_triangle",
    "P": "plus",
    "X": "star",
    "<": "hex",
    ">": "square_pin",
    "p": "triangle_pin",
}
_LONGEST_TICK = 22  # characters of a class name at an axis


def has_bokeh() -> bool:
    """Whether the extra ``report`` is installed."""
    return find_spec("bokeh") is not None


def bokeh_script() -> str:
    """The library for the browser, to be part of a page."""
    return files("bokeh").joinpath("server", "static", "js", "bokeh.min.js").read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON for a ``<script>`` element: without ``<``, ``>`` and ``&``, which HTML would read."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def map_document(projections: Mapping[Projection, Tensor], labels: Tensor, num_classes: int) -> dict[str, Any]:
    """The map of all projections as a JSON document of Bokeh.

    Args:
        projections: Points ``(M, 2)`` by projection, of the same images, at least one. The first is shown.
        labels: Class of each point, ``(M,)``.
        num_classes: C.

    Returns:
        For ``Bokeh.embed.embed_item``. The data source "points" has the columns x, y and, for each projection, such as
        pca_x and pca_y; the filters "shown" and "marked" choose the points that are drawn and those on top.
    """
    from bokeh.embed import json_item
    from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, Range1d

    first = next(iter(projections))
    columns: dict[str, Any] = {"label": labels.numpy().astype(np.int32)}
    for name, points in projections.items():
        x, y = points.float().T.contiguous().numpy()
        columns |= {f"{name}_x": x, f"{name}_y": y}
    columns |= {"x": columns[f"{first}_x"], "y": columns[f"{first}_y"]}
    colors, markers = np.array(class_colors(num_classes)), np.array(class_markers(num_classes))
    columns["color"] = colors[labels].tolist()
    columns["marker"] = [_MARKERS[marker] for marker in markers[labels].tolist()]
    source = ColumnDataSource(columns, name="points")
    (left, right), (bottom, top) = square_around(projections[first]).tolist()
    plot = _figure("map", x_range=Range1d(left, right), y_range=Range1d(bottom, top), match_aspect=True)
    plot.axis.visible = False
    plot.grid.visible = False
    size = float(np.interp(len(labels), (200, 2_000, 10_000), (9, 7, 5)))
    everything = np.ones(len(labels), dtype=bool).tolist()
    shown = BooleanFilter(booleans=everything, name="shown")
    marked = BooleanFilter(booleans=[False] * len(labels), name="marked")
    look = {"marker": "marker", "fill_color": "color", "line_color": "#333333", "line_width": 0.4}
    base = plot.scatter("x", "y", source=source, view=CDSView(filter=shown), size=size, alpha=0.8, **look)
    top_points = plot.scatter("x", "y", source=source, view=CDSView(filter=marked), size=size + 2, alpha=1.0, **look)
    base.name, top_points.name = "base", "top"
    document: dict[str, Any] = json_item(plot)
    return document


def matrix_document(means: Tensor, class_names: Sequence[str], order: Tensor) -> dict[str, Any]:
    """The cosines between class means as a JSON document of Bokeh.

    Args:
        means: Class means ``(C, D)``.
        class_names: C names.
        order: Of the classes, from the top and from the left, ``(C,)``.

    Returns:
        For ``Bokeh.embed.embed_item``. The data source "cells" has one image of the cosines times 100, as int8, from
        the bottom row to the top one; -128 stands for an undefined cosine.
    """
    from bokeh.embed import json_item
    from bokeh.models import (
        BasicTicker,
        ColorBar,
        ColumnDataSource,
        LinearColorMapper,
        Range1d,
    )
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    count = len(order)
    cosines = class_cosines(means[order])
    cells = (100 * cosines).round().nan_to_num(nan=-128).to(torch.int8).flip(0).numpy()
    source = ColumnDataSource({"image": [cells], "x": [-0.5], "y": [-0.5], "dw": [count], "dh": [count]}, name="cells")
    plot = _figure("matrix", x_range=Range1d(-0.5, count - 0.5), y_range=Range1d(-0.5, count - 0.5))
    palette = [to_hex(colormaps["RdBu_r"](index / 200)) for index in range(201)]
    mapper = LinearColorMapper(palette=palette, low=-100, high=100, low_color="#bfbfbf")
    plot.image("image", x="x", y="y", dw="dw", dh="dh", source=source, color_mapper=mapper)
    names = [_short(class_names[index]) for index in order.tolist()]
    for axis, labels in ((plot.xaxis[0], names), (plot.yaxis[0], names[::-1])):
        axis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0, desired_num_ticks=20, mantissas=[1, 2, 5])
        axis.major_label_overrides = dict(enumerate(labels))
        axis.major_label_text_font_size = "12px"
    plot.xaxis.major_label_orientation = "vertical"
    bar = ColorBar(
        color_mapper=LinearColorMapper(palette=palette, low=-1, high=1), height=12, title=None, border_line_color=None
    )
    plot.add_layout(bar, "below")
    document: dict[str, Any] = json_item(plot)
    return document


def _figure(name: str, **options: Any) -> Any:
    """A figure as wide as its place, without a logo. It does not react to the wheel, which scrolls the page."""
    from bokeh.models import BoxZoomTool, PanTool, ResetTool, WheelZoomTool, ZoomInTool, ZoomOutTool
    from bokeh.plotting import figure

    pan = PanTool()
    tools = [pan, BoxZoomTool(match_aspect=True), WheelZoomTool(modifiers={"ctrl": True}), ZoomInTool(), ZoomOutTool()]
    plot = figure(
        name=f"{name} plot",
        sizing_mode="stretch_both",
        tools=[*tools, ResetTool()],
        toolbar_location="above",
        output_backend="canvas",
        background_fill_color="white",
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.active_drag = pan
    return plot


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= _LONGEST_TICK else f"{text[: _LONGEST_TICK - 7]}…{text[-6:]}"
