"""What a run keeps of an epoch, so that its history can be drawn later: class means and the same few embeddings.

A snapshot is one NumPy file ``epoch=003.npz`` with arrays ``epoch`` and ``step`` (scalars, int64), ``counts`` (C,)
int64, ``means`` (at most 500, D) float32, ``points`` (M, D) float32 and ``labels`` (M,) int64. Row i of ``points`` is
the same validation image in every snapshot of a run, as long as the validation set and the number of processes stay
the same.
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
        counts: Embeddings of each class, ``(C,)``.
        means: Means of the `classes`, ``(K, D)``; ``nan`` for classes without an embedding.
        points: A fixed small part of the embeddings, ``(M, D)``.
        labels: Their classes, ``(M,)``.
    """

    epoch: int
    step: int
    counts: Tensor
    means: Tensor
    points: Tensor
    labels: Tensor

    @classmethod
    def of_moments(cls, epoch: int, step: int, moments: ClassMoments, points: Tensor, labels: Tensor) -> "Snapshot":
        """Snapshot with the means of at most 500 classes, so that it stays small with 10,000 classes too.

        Args:
            epoch: From 0.
            step: Optimizer steps so far.
            moments: Class moments of all validation embeddings.
            points: A fixed small part of the embeddings, ``(M, D)``.
            labels: Their classes, ``(M,)``.

        Returns:
            The snapshot.
        """
        shown = list(every_nth(len(moments.counts), MOST_CLASSES))
        return cls(epoch, step, moments.counts, moments.means[shown], points, labels)

    @property
    def classes(self) -> range:
        """Indices of the classes whose means are kept, K: all of at most 500, of more every n-th."""
        return every_nth(len(self.counts), MOST_CLASSES)

    @property
    def title(self) -> str:
        """Name in a picture, such as ``Epoch 3``."""
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
    """Write a snapshot; a crash leaves the old file or the new one, never a part.

    Args:
        snapshot: To write.
        folder: Created if it is missing; a snapshot of the same epoch is replaced.

    Returns:
        The file, ``epoch=003.npz`` for epoch 3.

    Raises:
        OSError: If it cannot be written.
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
        folder: Of one run.

    Returns:
        Those that show the same images as the newest one; none if the folder is missing or empty.

    Raises:
        ValueError: If a file is not a snapshot; the text names it.
    """
    snapshots = sorted((_load(path) for path in Path(folder).glob("epoch=*.npz")), key=lambda each: each.epoch)
    return [
        each
        for each in snapshots
        if each.points.shape == snapshots[-1].points.shape and torch.equal(each.labels, snapshots[-1].labels)
    ]


def pick_snapshots(snapshots: Sequence[T], most: int = 6) -> list[T]:
    """At most `most` snapshots, evenly spread, the first and the last among them.

    Args:
        snapshots: In the order of training.
        most: At least 2.

    Returns:
        All if there are no more.

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
        raise ValueError(f"{path} must be a snapshot as save_snapshot writes it, got another file: {error}") from error
