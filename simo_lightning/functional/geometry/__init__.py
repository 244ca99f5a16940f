"""Geometry of labelled embeddings, nearly all of it an exact function of the class moments.

Shapes: D dimensions, C classes of which P have embeddings. A value is a scalar in the dtype of the moments, or ``(C,)``
for the functions of each class (``class_rms_norm`` and so on). Undefined is ``nan``, never a flattering 0. A difference
that the rounding of the sums alone explains counts as zero.

A metric is one function with its declaration :func:`geometry_metric` beside it.
"""

# ruff: noqa: F403  # each file lists its public names, so that a new metric is named in one file only
from simo_lightning.functional.geometry import collapse, heads, means, norms, spectrum, sphere, spread
from simo_lightning.functional.geometry.collapse import *
from simo_lightning.functional.geometry.declaration import (
    GEOMETRY,
    GeometryMetric,
    computable_metrics,
    geometry_metric,
    not_computed,
)
from simo_lightning.functional.geometry.heads import *
from simo_lightning.functional.geometry.means import *
from simo_lightning.functional.geometry.norms import *
from simo_lightning.functional.geometry.spectrum import *
from simo_lightning.functional.geometry.sphere import *
from simo_lightning.functional.geometry.spread import *

__all__ = ["GEOMETRY", "GeometryMetric", "computable_metrics", "geometry_metric", "not_computed"]
__all__ += collapse.__all__
__all__ += heads.__all__
__all__ += means.__all__
__all__ += norms.__all__
__all__ += spectrum.__all__
__all__ += sphere.__all__
__all__ += spread.__all__
