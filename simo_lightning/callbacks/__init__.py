"""Callbacks: what the steps saw in numbers and pictures, an alarm, checkpoints, speed and written embeddings.

They know no module class: they read ``embeddings`` and ``labels`` of what a step returns, and ``trainer.datamodule``.
"""

from simo_lightning.callbacks.alarm import CollapseAlarm
from simo_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from simo_lightning.callbacks.geometry import GeometryMonitor
from simo_lightning.callbacks.knn import OnlineKNN
from simo_lightning.callbacks.plots import EmbeddingPlots
from simo_lightning.callbacks.predictions import EmbeddingWriter
from simo_lightning.callbacks.probe import OnlineProbe
from simo_lightning.callbacks.shutdown import GracefulShutdown
from simo_lightning.callbacks.speed import ImagesPerSecond

__all__ = [
    "BestCheckpoint",
    "CollapseAlarm",
    "EmbeddingPlots",
    "EmbeddingWriter",
    "GeometryMonitor",
    "GracefulShutdown",
    "ImagesPerSecond",
    "LastCheckpoint",
    "OnlineKNN",
    "OnlineProbe",
]
