"""Losses as nn.Modules: embeddings and labels in, a scalar out."""

from simo_lightning.losses.classifier import ClassifierLoss
from simo_lightning.losses.configure import ConfigurableLoss, configure_loss
from simo_lightning.losses.joint import JointLoss
from simo_lightning.losses.metric_learning import MetricLearningLoss
from simo_lightning.losses.projection import ProjectionHeadLoss
from simo_lightning.losses.simo import Level, SimOLoss

__all__ = [
    "ClassifierLoss",
    "ConfigurableLoss",
    "JointLoss",
    "Level",
    "MetricLearningLoss",
    "ProjectionHeadLoss",
    "SimOLoss",
    "configure_loss",
]
