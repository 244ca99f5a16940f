"""What a process of ``python -m benchmarks`` does: train, unless the embeddings are there, and score."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import Row
from benchmarks.tasks.data import make
from benchmarks.tasks.scores import scores
from benchmarks.tasks.train import train


def work(job: dict[str, Any]) -> tuple[Row | None, Row | None]:
    """Make a run of :meth:`benchmarks.tasks.plan.Plan.job`.

    Returns:
        What training measured, None if it has been made and its embeddings are there; and the scores, None unless
        ``job["score"]``.
    """
    torch.set_num_threads(job["threads"])
    images = make(job["task"], Path(job["folder"]), job["about"], job["given"])
    file, row = Path(job["file"]), None
    kept = read(file) if job["made"] else None  # a file without its row is of a run that was stopped
    if kept is None:
        row, kept = train(job, images)
        if kept:
            write(file, kept)
    if not job["score"]:
        return row, None
    return row, scores(job["task"], images, kept) if kept else {"error": "diverged"}


def read(file: Path) -> dict[str, Any] | None:
    """Arrays of a file; None if there is none that is whole."""
    try:
        with np.load(file, allow_pickle=False) as whole:
            return dict(whole)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def write(file: Path, kept: dict[str, Any]) -> None:
    """Write arrays to a file, which is there once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".part").open("wb") as part:
        np.savez(part, **kept)
    file.with_suffix(".part").replace(file)
