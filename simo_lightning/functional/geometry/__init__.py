"""Geometry of labelled embeddings, nearly all of it an exact function of the class moments.

Shapes: D dimensions, C classes of which P have rows. A value is a scalar in the dtype of the moments, or ``(C,)`` where
the name begins with ``class_``; undefined is ``nan``, never a flattering 0. A difference that the rounding of the sums
alone explains counts as zero.
"""

from collections.abc import Callable

from torch import Tensor

from simo_lightning.functional.geometry.heads import nc3, nearest_mean_predict
from simo_lightning.functional.geometry.means import (
    centered_cosine,
    centered_cosine_max,
    equiangularity,
    equinorm,
    orthogonality,
    orthogonality_max,
    simplex_deviation,
)
from simo_lightning.functional.geometry.norms import class_norm_spread, class_rms_norm, norm_spread, rms_norm
from simo_lightning.functional.geometry.spectrum import (
    class_participation,
    effective_rank,
    leakage,
    participation,
    singular_values,
    stable_rank,
)
from simo_lightning.functional.geometry.sphere import uniformity
from simo_lightning.functional.geometry.spread import (
    alignment,
    class_variance_across,
    class_variance_along,
    nc1,
    variance_across,
    variance_along,
    within_between,
)
from simo_lightning.functional.moments import ClassMoments

#: Every scalar function of the class moments alone, by the name it is logged under.
GEOMETRY: dict[str, Callable[[ClassMoments], Tensor]] = {
    "alignment": alignment,
    "centered_cosine": centered_cosine,
    "centered_cosine_max": centered_cosine_max,
    "effective_rank": effective_rank,
    "equiangularity": equiangularity,
    "equinorm": equinorm,
    "leakage": leakage,
    "nc1": nc1,
    "norm_spread": norm_spread,
    "orthogonality": orthogonality,
    "orthogonality_max": orthogonality_max,
    "participation": participation,
    "rms_norm": rms_norm,
    "simplex_deviation": simplex_deviation,
    "stable_rank": stable_rank,
    "variance_across": variance_across,
    "variance_along": variance_along,
    "within_between": within_between,
}

__all__ = [
    "GEOMETRY",
    "alignment",
    "centered_cosine",
    "centered_cosine_max",
    "class_norm_spread",
    "class_participation",
    "class_rms_norm",
    "class_variance_across",
    "class_variance_along",
    "effective_rank",
    "equiangularity",
    "equinorm",
    "leakage",
    "nc1",
    "nc3",
    "nearest_mean_predict",
    "norm_spread",
    "orthogonality",
    "orthogonality_max",
    "participation",
    "rms_norm",
    "simplex_deviation",
    "singular_values",
    "stable_rank",
    "uniformity",
    "variance_across",
    "variance_along",
    "within_between",
]
