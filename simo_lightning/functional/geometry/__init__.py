"""Geometry of labelled embeddings, nearly all of it an exact function of the class moments.

Shapes: D dimensions, C classes of which P have rows. A value is a scalar in the dtype of the moments, or ``(C,)`` where
the name begins with ``class_``; undefined is ``nan``, never a flattering 0. A difference that the rounding of the sums
alone explains counts as zero.
"""

from collections.abc import Callable

from torch import Tensor

from simo_lightning.functional.geometry.heads import nc3, nearest_class_mean_predict
from simo_lightning.functional.geometry.means import (
    centered_cosine,
    centered_cosine_max,
    class_cosine,
    class_cosine_max,
    equiangularity,
    equinorm,
    simplex_deviation,
)
from simo_lightning.functional.geometry.norms import class_norm_spread, class_rms_norm, norm_spread, rms_norm
from simo_lightning.functional.geometry.spectrum import (
    class_participation_ratio,
    effective_rank,
    participation_ratio,
    singular_values,
    stable_rank,
    subspace_overlap,
)
from simo_lightning.functional.geometry.sphere import uniformity
from simo_lightning.functional.geometry.spread import (
    alignment,
    class_variance_across,
    class_variance_along,
    nc1,
    scatter_ratio,
    variance_across,
    variance_along,
)
from simo_lightning.functional.moments import ClassMoments

#: Every scalar function of the class moments alone, by the name it is logged under.
GEOMETRY: dict[str, Callable[[ClassMoments], Tensor]] = {
    "alignment": alignment,
    "centered_cosine": centered_cosine,
    "centered_cosine_max": centered_cosine_max,
    "class_cosine": class_cosine,
    "class_cosine_max": class_cosine_max,
    "effective_rank": effective_rank,
    "equiangularity": equiangularity,
    "equinorm": equinorm,
    "nc1": nc1,
    "norm_spread": norm_spread,
    "participation_ratio": participation_ratio,
    "rms_norm": rms_norm,
    "scatter_ratio": scatter_ratio,
    "simplex_deviation": simplex_deviation,
    "stable_rank": stable_rank,
    "subspace_overlap": subspace_overlap,
    "variance_across": variance_across,
    "variance_along": variance_along,
}

__all__ = [
    "GEOMETRY",
    "alignment",
    "centered_cosine",
    "centered_cosine_max",
    "class_cosine",
    "class_cosine_max",
    "class_norm_spread",
    "class_participation_ratio",
    "class_rms_norm",
    "class_variance_across",
    "class_variance_along",
    "effective_rank",
    "equiangularity",
    "equinorm",
    "nc1",
    "nc3",
    "nearest_class_mean_predict",
    "norm_spread",
    "participation_ratio",
    "rms_norm",
    "scatter_ratio",
    "simplex_deviation",
    "singular_values",
    "stable_rank",
    "subspace_overlap",
    "uniformity",
    "variance_across",
    "variance_along",
]
