"""Tensors to matplotlib figures, without pyplot: no global state and no display."""

from simo_lightning.plotting.attribution import attribution_figure, describe_attribution
from simo_lightning.plotting.colors import class_colors, class_markers
from simo_lightning.plotting.curves import Curve, curves_figure, describe_curves
from simo_lightning.plotting.neighbors import describe_neighbors, neighbors_figure
from simo_lightning.plotting.norms import describe_norms, norms_figure
from simo_lightning.plotting.projections import Projection, project_2d, project_sequence, star_coordinates
from simo_lightning.plotting.reliability import describe_reliability, reliability_figure
from simo_lightning.plotting.scatter import describe_scatter, scatter_figure
from simo_lightning.plotting.sequence import describe_sequence, save_animation, small_multiples_figure
from simo_lightning.plotting.shares import (
    ShareRow,
    class_shares_figure,
    describe_class_shares,
    describe_shares,
    share_rows,
    shares_figure,
)
from simo_lightning.plotting.similarity import class_cosines, class_similarity_figure, describe_similarity
from simo_lightning.plotting.snapshots import Snapshot, load_snapshots, pick_snapshots, save_snapshot
from simo_lightning.plotting.spectrum import describe_spectrum, spectrum_figure

__all__ = [
    "Curve",
    "Projection",
    "ShareRow",
    "Snapshot",
    "attribution_figure",
    "class_colors",
    "class_cosines",
    "class_markers",
    "class_shares_figure",
    "class_similarity_figure",
    "curves_figure",
    "describe_attribution",
    "describe_class_shares",
    "describe_curves",
    "describe_neighbors",
    "describe_norms",
    "describe_reliability",
    "describe_scatter",
    "describe_sequence",
    "describe_shares",
    "describe_similarity",
    "describe_spectrum",
    "load_snapshots",
    "neighbors_figure",
    "norms_figure",
    "pick_snapshots",
    "project_2d",
    "project_sequence",
    "reliability_figure",
    "save_animation",
    "save_snapshot",
    "scatter_figure",
    "share_rows",
    "shares_figure",
    "small_multiples_figure",
    "spectrum_figure",
    "star_coordinates",
]
