"""Tables and the figure of ``python -m benchmarks``, from its CSV files alone."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.experiments import SHIPPED
from benchmarks.machine import MACHINE
from benchmarks.tables import common, markdown_table, spread
from benchmarks.tasks.plan import TABLE, Plan

PANELS = 4  # of a line of the figure
OURS = ("simo", "simo_softmax", "simo_pair", "simo_cross_entropy")  # rows that are ours


@dataclass(frozen=True)
class Question:
    """What a table answers: the scores of a task, of which the first decides who is first."""

    title: str
    task: str
    columns: tuple[str, ...]
    lower: bool = False  # whether a lower score is better


QUESTIONS = {
    "closed": Question(
        "Closed set",
        "closed",
        ("map_at_r", "r_precision", "recall_at_1", "knn", "linear_probe", "nearest_class_mean"),
    ),
    "unseen": Question(
        "Unseen classes",
        "unseen",
        (
            "unseen_map_at_r",
            "unseen_recall_at_1",
            "few_shot_5_way_1_shot",
            "few_shot_5_way_5_shot",
            "few_shot_20_way_1_shot",
            "few_shot_20_way_5_shot",
        ),
    ),
    "coarse": Question("Coarse to fine", "coarse", ("map_at_r", "recall_at_1", "knn", "linear_probe")),
    "unknown": Question(
        "Unknown images",
        "unseen",
        ("auroc_best", "fpr95_best", "auroc_cosine", "auroc_energy", "auroc_neighbor"),
    ),
    "tail": Question(
        "Long tail",
        "tail",
        ("accuracy_balanced", "accuracy_frequent", "accuracy_middle", "accuracy_rare", "map_at_r"),
    ),
    "wrong_20": Question("20 % wrong labels", "wrong_20", ("map_at_r", "recall_at_1", "knn", "nearest_class_mean")),
    "wrong_40": Question("40 % wrong labels", "wrong_40", ("map_at_r", "recall_at_1", "knn", "nearest_class_mean")),
    "calibration": Question(
        "Calibration",
        "closed",
        (
            "ece",
            "ece_shares",
            "ece_shares_fitted",
            "ece_softmax",
            "ece_classifier",
            "accuracy_softmax",
            "accuracy_shares",
        ),
        lower=True,
    ),
    "compression": Question(
        "Compression",
        "closed",
        ("map_at_r_8", "map_at_r_16", "map_at_r_32", "map_at_r_int8", "map_at_r_binary", "map_at_r_rotated_binary"),
    ),
    "speed": Question("Speed", "closed", ("seconds_to_mark", "train_seconds"), lower=True),
}


def scores(plan: Plan, data: str, question: str) -> pd.DataFrame:
    """The scores of every chosen run: one row per loss and seed, a column per score of the question."""
    asked = QUESTIONS[question]
    frame, runs = plan.scored(), plan.runs()
    if (data, question) in plan.known:
        known: pd.DataFrame = plan.known[data, question]
        return known
    parts = []
    for loss in plan.losses:
        best = plan.best(data, loss)
        if best is None:
            continue
        own = [each[_at(each, data, asked.task, loss, *best)] for each in (frame, runs)]
        part = own[0].drop_duplicates("seed", keep="last").set_index("seed")
        if question == "speed":
            part = own[1].drop_duplicates("seed", keep="last").set_index("seed")
            part["train_seconds"] = part["course"].map(lambda text: _course(text)[-1][0])
        if question == "calibration":
            part["ece"] = own_error(part, loss)
        parts.append(part.assign(loss=loss))
    found = pd.concat(parts) if parts else pd.DataFrame(columns=["loss"])
    if question == "speed" and len(found):
        goal = mark(found)
        found["seconds_to_mark"] = found["course"].map(lambda text: seconds_to(text, goal))
    found = found.reindex(columns=["loss", *asked.columns]).dropna(axis=1, how="all")
    plan.known[data, question] = found
    return found


def own_error(scored: pd.DataFrame, loss: str) -> "pd.Series[float]":
    """Calibration error of a loss's own probabilities: SimO's shares; else, with a fitted temperature, the logits of
    the classifier that the loss trains, or the cosines to the class means. Behind a projection head these are the
    cosines for every loss, since no loss shapes the embeddings themselves.
    """
    shares, classifier, cosines = (
        scored.reindex(columns=[f"ece_{name}"])[f"ece_{name}"] for name in ("shares", "classifier", "softmax")
    )
    own = shares if loss in OURS else classifier.fillna(cosines)
    return own.where(~scored["variant"].str.contains("projection_head"), cosines)


def _at(frame: pd.DataFrame, data: str, task: str, loss: str, variant: str, rate: float) -> "pd.Series[bool]":
    wanted = {"data": data, "task": task, "loss": loss, "variant": variant, "rate": rate}
    at = frame["error"].isna()
    for name, value in wanted.items():
        at &= frame[name] == value
    return at


def _course(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(":"))) for point in text.split()]  # type: ignore[misc]


def mark(runs: pd.DataFrame) -> float:
    """The MAP@R whose time is compared: nine tenths of what cross-entropy has among validation images at its end."""
    courses = runs.loc[runs["loss"] == "cross_entropy", "course"]
    return 0.9 * float(np.mean([_course(text)[-1][1] for text in courses])) if len(courses) else math.nan


def seconds_to(course: str, goal: float) -> float:
    """Seconds of training until MAP@R reaches a mark, linear between the points of a course; nan if it does not."""
    before = (0.0, 0.0)
    for seconds, value in _course(course):
        if value >= goal:
            return before[0] + (seconds - before[0]) * (goal - before[1]) / (value - before[1])
        before = (seconds, value)
    return math.nan


def ranked(plan: Plan, data: str, question: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the first score of each loss, the best first; without those that lack
    it in one of their seeds.
    """
    asked, found = QUESTIONS[question], scores(plan, data, question)
    if found.empty or asked.columns[0] not in found:
        return pd.DataFrame(columns=["mean", "std", "count"])
    of_loss = found.groupby("loss")[asked.columns[0]].agg(["mean", "std", "count", "size"])
    whole = of_loss[of_loss["count"] == of_loss["size"]]
    return whole.drop(columns="size").sort_values("mean", ascending=asked.lower)


