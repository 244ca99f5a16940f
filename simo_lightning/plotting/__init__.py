"""Tensors to matplotlib figures; no pyplot, so nothing global and no display."""

from simo_lightning.plotting.animation import save_animation
from simo_lightning.plotting.colors import class_colors, class_markers
from simo_lightning.plotting.frames import Frame, load_frames, pick_frames, save_frame
from simo_lightning.plotting.neighbors import describe_neighbors, neighbors_figure
from simo_lightning.plotting.norms import describe_norms, norms_figure
from simo_lightning.plotting.projections import Projection, project_2d, project_frames, project_wheel
from simo_lightning.plotting.scatter import describe_scatter, scatter_figure
from simo_lightning.plotting.similarity import class_cosines, class_similarity_figure, describe_similarity
from simo_lightning.plotting.spectrum import describe_spectrum, spectrum_figure
from simo_lightning.plotting.strips import describe_strip, strip_figure

__all__ = [
    "Frame",
    "Projection",
    "class_colors",
    "class_cosines",
    "class_markers",
    "class_similarity_figure",
    "describe_neighbors",
    "describe_norms",
    "describe_scatter",
    "describe_similarity",
    "describe_spectrum",
    "describe_strip",
    "load_frames",
    "neighbors_figure",
    "norms_figure",
    "pick_frames",
    "project_2d",
    "project_frames",
    "project_wheel",
    "save_animation",
    "save_frame",
    "scatter_figure",
    "spectrum_figure",
    "strip_figure",
]
