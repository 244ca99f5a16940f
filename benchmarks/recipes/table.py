"""The runs' JSON files as Markdown; no number here comes from anything else."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.recipes.store import Result, best_rate

# Heading, key of metrics.test, decimals.
COLUMNS = (
    ("kNN 1", "knn1", 4),
    ("kNN 20", "knn20", 4),
    ("kNN 200", "knn200", 4),
    ("linear", "linear", 4),
    ("MLP, 1 epoch", "mlp", 4),
    ("mean abs cos", "orthogonality", 3),
    ("max abs cos", "orthogonality_max", 3),
    ("effective rank", "effective_rank", 2),
    ("within/between", "within_between", 3),
)
PROTOCOL = """\
Every recipe: the same encoder, data, augmentation, batches and epochs; only what its file in configs/recipes/ says is
its own. Learning rate: each recipe's sweep on its first seed, at the same budget, by kNN(20) on the validation split,
which is held out of the training images and used for nothing else; an asterisk marks a best rate at the edge of its
sweep. No checkpoint is chosen: all numbers are of the test split at the last epoch, mean ± sample standard deviation
over seeds. kNN: by cosine, equal votes, among all training images. linear: logistic regression (scikit-learn, C = 1)
on embeddings standardised by the training images'. MLP: one epoch of Linear(256), ReLU, Linear on the frozen encoder,
AdamW at 4e-3, one cycle, augmented images. cos: between class means. Embeddings: as the encoder gives them, in the
precision of training, not normalised. training: seconds of the epochs alone, without validation. peak: resident set
of the process at the end of training, all of Python in it."""


def markdown(results: Sequence[Result]) -> str:
    """All tables: one for each budget, base config and data.

    Args:
        results: Contents of the JSON files, at least one.

    Returns:
        Markdown.

    Raises:
        ValueError: If there is no result, or one recipe has runs of different configs in one table.
    """
    if not results:
        raise ValueError("there is no finished run to make a table of")
    return "\n\n".join([*(_section(section) for section in sections(results)), PROTOCOL])


def sections(results: Sequence[Result]) -> list[list[Result]]:
    """The runs that may be compared: those of one budget, base config and data.

    Args:
        results: Contents of the JSON files.

    Returns:
        Them in groups, fewest epochs first.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[result["epochs"], result["setting"]].append(result)
    return [groups[key] for key in sorted(groups)]


