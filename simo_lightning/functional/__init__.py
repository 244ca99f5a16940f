"""Functions of tensors: class moments, SimO, geometry and nearest neighbours, without Lightning or communication."""

# ruff: noqa: F403  # each file lists its public names, so that a new metric is named in one file only
from simo_lightning.functional import calibration, confusion, decomposition, geometry, retrieval, unknown
from simo_lightning.functional.calibration import *
from simo_lightning.functional.confusion import *
from simo_lightning.functional.decomposition import *
from simo_lightning.functional.geometry import *
from simo_lightning.functional.geometry.collapse import *
from simo_lightning.functional.geometry.heads import *
from simo_lightning.functional.geometry.means import *
from simo_lightning.functional.geometry.norms import *
from simo_lightning.functional.geometry.spectrum import *
from simo_lightning.functional.geometry.sphere import *
from simo_lightning.functional.geometry.spread import *
from simo_lightning.functional.knn import knn_accuracy, knn_predict
from simo_lightning.functional.moments import ClassMoments, class_moments
from simo_lightning.functional.retrieval import *
from simo_lightning.functional.simo import simo_loss
from simo_lightning.functional.unknown import *

__all__ = ["ClassMoments", "class_moments", "knn_accuracy", "knn_predict", "simo_loss"]
__all__ += confusion.__all__
__all__ += geometry.__all__
__all__ += calibration.__all__
__all__ += decomposition.__all__
__all__ += retrieval.__all__
__all__ += unknown.__all__
