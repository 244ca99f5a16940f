"""Snapshots of a run: class means and a fixed sample of embeddings per epoch, for figures of its training.

A snapshot is one NumPy file ``epoch=003.npz`` with arrays ``epoch`` and ``step`` (scalars, int64), ``counts`` (C,)
int64, ``means`` (at most 500, D) float32, ``points`` (M, D) float32 and ``labels`` (M,) int64. ``points[i]`` is the
same validation image in every snapshot of a run if the validation set and the number of processes do not change.
"""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting.canvas import MOST_CLASSES, every_nth
from simo_lightning.plotting.projections import star_coordinates
from simo_lightning.plotting.similarity import class_cosines

T = TypeVar("T")


class Snapshot(NamedTuple):
    """The validation embeddings of one epoch of training; :meth:`of_moments` makes it.

    Attributes:
        epoch: From 0.
        step: Optimizer steps so far.
        counts: Number of embeddings of each class, ``(C,)``.
        means: Means of the `classes`, ``(K, D)``; ``nan`` for classes without embeddings.
        points: Fixed sample of the embeddings, ``(M, D)``.
        labels: Class of each point, ``(M,)``.
    """

    epoch: int
    step: int
    counts: Tensor
    means: Tensor
    points: Tensor
    labels: Tensor

    @classmethod
    def of_moments(cls, epoch: int, step: int, moments: ClassMoments, points: Tensor, labels: Tensor) -> "Snapshot":
        """Snapshot with the means of at most 500 classes, which limits its size at 10,000 classes.

        Args:
            epoch: From 0.
            step: Optimizer steps so far.
            moments: Class moments of all validation embeddings.
            points: Fixed sample of the embeddings, ``(M, D)``.
            labels: Class of each point, ``(M,)``.

        Returns:
            The snapshot.
        """
        shown = list(every_nth(len(moments.counts), MOST_CLASSES))
        return cls(epoch, step, moments.counts, moments.means[shown], points, labels)

    @property
    def classes(self) -> range:
        """Indices of the K classes with a mean here: all of at most 500, otherwise every n-th."""
        return every_nth(len(self.counts), MOST_CLASSES)

    @property
    def title(self) -> str:
        """Title in figures, such as ``Epoch 3``."""
        return f"Epoch {self.epoch}"

    @property
    def cosines(self) -> Tensor:
        """Cosines between the means, ``(K, K)`` in [-1, 1], float64."""
        return class_cosines(self.means)

    @property
    def star_coordinates(self) -> Tensor:
        """The points in star coordinates, ``(M, 2)``; see :func:`~simo_lightning.plotting.star_coordinates`."""
        return star_coordinates(self.points, self.means)


def save_snapshot(snapshot: Snapshot, folder: str | Path) -> Path:
    """Write a snapshot atomically: a crash leaves the old file or the new one.

    Args:
        snapshot: Snapshot to write.
        folder: Created if it is missing; a snapshot of the same epoch is replaced.

    Returns:
        The file, ``epoch=003.npz`` for epoch 3.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(folder) / f"epoch={snapshot.epoch:03d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            epoch=np.int64(snapshot.epoch),
            step=np.int64(snapshot.step),
            counts=snapshot.counts.detach().cpu().long().numpy(),
            means=snapshot.means.detach().cpu().float().numpy(),
            points=snapshot.points.detach().cpu().float().numpy(),
            labels=snapshot.labels.detach().cpu().long().numpy(),
        )
    os.replace(partial, path)
    return path


def load_snapshots(folder: str | Path) -> list[Snapshot]:
    """Snapshots that :func:`save_snapshot` wrote, in the order of training.

    Args:
        folder: Folder of one run.

    Returns:
        Snapshots of the same images as the newest one; none if the folder is missing or empty.

    Raises:
        ValueError: If a file is not a snapshot; the message names it.
    """
    snapshots = sorted((_load(path) for path in Path(folder).glob("epoch=*.npz")), key=lambda each: each.epoch)
    return [
        each
        for each in snapshots
        if each.points.shape == snapshots[-1].points.shape and torch.equal(each.labels, snapshots[-1].labels)
    ]


def pick_snapshots(snapshots: Sequence[T], most: int = 6) -> list[T]:
    """At most `most` evenly spaced snapshots, including the first and the last.

    Args:
        snapshots: Snapshots in the order of training.
        most: Maximum number, at least 2.

    Returns:
        Selected snapshots; all if there are at most `most`.

    Raises:
        ValueError: If `most` is below 2.

    Example:
        >>> pick_snapshots(range(40), 4)
        [0, 13, 26, 39]
    """
    if most < 2:
        raise ValueError(f"most must be at least 2, for the first and the last snapshot, got {most}")
    if len(snapshots) <= most:
        return list(snapshots)
    return [snapshots[round(index * (len(snapshots) - 1) / (most - 1))] for index in range(most)]


def _load(path: Path) -> Snapshot:
    try:
        with path.open("rb") as file, np.load(file) as found:  # np.load leaves a damaged file open
            tensors = {name: torch.from_numpy(found[name]) for name in ("counts", "means", "points", "labels")}
            return Snapshot(epoch=int(found["epoch"]), step=int(found["step"]), **tensors)
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a snapshot written by save_snapshot, got another file: {error}") from error
