"""One HTML page that shows the reports of several runs side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from simo_lightning import plotting
from simo_lightning.plotting import Curve
from simo_lightning.plotting.canvas import save
from simo_lightning.report.analysis import cluster_order
from simo_lightning.report.curves import drawn_names, read_curves
from simo_lightning.report.page import render_page
from simo_lightning.report.pictures import PROJECTIONS, Picture
from simo_lightning.report.record import Record, load_record
from simo_lightning.report.rows import MetricGroup, MetricRow, metric_groups
from simo_lightning.version import __version__

_REPORT = Path("plots") / "report"  # in the folder of a run
_MOST_UNORDERED = 10  # classes that keep the order of the data


class ComparedRun(NamedTuple):
    """One of the runs.

    Attributes:
        name: Column of the tables.
        record: Numbers of its report.
        curves: What it logged in training.
        settings: Of its config.yaml, by their dotted names.
    """

    name: str
    record: Record
    curves: dict[str, Curve]
    settings: dict[str, str]


class Cell(NamedTuple):
    """A value of a table.

    Attributes:
        text: As shown.
        best: Whether no run has a better one.
    """

    text: str
    best: bool


def write_comparison(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Compare the reports of two or more runs in one page, which contains its pictures and loads nothing.

    Args:
        runs: Folders of runs that have a report in plots/report, or folders of reports, as ``simo plot`` wrote them.
        out: File to write.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If a folder is missing, or has no report; the message has the commands that make them.
        ValueError: If there are fewer than two runs or one twice, the reports are not of the same split, or a file
            is damaged.
        OSError: If the page cannot be written.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise ValueError(f"runs must be at least two to be compared, got {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"runs must be different folders, got {', '.join(map(str, folders))}")
    reports = _find_reports(folders)
    compared = [
        _load(name, folder, report) for name, folder, report in zip(_names(folders), folders, reports, strict=True)
    ]
    stages = {run.record.stage for run in compared}
    if len(stages) > 1:
        listed = ", ".join(f"{run.record.stage} in {run.name}" for run in compared)
        raise ValueError(f"reports must be of the same split to be compared, got {listed}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        render_page(
            out,
            "compare.html",
            title=f"{len(compared)} runs compared",
            runs=compared,
            facts=_facts(compared),
            headline=_headline(compared),
            groups=_groups(compared),
            curves=_draw_curves(Path(folder), compared),
            sections=_draw_pairs(Path(folder), compared),
            settings=_differing(compared),
            version=__version__,
        )
    return out


def best_of(values: Sequence[float], better: str) -> list[bool]:
    """Which of the values are the best.

    Args:
        values: nan does not count.
        better: "higher", "lower" or "neither".

    Returns:
        One flag per value; none is set where neither direction is better or all values are the same.

    Example:
        >>> best_of([0.5, 0.7, float("nan")], "higher")
        [False, True, False]
    """
    known = {value for value in values if not math.isnan(value)}
    if better == "neither" or len(known) < 2:
        return [False] * len(values)
    best = max(known) if better == "higher" else min(known)
    return [value == best for value in values]


def flat_settings(value: Any, name: str = "") -> dict[str, str]:
    """Settings by their dotted names, without ``init_args``.

    Example:
        >>> flat_settings({"model": {"class_path": "A", "init_args": {"lr": 0.1}}})
        {'model.class_path': 'A', 'model.lr': '0.1'}
    """
    if not isinstance(value, dict) or not value:
        return {name: str(value)}
    found: dict[str, str] = {}
    for key, inside in value.items():
        found |= flat_settings(inside, name if key == "init_args" else f"{name}.{key}".lstrip("."))
    return found


def _find_reports(folders: Sequence[Path]) -> list[Path]:
    found, missing = [], []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no run at {folder}")
        report = next((each for each in (folder, folder / _REPORT) if (each / "report.json").is_file()), None)
        if report is not None:
            found.append(report)
        elif (folder / "config.yaml").is_file():
            missing.append(
                f"{folder} has no report, simo plot --config {folder}/config.yaml --run_dir {folder} makes it"
            )
        else:
            missing.append(f"{folder} is neither a run nor a report")
    if missing:
        raise FileNotFoundError("; ".join(missing))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _load(name: str, folder: Path, report: Path) -> ComparedRun:
    run = folder if report != folder else folder.resolve().parent.parent
    path = run / "config.yaml"
    settings = {}
    if path.is_file():
        try:
            settings = flat_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} must be a config in YAML, got another file: {error}") from error
    return ComparedRun(name, load_record(report), read_curves(run), settings)


def _facts(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for run in runs for name in run.record.details)
    return [(name, [run.record.details.get(name, "-") for run in runs]) for name in names]


def _headline(runs: Sequence[ComparedRun]) -> list[tuple[str, list[Any], list[bool]]]:
    rows = []
    for place, number in enumerate(runs[0].record.headline):
        found = [run.record.headline[place] for run in runs if len(run.record.headline) > place]
        better = "lower" if "cosine" in number.name else "higher"
        if len(found) == len(runs):
            rows.append((number.name, found, best_of([each.value for each in found], better)))
    return rows


def _groups(runs: Sequence[ComparedRun]) -> list[tuple[MetricGroup, list[list[Cell]]]]:
    by_name = [{row.name: row for row in run.record.rows} for run in runs]
    every = {row.name: row for run in runs for row in run.record.rows}
    groups = []
    for group in metric_groups(list(every.values())):
        cells = [_cells([rows.get(row.name) for rows in by_name], row.better) for row in group.rows]
        groups.append((group, cells))
    return groups


def _cells(rows: Sequence[MetricRow | None], better: str) -> list[Cell]:
    best = best_of([math.nan if row is None else row.value for row in rows], better)
    return [Cell("-" if row is None else row.text, flag) for row, flag in zip(rows, best, strict=True)]


def _draw_curves(folder: Path, runs: Sequence[ComparedRun]) -> list[Picture]:
    curves = {run.name: run.curves for run in runs}
    names = drawn_names(name for run in runs for name in run.curves)
    if not names:
        return []
    path = folder / "curves.png"
    save(plotting.curves_figure(curves, names, "optimizer step"), path)
    text = "Values in each run's metrics.csv by optimizer step."
    return [Picture(path, "Training curves", plotting.describe_curves(curves, names), text)]


def _draw_pairs(folder: Path, runs: Sequence[ComparedRun]) -> list[tuple[str, str, list[Picture]]]:
    """The matrices of cosines, and the maps of each projection that all runs have."""
    same = all(run.record.class_names == runs[0].record.class_names for run in runs)
    similarity = []
    for place, run in enumerate(runs):
        order = _order(runs[0].record.means if same else run.record.means)
        names = [run.record.class_names[index] for index in order.tolist()]
        path = folder / f"similarity_{place}.png"
        save(plotting.class_similarity_figure(run.record.means[order], names), path)
        alt = f"{run.name}: {plotting.describe_similarity(run.record.means[order], names)}"
        similarity.append(Picture(path, run.name, alt, ""))
    text = f"The classes are in the order of {runs[0].name}." if same else "The classes of the runs differ."
    sections = [("Cosines between class means", text, similarity)]
    for projection, (title, text) in PROJECTIONS.items():
        if not all(projection in run.record.points for run in runs):
            continue
        maps = []
        for place, run in enumerate(runs):
            path = folder / f"{projection}_{place}.png"
            points, labels = run.record.points[projection], run.record.labels
            head = f"{title} of {len(labels):,} embeddings"
            save(plotting.scatter_figure(points, labels, run.record.class_names, head), path)
            alt = plotting.describe_scatter(points, labels, run.record.class_names, head)
            maps.append(Picture(path, run.name, f"{run.name}: {alt}", ""))
        sections.append((title, text, maps))
    return sections


def _order(means: Tensor) -> Tensor:
    """The order of the classes that have images."""
    few = len(means) <= _MOST_UNORDERED
    order = torch.arange(len(means)) if few else cluster_order(plotting.class_cosines(means))
    return order[~means.isnan().any(dim=1)[order]]


def _differing(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    names = sorted({name for run in runs for name in run.settings})
    rows = [(name, [run.settings.get(name, "not set") for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
