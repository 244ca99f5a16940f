"""One JSON file per finished run: written whole or not at all, put aside when its recipe has changed."""

import json
import math
import os
from pathlib import Path
from typing import Any

from benchmarks.recipes.plan import Recipe

Result = dict[str, Any]


def path_of(out: Path, recipe: str, epochs: int, rate: float, seed: int) -> Path:
    """File of a run.

    Args:
        out: Folder of the results.
        recipe: Name.
        epochs: Budget.
        rate: Learning rate.
        seed: Seed.

    Returns:
        ``out/results/<recipe>-<epochs>e-lr<rate>-seed<seed>.json``.
    """
    return out / "results" / f"{recipe}-{epochs}e-lr{rate:g}-seed{seed}.json"


def read_results(out: Path) -> list[Result]:
    """All finished runs.

    Args:
        out: Folder of the results.

    Returns:
        One dictionary per file, in the order of the files' names.
    """
    return [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is always whole: the old one or the new one.

    Args:
        path: File.
        text: Content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")  # what a crash leaves is overwritten by the next
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_result(path: Path, result: Result) -> None:
    """Write a run's file.

    Args:
        path: File.
        result: Numbers that are nan or infinite become null.
    """
    write_text(path, json.dumps(_plain(result), indent=1) + "\n")


def put_aside(out: Path, recipe: Recipe, epochs: int) -> list[Path]:
    """Move the runs of another config that bear this recipe's name to ``out/stale``.

    Args:
        out: Folder of the results.
        recipe: As it is now.
        epochs: Budget.

    Returns:
        Where they are now.
    """
    moved = []
    for path in sorted((out / "results").glob(f"{recipe.name}-{epochs}e-lr*.json")):
        digest = json.loads(path.read_text())["digest"]
        if digest != recipe.digest:
            target = out / "stale" / f"{path.stem}-{digest}.json"
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            moved.append(target)
    return moved


def best_rate(results: list[Result], seed: int) -> float | None:
    """The learning rate whose run was best on the validation split.

    Args:
        results: Runs of one recipe, in one setting.
        seed: Runs of other seeds do not count.

    Returns:
        The rate with the largest val/knn, the lower one of equals; None if every run diverged or there is none.
    """
    runs = [run for run in results if run["seed"] == seed and run["metrics"]]
    best = max(runs, key=lambda run: (run["metrics"]["val"]["knn20"], -run["rate"]), default=None)
    return None if best is None else float(best["rate"])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
