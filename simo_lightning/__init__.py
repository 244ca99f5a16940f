"""simo_lightning: PyTorch Lightning parts that train, evaluate and explain encoders with SimO loss."""

from simo_lightning.losses import SimOLoss
from simo_lightning.version import __version__

__all__ = ["SimOLoss", "__version__"]
