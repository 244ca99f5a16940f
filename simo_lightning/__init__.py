"""simo_lightning: PyTorch Lightning parts that train, evaluate and explain encoders with SimO loss."""

from simo_lightning.data import (
    CIFAR10PairDataModule,
    CIFAR100PairDataModule,
    DigitsPairDataModule,
    ImageFolderPairDataModule,
    PairDataModule,
)
from simo_lightning.encoders import ImageEncoder
from simo_lightning.losses import SimOLoss
from simo_lightning.module import SimOModule
from simo_lightning.probe import ProbeModule
from simo_lightning.schedules import OneCycle
from simo_lightning.version import __version__

__all__ = [
    "CIFAR10PairDataModule",
    "CIFAR100PairDataModule",
    "DigitsPairDataModule",
    "ImageEncoder",
    "ImageFolderPairDataModule",
    "OneCycle",
    "PairDataModule",
    "ProbeModule",
    "SimOLoss",
    "SimOModule",
    "__version__",
]
