"""Tensors in, tensors out: moments, SimO, geometry and nearest neighbours. No rank, no Lightning."""

from simo_lightning.functional.moments import ClassMoments, class_moments
from simo_lightning.functional.simo import simo_loss

__all__ = ["ClassMoments", "class_moments", "simo_loss"]