def preferred(plan: Plan, data: str) -> str | None:
    """Which of our losses has the best MAP@R among the validation images; None if none has been run."""
    found = {loss: plan.sweep(data, loss)["val_map_at_r"].astype(float).max() for loss in OURS if loss in plan.losses}
    found = {loss: value for loss, value in found.items() if not pd.isna(value)}
    return max(found, key=lambda loss: found[loss]) if found else None


def verdict(plan: Plan, data: str, question: str, ours: str) -> str:
    """Place of one of our losses among all that are not ours, in words, with the difference from the best of them.

    The spread of a difference is the root of the sum of both variances over seeds. Level is within it.
    """
    table = ranked(plan, data, question)
    others = table[~table.index.isin(OURS)]
    if ours not in table.index or others.empty:
        return ""
    mine, best = table.loc[ours], others.iloc[0]
    sign = -1 if QUESTIONS[question].lower else 1
    difference = sign * (mine["mean"] - best["mean"])
    width = math.sqrt(np.nan_to_num(mine["std"]) ** 2 + np.nan_to_num(best["std"]) ** 2)
    place = "level with" if abs(difference) <= width else "ahead of" if difference > 0 else "behind"
    return f"{place} {plan.losses[best.name]['title']}, {difference:+.3g} (spread {width:.2g})"


def table(plan: Plan, data: str, question: str) -> list[str]:
    """Markdown of one question on one data set: mean ± standard deviation over seeds, the best first."""
    asked, found = QUESTIONS[question], scores(plan, data, question)
    columns = [name for name in asked.columns if name in found]
    if found.empty or not columns:
        return []
    digits = 1 if question == "speed" else 4 if question == "calibration" or data == "tiny_imagenet" else 3
    order = [*ranked(plan, data, question).index]
    order += [loss for loss in found["loss"].unique() if loss not in order]
    rows = []
    for loss in order:
        own = found[found["loss"] == loss]
        cells = [_cell(own[name], digits) for name in columns]
        rows.append([plan.losses[loss]["title"], str(len(own)), *cells])
    return markdown_table(["loss", "seeds", *(name.replace("_", " ") for name in columns)], rows)


