"""The numbers of a report, kept beside its page: report.json and report.npz. ``simo compare`` reads them."""

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simo_lightning.report.analysis import Headline
from simo_lightning.report.rows import MetricRow

_FORMAT = 1


class Record(NamedTuple):
    """The numbers of a report.

    Attributes:
        title: Of the run.
        details: Run, checkpoint, data and so on, by name.
        stage: "val" or "test".
        class_names: C names.
        headline: The numbers at the top.
        rows: The metrics.
        means: Class means ``(C, D)``, float32.
        points: Of the map, by projection, ``(M, 2)``.
        labels: Class of each point, ``(M,)``.
    """

    title: str
    details: dict[str, str]
    stage: str
    class_names: list[str]
    headline: list[Headline]
    rows: list[MetricRow]
    means: Tensor
    points: dict[str, Tensor]
    labels: Tensor


def save_record(folder: Path, record: Record) -> None:
    """Write report.json and report.npz.

    Args:
        folder: Must exist.
        record: The numbers.

    Raises:
        OSError: If a file cannot be written.
    """
    text: dict[str, Any] = {
        "format": _FORMAT,
        "title": record.title,
        "stage": record.stage,
        "details": record.details,
        "headline": [_plain(number._asdict()) for number in record.headline],
        "metrics": [_plain(row._asdict()) for row in record.rows],
        "class_names": record.class_names,
    }
    (folder / "report.json").write_text(json.dumps(text, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    arrays = {f"points_{name}": points.float().numpy() for name, points in record.points.items()}
    np.savez_compressed(
        folder / "report.npz",
        allow_pickle=False,
        means=record.means.float().numpy(),
        labels=record.labels.long().numpy(),
        **arrays,
    )


def load_record(folder: Path) -> Record:
    """Read what :func:`~simo_lightning.report.write_report` kept.

    Args:
        folder: Of the report.

    Returns:
        The numbers.

    Raises:
        FileNotFoundError: If the folder has no report.json or report.npz.
        ValueError: If they are other files.
    """
    path = folder / "report.json"
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        if text["format"] != _FORMAT:
            raise ValueError(f"its format is {text['format']}, not {_FORMAT}")
        headline = [Headline(**_numbers(each)) for each in text["headline"]]
        rows = [MetricRow(**_numbers(each)) for each in text["metrics"]]
        path = folder / "report.npz"
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            tensors = {name: torch.from_numpy(found[name]) for name in found.files}
        means, labels = tensors.pop("means"), tensors.pop("labels")
        points = {name.removeprefix("points_"): value for name, value in tensors.items()}
        names = [str(name) for name in text["class_names"]]
        _check(names, means, labels, points)
        details = {str(name): str(value) for name, value in text["details"].items()}
        return Record(str(text["title"]), details, str(text["stage"]), names, headline, rows, means, points, labels)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} must be a file that simo plot wrote, got another one: {error}") from error


def _check(names: Sequence[str], means: Tensor, labels: Tensor, points: Mapping[str, Tensor]) -> None:
    if means.ndim != 2 or len(means) != len(names) or labels.ndim != 1:
        raise ValueError(f"means must have a row for each of {len(names)} classes, got {tuple(means.shape)}")
    if any(each.shape != (len(labels), 2) for each in points.values()):
        raise ValueError("points must have two coordinates for each label")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values that JSON can hold: it has neither nan nor inf."""
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"value": float(values["value"])}
