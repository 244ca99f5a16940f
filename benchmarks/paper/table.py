"""The runs' JSON files as Markdown."""

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.recipes.store import Result, best_rate
from benchmarks.recipes.table import spread, sweep_seed

COLUMNS = (("kNN 1", "knn1", 4), ("kNN 20", "knn20", 4), ("linear", "linear", 4), ("mean abs cos", "orthogonality", 3))
NOTES = """\
Test split, last epoch, the ten true classes; mean ± sample standard deviation over seeds; learning rate: of those in
the recipe's file, the best by kNN(20) on the validation split on the first seed. groups: number of groups of classes
that stay apart, and in brackets the classes that are alone in theirs; two classes are merged where, of their samples,
those nearer to their own class's mean than to the other's are under 0.75 (balanced; chance is 0.5), by cosine and by
Euclidean distance, and groups are what merging connects."""


def markdown(results: Sequence[Result]) -> str:
    """One table for each budget.

    Args:
        results: Contents of the JSON files, at least one.

    Returns:
        Markdown.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError("there is no finished run to make a table of")
    sections: dict[tuple[int, str], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        sections[result["epochs"], result["setting"]][result["recipe"]].append(result)
    heads = ["recipe", "lr", "seeds", *(head for head, _, _ in COLUMNS), "groups (cosine)", "groups (distance)"]
    lines = []
    for (epochs, _), recipes in sorted(sections.items()):
        lines += [f"## {epochs} epoch{'s' if epochs > 1 else ''}", "", _line(heads), _line(["---"] * len(heads))]
        lines += [_line(_row(recipes[name])) for name in sorted(recipes)]
        lines.append("")
    return "\n".join([*lines, NOTES])


def _row(runs: list[Result]) -> list[str]:
    rate = best_rate(runs, sweep_seed(runs))
    if rate is None:
        return [runs[0]["title"], "diverged at every rate", *[""] * (3 + len(COLUMNS))]
    good = [run for run in runs if run["rate"] == rate and run["metrics"]]
    tests = [run["metrics"]["test"] for run in good]
    cells = [spread([test[key] for test in tests], digits) for _, key, digits in COLUMNS]
    for kind in ("apart", "apart_euclidean"):
        groups, alone = (spread([float(test[kind][part]) for test in tests], 1) for part in ("groups", "alone"))
        cells.append(f"{groups} ({alone})")
    return [runs[0]["title"], f"{rate:g}", str(len(good)), *cells]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
