"""The runs' JSON files as Markdown; no number here comes from anything else."""

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.recipes.store import Result, best_rate
from benchmarks.recipes.table import spread, sweep_seed
from benchmarks.semi.plan import ARMS, TITLES

NOTES = """\
Test split at the last step, mean ± sample standard deviation over seeds; the labels that are known are the same ones in
every run. kNN 20: by cosine, among the labelled training images alone; linear: logistic regression (scikit-learn,
C = 1) on their embeddings, standardised. Each arm's learning rate is the best by kNN(20) on the validation split on the
first seed, of those tried. steps x images: optimizer steps, and images embedded at each, views counted: what a run
costs; "as many images" has as many in all as the arm with unlabelled ones."""


def markdown(results: Sequence[Result]) -> str:
    """One table: a row for each share of labels and arm.

    Args:
        results: Contents of the JSON files, at least one.

    Returns:
        Markdown.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError("there is no finished run to make a table of")
    rows: dict[tuple[float, str, int], list[Result]] = defaultdict(list)
    for result in results:
        rows[result["fraction"], result["arm"], result["steps"]].append(result)
    heads = [
        "labels",
        "training",
        "lr",
        "seeds",
        "steps x images",
        "kNN 20",
        "linear",
        "validation kNN 20",
        "training s",
    ]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for key in sorted(rows, key=lambda key: (key[0], ARMS.index(key[1]), key[2])):
        lines.append(_line(_row(rows[key])))
    first = results[0]
    about = [", ".join(f"{name} {value}" for name, value in first[part].items()) for part in ("hardware", "versions")]
    return "\n".join([*lines, "", *(f"- {line}" for line in about), "", NOTES])


def _row(runs: list[Result]) -> list[str]:
    first = runs[0]
    cells = [f"{first['fraction']:.3g}", TITLES[first["arm"]]]
    rate = best_rate(runs, sweep_seed(runs))
    if rate is None:
        return [*cells, "diverged at every rate", *[""] * 6]
    good = [run for run in runs if run["rate"] == rate and run["metrics"]]
    numbers = [spread([run["metrics"]["test"][key] for run in good], 4) for key in ("knn20", "linear")]
    numbers += [spread([run["metrics"]["val"]["knn20"] for run in good], 4)]
    seconds = spread([run["seconds"]["train"] for run in good], 0)
    return [*cells, f"{rate:g}", str(len(good)), f"{first['steps']} x {first['images']}", *numbers, seconds]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
