"""Callbacks: evaluation of the embeddings in numbers and pictures, an alarm, checkpoints, speed, written embeddings.

Those that evaluate embeddings work with any LightningModule whose validation step returns a dictionary with
``embeddings (N, D)`` and ``labels (N,)``, and with any data loader. Class names and a bank of training images are those
of ``trainer.datamodule`` where it has them.
"""

from simo_lightning.callbacks.alarm import CollapseAlarm
from simo_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from simo_lightning.callbacks.class_table import ClassTable
from simo_lightning.callbacks.defaults import default_callbacks
from simo_lightning.callbacks.evaluation import EvaluationCallback
from simo_lightning.callbacks.freeze import FreezeBackbone
from simo_lightning.callbacks.geometry import GeometryMonitor
from simo_lightning.callbacks.knn import OnlineKNN
from simo_lightning.callbacks.moments import ClassMomentsCallback
from simo_lightning.callbacks.plots import EmbeddingPlots
from simo_lightning.callbacks.predictions import EmbeddingWriter
from simo_lightning.callbacks.probe import OnlineProbe
from simo_lightning.callbacks.projector import EmbeddingProjector
from simo_lightning.callbacks.retrieval import RetrievalMonitor
from simo_lightning.callbacks.shutdown import GracefulShutdown
from simo_lightning.callbacks.speed import ImagesPerSecond
from simo_lightning.callbacks.unknown import UnknownMonitor

__all__ = [
    "BestCheckpoint",
    "ClassMomentsCallback",
    "ClassTable",
    "CollapseAlarm",
    "EmbeddingPlots",
    "EmbeddingProjector",
    "EmbeddingWriter",
    "EvaluationCallback",
    "FreezeBackbone",
    "GeometryMonitor",
    "GracefulShutdown",
    "ImagesPerSecond",
    "LastCheckpoint",
    "OnlineKNN",
    "OnlineProbe",
    "RetrievalMonitor",
    "UnknownMonitor",
    "default_callbacks",
]
