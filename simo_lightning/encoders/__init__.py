"""Image encoders: a backbone of torchvision, timm or any module without its classifier, and a projector."""

from simo_lightning.encoders.image import ImageEncoder
from simo_lightning.encoders.resnet import Norm, Stem

__all__ = ["ImageEncoder", "Norm", "Stem"]
