"""simo_lightning: PyTorch Lightning parts that train, evaluate and explain encoders with SimO loss."""

from simo_lightning.data import (
    CIFAR10PairDataModule,
    CIFAR100PairDataModule,
    DigitsPairDataModule,
    HubPairDataModule,
    ImageFolderPairDataModule,
    PairDataModule,
)
from simo_lightning.embedder import Embedder
from simo_lightning.encoders import ImageEncoder
from simo_lightning.losses import ClassifierLoss, JointLoss, MetricLearningLoss, ProjectionHeadLoss, SimOLoss
from simo_lightning.module import SimOModule
from simo_lightning.parameter_groups import ParameterGroups
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.probe import ProbeModule
from simo_lightning.schedules import OneCycle
from simo_lightning.strategies import ShardedStrategy
from simo_lightning.version import __version__

__all__ = [
    "CIFAR10PairDataModule",
    "CIFAR100PairDataModule",
    "ClassifierLoss",
    "DigitsPairDataModule",
    "Embedder",
    "HubPairDataModule",
    "ImageEncoder",
    "ImageFolderPairDataModule",
    "JointLoss",
    "MetricLearningLoss",
    "OneCycle",
    "PairDataModule",
    "ParameterGroups",
    "Preprocessing",
    "ProbeModule",
    "ProjectionHeadLoss",
    "ShardedStrategy",
    "SimOLoss",
    "SimOModule",
    "__version__",
]
