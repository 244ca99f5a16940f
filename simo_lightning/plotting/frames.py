"""What a run keeps of an epoch, so that its history can be drawn later: class means and the same few embeddings.

A frame is one NumPy file ``epoch=003.npz`` with arrays ``epoch`` and ``step`` (scalars, int64), ``counts`` (C,) int64,
``means`` (C, D) float32, ``points`` (M, D) float32 and ``labels`` (M,) int64. Row i of ``points`` is the same
validation image in every frame of a run, as long as the validation set and the number of processes stay the same.
"""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from simo_lightning.plotting.projections import project_wheel
from simo_lightning.plotting.similarity import class_cosines

T = TypeVar("T")


class Frame(NamedTuple):
    """One epoch of training, as the validation set saw it.

    Attributes:
        epoch: From 0.
        step: Optimizer steps so far.
        counts: Embeddings of each class, ``(C,)``.
        means: Class means of all validation embeddings, ``(C, D)``; ``nan`` for classes without one.
        points: A fixed few of the embeddings, ``(M, D)``.
        labels: Their classes, ``(M,)``.
    """

    epoch: int
    step: int
    counts: Tensor
    means: Tensor
    points: Tensor
    labels: Tensor

    @property
    def title(self) -> str:
        """Name in a picture, such as ``Epoch 3``."""
        return f"Epoch {self.epoch}"

    @property
    def cosines(self) -> Tensor:
        """Cosines between the class means, ``(C, C)`` in [-1, 1], float64."""
        return class_cosines(self.means)

    @property
    def wheel(self) -> Tensor:
        """The points on a wheel with a spoke per class, ``(M, 2)``; see :func:`project_wheel`."""
        return project_wheel(self.points, self.means)


def save_frame(frame: Frame, folder: str | Path) -> Path:
    """Write a frame, whole or not at all.

    Args:
        frame: To keep.
        folder: Made if it is missing; a frame of the same epoch is replaced.

    Returns:
        The file, ``epoch=003.npz`` for epoch 3.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(folder) / f"epoch={frame.epoch:03d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "epoch": np.int64(frame.epoch),
        "step": np.int64(frame.step),
        "counts": frame.counts.detach().cpu().long().numpy(),
        "means": frame.means.detach().cpu().float().numpy(),
        "points": frame.points.detach().cpu().float().numpy(),
        "labels": frame.labels.detach().cpu().long().numpy(),
    }
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, **whole)
    os.replace(partial, path)
    return path


def load_frames(folder: str | Path) -> list[Frame]:
    """Frames that :func:`save_frame` wrote, in the order of training.

    Args:
        folder: Of one run.

    Returns:
        Those that show the same images as the newest one; none if the folder is missing or empty.

    Raises:
        ValueError: If a file is not a frame; the text names it.
    """
    frames = sorted((_load(path) for path in Path(folder).glob("epoch=*.npz")), key=lambda frame: frame.epoch)
    last = frames[-1] if frames else None
    return [
        frame
        for frame in frames
        if last is not None and frame.points.shape == last.points.shape and torch.equal(frame.labels, last.labels)
    ]


def pick_frames(frames: Sequence[T], most: int = 6) -> list[T]:
    """A few frames, evenly spread, the first and the last among them.

    Args:
        frames: In the order of training.
        most: At least 2.

    Returns:
        All if there are no more.

    Raises:
        ValueError: If `most` is below 2.

    Example:
        >>> pick_frames(range(40), 4)
        [0, 13, 26, 39]
    """
    if most < 2:
        raise ValueError(f"most must be at least 2, for the first and the last frame, got {most}")
    if len(frames) <= most:
        return list(frames)
    return [frames[round(index * (len(frames) - 1) / (most - 1))] for index in range(most)]


def _load(path: Path) -> Frame:
    try:
        with np.load(path) as found:
            tensors = {name: torch.from_numpy(found[name]) for name in ("counts", "means", "points", "labels")}
            return Frame(epoch=int(found["epoch"]), step=int(found["step"]), **tensors)
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be a frame as save_frame writes it, got a file that is not: {error}") from error
