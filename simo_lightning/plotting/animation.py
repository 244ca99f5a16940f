"""The same picture along training: an animation."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.animation import PillowWriter
from torch import Tensor

from simo_lightning.plotting.canvas import new_figure
from simo_lightning.plotting.scatter import legend_rows
from simo_lightning.plotting.strips import Kind, make_reel, name_reel

_DPI = 100  # 500 px wide; a GIF grows with its pixels


def save_animation(
    frames: Sequence[tuple[str, Tensor]],
    path: str | Path,
    labels: Tensor | None,
    class_names: Sequence[str],
    kind: Kind = "points",
    seconds: float = 0.5,
    hold: float = 1.5,
) -> Path:
    """Write frames as a GIF that starts again at its end; its first and last frame stand still for longer.

    Axes, colours and the map to the plane are those of :func:`~simo_lightning.plotting.strip_figure`. Nothing is made
    up between two frames. :func:`~simo_lightning.plotting.describe_strip` says what it shows.

    Args:
        frames: Title and tensor each, as for the strip.
        path: Of the file, ending in .gif; its folder must exist.
        labels: As for the strip.
        class_names: As for the strip.
        kind: As for the strip.
        seconds: That a frame is shown, > 0.
        hold: That the first and the last one are shown, at least `seconds`.

    Returns:
        The path.

    Raises:
        ValueError: If the frames do not fit, or the path does not end in .gif, or the times are not as said.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"path must end in .gif, got {path.name!r}")
    if not 0 < seconds <= hold:
        raise ValueError(f"seconds must be above 0 and at most hold, got seconds={seconds} and hold={hold}")
    reel = make_reel(frames, labels, class_names, kind)
    rows = legend_rows(reel.labels, class_names) if reel.labels is not None else 3
    figure = new_figure(5.0 + 0.2 * rows)
    axes = figure.add_subplot()
    reel.draw(axes, reel.frames[0], 1.0)
    axes.set_title(reel.titles[0], fontsize=11)
    name_reel(figure, reel, class_names)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is laid out once does not jump from frame to frame
    place = axes.get_position()
    writer = PillowWriter(fps=1 / seconds)  # type: ignore[arg-type]  # only divides by it
    with writer.saving(figure, str(path), _DPI):
        for index, (title, frame) in enumerate(zip(reel.titles, reel.frames, strict=True)):
            axes.clear()
            reel.draw(axes, frame, 1.0)
            axes.set_title(title, fontsize=11)
            axes.set_position(place)
            ends = index in (0, len(reel.frames) - 1)
            for _ in range(max(1, round(hold / seconds)) if ends else 1):
                writer.grab_frame()  # equal frames become one that is shown for longer
    return path