def parts(plan: Plan, data: str) -> list[str]:
    """Markdown of the tasks that are no question of their own, such as parts of a data set: MAP@R by loss and task."""
    tasks = [task for task in plan.tasks if task not in {asked.task for asked in QUESTIONS.values()}]
    rows, scored, digits = [], plan.scored(), 4 if data == "tiny_imagenet" else 3
    for loss, entry in plan.losses.items():
        best = plan.best(data, loss)
        if best is not None:
            own = [scored[_at(scored, data, task, loss, *best)].drop_duplicates("seed", keep="last") for task in tasks]
            rows.append([entry["title"], *("" if each.empty else _cell(each["map_at_r"], digits) for each in own)])
    titles = [plan.tasks[task].get("title", task) for task in tasks]
    return markdown_table(["MAP@R", *titles], rows) if any(any(row[1:]) for row in rows) else []


def _cell(values: "pd.Series[float]", digits: int) -> str:
    return "" if values.isna().all() else "not in every seed" if values.isna().any() else spread(values, digits)


def settings(plan: Plan, data: str) -> list[str]:
    """Markdown of what was chosen for each loss, with its MAP@R among the validation images, and among how many."""
    rows = []
    for loss, entry in plan.losses.items():
        found, best = plan.sweep(data, loss), plan.best(data, loss)
        if best is None:
            continue
        rates = found.loc[found["variant"] == "", "rate"].astype(float)
        edge = "\\*" if len(rates) > 1 and best[1] in (rates.min(), rates.max()) else ""
        of_best = (found["variant"] == best[0]) & (found["rate"].astype(float) == best[1])
        value = f"{found.loc[of_best, 'val_map_at_r'].astype(float).max():.4f}"
        rows.append([entry["title"], f"{best[1]:g}{edge}", _words(best[0]) or "default", value, str(len(found))])
    return markdown_table(["loss", "rate", "setting", "validation MAP@R", "settings tried"], rows) if rows else []


def _words(variant: str) -> str:
    for sign in '{}"':
        variant = variant.replace(sign, "")
    return variant.replace("arguments: ", "")


def summary(plan: Plan) -> list[str]:
    """Markdown: for every question and data set, where the form of SimO that validation prefers stands."""
    ours = {data: preferred(plan, data) for data in plan.data}
    ours = {data: loss for data, loss in ours.items() if loss is not None}
    rows = []
    for name, asked in QUESTIONS.items():
        cells = [verdict(plan, data, name, str(loss)) for data, loss in ours.items()]
        if any(cells):
            rows.append([asked.title, *cells])
    titles = [f"{plan.data[data]['title']}: {plan.losses[str(loss)]['title']}" for data, loss in ours.items()]
    return markdown_table(["question", *titles], rows) if rows else []


def page(plan: Plan) -> str:
    """All tables of the results in a folder."""
    runs = plan.runs()
    if runs.empty:
        return "no run has been made"
    seconds = runs["seconds"].astype(float).sum() / 3600
    lines = [
        *common(runs, [name for name in MACHINE if name != "load_before"]),
        f"- runs: {len(runs)}, {seconds:.1f} hours of one process",
    ]
    brief = summary(plan)
    if brief:
        lines += ["", "## The form of SimO that validation prefers, against the best other loss", "", *brief]
    for data, entry in plan.data.items():
        chosen = settings(plan, data)
        if chosen:
            lines += ["", f"## {entry['title']}: {entry['about']}", "", "### Settings", "", *chosen]
        for name, asked in QUESTIONS.items():
            rows = table(plan, data, name)
            if rows:
                told = {ours: verdict(plan, data, name, ours) for ours in OURS if ours in plan.losses}
                words = [f"{plan.losses[ours]['title']}: {words}." for ours, words in told.items() if words]
                lines += ["", f"### {asked.title}", "", *rows, "", " ".join(words)]
        rows = parts(plan, data)
        if rows:
            lines += ["", "### Parts", "", *rows]
    return "\n".join(lines)