def by_recipe(section: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each recipe.

    Args:
        section: Runs of one group of :func:`sections`.

    Returns:
        Them by the recipe's name.

    Raises:
        ValueError: If one recipe has runs of different configs.
    """
    recipes: dict[str, list[Result]] = defaultdict(list)
    for result in section:
        recipes[result["recipe"]].append(result)
    for name, runs in recipes.items():
        digests = sorted({run["digest"] for run in runs})
        if len(digests) > 1:
            raise ValueError(f"the runs of {name} must be of one config, got the digests {', '.join(digests)}")
    return recipes


def _section(results: list[Result]) -> str:
    recipes = by_recipe(results)
    rows = sorted((_row(runs) for runs in recipes.values()), key=lambda row: -row[0])
    headings = ["recipe", "lr", "seeds", *(heading for heading, _, _ in COLUMNS)]
    headings += ["validation kNN 20", "training s", "peak MiB"]
    lines = [_line(headings), _line(["---"] * len(headings)), *(_line(cells) for _, cells in rows)]
    return "\n".join([*_header(results), "", *lines, "", *_sweeps(recipes)])


def _header(results: list[Result]) -> list[str]:
    """What the runs have in common; where they differ, all of it is said."""
    epochs, data = results[0]["epochs"], _distinct(run["data"] for run in results if run["data"])
    if len(data) > 1:
        raise ValueError(f"the runs of a table must be of the same images, got {'; '.join(data)}")
    return [
        f"## {epochs} epoch{'s' if epochs > 1 else ''}",
        "",
        f"- data: {'; '.join(data)}",
        f"- hardware: {'; '.join(_distinct(run['hardware'] | {'threads': run['threads']} for run in results))}",
        f"- versions: {'; '.join(_distinct(run['versions'] for run in results))}",
        f"- commit: {', '.join(sorted({str(run['commit']) for run in results}))}",
        f"- runs: {len(results)}, {sum(run['seconds']['all'] for run in results) / 3600:.2f} h in all",
    ]


def _row(runs: list[Result]) -> tuple[float, list[str]]:
    """Test kNN(20), by which the rows are sorted, and the cells."""
    seed, title, chosen = sweep_seed(runs), runs[0]["title"], at_best_rate(runs)
    good = [run for run in chosen if run["metrics"]]
    if not good:
        return -1.0, [title, "diverged at every rate", *[""] * (len(COLUMNS) + 4)]
    rate = good[0]["rate"]
    seeds = f"{len(good)}" if len(good) == len(chosen) else f"{len(good)} of {len(chosen)}, others diverged"
    numbers = [spread([run["metrics"]["test"][key] for run in good], digits) for _, key, digits in COLUMNS]
    cells = [
        *(title, f"{rate:g}{_edge(rate, [run['rate'] for run in runs if run['seed'] == seed])}", seeds, *numbers),
        spread([run["metrics"]["val"]["knn20"] for run in good], 4),
        spread([run["seconds"]["train"] for run in good], 1),
        f"{max(run['peak_mib_train'] for run in good):.0f}",
    ]
    return statistics.fmean(run["metrics"]["test"]["knn20"] for run in good), cells


def _sweeps(recipes: dict[str, list[Result]]) -> list[str]:
    """The sweeps: validation kNN(20) of each rate on the sweep's seed."""
    rates = sorted({run["rate"] for runs in recipes.values() for run in runs})
    lines = [_line(["validation kNN 20 at lr", *(f"{rate:g}" for rate in rates)])]
    lines.append(_line(["---"] * (1 + len(rates))))
    for name in sorted(recipes):
        seed = sweep_seed(recipes[name])
        runs = {run["rate"]: run for run in recipes[name] if run["seed"] == seed}
        lines.append(_line([name, *(_tried(runs.get(rate)) for rate in rates)]))
    return lines


def at_best_rate(runs: list[Result]) -> list[Result]:
    """The runs that a recipe is judged by, one for each seed.

    Args:
        runs: Of one recipe.

    Returns:
        Those at the best rate of its sweep, also those that diverged; none if all of the sweep did.
    """
    rate = best_rate(runs, sweep_seed(runs))
    return [run for run in runs if rate is not None and run["rate"] == rate]


def sweep_seed(runs: list[Result]) -> int:
    """The seed on which a recipe's learning rates were compared.

    Args:
        runs: Of one recipe.

    Returns:
        The seed with the most rates, the lowest of equals.
    """
    rates: dict[int, set[float]] = defaultdict(set)
    for run in runs:
        rates[run["seed"]].add(run["rate"])
    return min(rates, key=lambda seed: (-len(rates[seed]), seed))


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and sample standard deviation of the runs of a recipe.

    Args:
        values: One for each seed; None where undefined.
        digits: Decimals.

    Returns:
        ``mean ± std``, the mean alone of one seed, "undefined" where a value is.

    Example:
        >>> spread([0.5, 0.7], 2), spread([0.5], 2), spread([0.5, None], 2)
        ('0.60 ± 0.14', '0.50', 'undefined')
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "undefined"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _tried(run: Result | None) -> str:
    if run is None:
        return ""
    return f"{run['metrics']['val']['knn20']:.4f}" if run["metrics"] else "diverged"


def _edge(rate: float, rates: list[float]) -> str:
    return "\\*" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""


def _distinct(values: Iterable[dict[str, Any]]) -> list[str]:
    said = (", ".join(f"{key} {value}" for key, value in parts.items() if value is not None) for parts in values)
    return sorted(set(said))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