def figure(plan: Plan) -> Figure:
    """The first score of every question and data set: each loss as a point, ours in color, with the spread of seeds."""
    lines: list[list[tuple[str, str]]] = []  # data set and question of each panel, a data set begins a line
    for name in plan.data:
        asked = [(name, question) for question in QUESTIONS if not ranked(plan, name, question).empty]
        lines += [asked[start : start + PANELS] for start in range(0, len(asked), PANELS)]
    drawn = Figure(figsize=(3.2 * PANELS, 2.4 * max(1, len(lines))), layout="constrained")
    axes = drawn.subplots(max(1, len(lines)), PANELS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, line in enumerate(lines):
        for column, (name, question) in enumerate(line):
            axis, shown = axes[row, column], ranked(plan, name, question).iloc[::-1]
            axis.set_axis_on()
            for place, (loss, values) in enumerate(shown.iterrows()):
                own = loss in OURS
                style = {"color": f"C{OURS.index(str(loss))}" if own else "0.5", "marker": "o" if own else "x"}
                axis.errorbar(values["mean"], place, xerr=np.nan_to_num(values["std"]), markersize=5, **style)
            axis.set_yticks(range(len(shown)), [plan.losses[str(loss)]["title"] for loss in shown.index], fontsize=6)
            axis.set_title(f"{plan.data[name]['title']}: {QUESTIONS[question].title}", fontsize=7)
            axis.tick_params(axis="x", labelsize=6)
            better = ", lower is better" if QUESTIONS[question].lower else ""
            axis.set_xlabel(QUESTIONS[question].columns[0].replace("_", " ") + better, fontsize=6)
    return drawn


def sizes(plan: Plan, data: str, kind: str) -> pd.DataFrame:
    """MAP@R of the tasks that differ in one size: a row per loss, size and seed.

    Args:
        plan: With a table as ``sizes.yaml``.
        data: Data set.
        kind: "images" (of a class) or "classes": tasks ``{kind}_{number}``.
    """
    rows, found = [], plan.scored()
    for loss in plan.losses:
        best = plan.best(data, loss)
        for task in plan.tasks:
            name, _, number = task.partition("_")
            if name == kind and best is not None:
                own = found[_at(found, data, task, loss, *best)].drop_duplicates("seed", keep="last")
                rows += [{"loss": loss, kind: int(number), "map_at_r": value} for value in own["map_at_r"]]
    return pd.DataFrame(rows, columns=["loss", kind, "map_at_r"])


def _of_sizes(plan: Plan) -> pd.DataFrame:
    """The scores of tasks that differ in one size; the closed set, where the settings were chosen, is none of them."""
    found = plan.scored()
    return found[found["task"].str.startswith(("images_", "classes_"))]


def size_figure(plan: Plan) -> Figure:
    """MAP@R against images of a class and against classes, a line for each loss, with the spread of seeds."""
    data = str(_of_sizes(plan)["data"].iloc[0])
    drawn = Figure(figsize=(9, 4), layout="constrained")
    for axis, kind in zip(drawn.subplots(1, 2), ("images", "classes"), strict=True):
        found = sizes(plan, data, kind)
        for loss, own in found.groupby("loss", sort=False):
            values = own.groupby(kind)["map_at_r"].agg(["mean", "std"])
            color = colormaps["tab20"](list(plan.losses).index(str(loss)))
            style = {"marker": "o" if loss in OURS else "x", "color": color}
            label = plan.losses[str(loss)]["title"]
            axis.errorbar(values.index, values["mean"], yerr=np.nan_to_num(values["std"]), label=label, **style)
        axis.set_xscale("log")
        axis.set_xticks(sorted(found[kind].unique()), [str(size) for size in sorted(found[kind].unique())])
        axis.minorticks_off()
        axis.set_xlabel({"images": "training images of a class", "classes": "classes"}[kind])
        axis.set_ylabel("MAP@R, test images")
    axis.legend(fontsize=7)
    return drawn


def main() -> None:
    """Print the tables, or draw the figure."""
    own = argparse.ArgumentParser("python -m benchmarks.tasks.tables", description=__doc__)
    own.add_argument("--out", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the shipped results")
    own.add_argument(
        "--table", type=Path, default=TABLE, metavar="FILE", help="another table of data, losses and tasks"
    )
    own.add_argument("--gpu", action="store_true", help="the runs with --gpu")
    own.add_argument("--figure", type=Path, metavar="FILE", help="draw the figure instead")
    given = own.parse_args()
    plan = Plan(given.out, given.table, given.gpu)
    of_sizes = any(task.startswith("images_") for task in plan.tasks)
    if (plan.runs() if given.figure is None else _of_sizes(plan) if of_sizes else plan.scored()).empty:
        own.error(f"--out must have results of the runs of {given.table}, got none in {given.out}")
    if given.figure is None:
        print(page(plan))
    elif of_sizes:
        size_figure(plan).savefig(given.figure, dpi=130)
    else:
        figure(plan).savefig(given.figure, dpi=130)


if __name__ == "__main__":
    main()
