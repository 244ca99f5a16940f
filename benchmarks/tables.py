"""The command: python -m benchmarks.tables, tables and pictures of the CSV files, from which all numbers come."""

import argparse
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.experiments import SHIPPED, TABLE, read, read_table
from benchmarks.machine import MACHINE
from benchmarks.prototypes import markdown as prototypes
from benchmarks.scaling_model import markdown as scaling_model
from simo_lightning.plotting import class_similarity_figure, project_2d, scatter_figure

NOTES = """\
Test split at the last step, mean ± sample standard deviation over seeds; no checkpoint is chosen. Learning rate: the
sweep of each row on its first seed, by kNN(20) on the validation split, which is held out of the training images and
used for nothing else; an asterisk marks a best rate at the edge of its sweep. kNN: by cosine, equal votes, among all
labelled training images. linear: logistic regression (scikit-learn, C = 1) on standardised embeddings. MLP: one epoch
of Linear(256), ReLU, Linear on the frozen encoder, AdamW at 4e-3, one cycle, augmented images. class cosine: mean and
largest |cosine| between class means. groups: number of groups of classes that stay apart, in brackets the classes that
are alone in theirs; two classes are merged where less than 0.75 of their samples (balanced; chance is 0.5) lie nearer
to their own class mean than to the other, and groups are the connected components of merged pairs. images a step:
images embedded at each optimizer step, views counted. training: seconds without evaluation. peak: largest resident set
of the process by the end of training, with all of Python."""
KEYS = ["name", "config", "seed", "rate"]  # of a run, in its snapshots
SUMMARY = ["simo_log_prototypes", "simo", "cross_entropy", "normalized_softmax", "supcon"]


def sweep_seed(runs: pd.DataFrame) -> int:
    """The seed of the learning rate sweep: the one with the most rates, the lowest of equals."""
    return int(runs.groupby("seed")["rate"].nunique().idxmax())


def best_rate(runs: pd.DataFrame, seed: int) -> float | None:
    """The rate whose run of this seed was best on the validation split, the lower of equals; None if none converged."""
    sweep = runs[(runs["seed"] == seed) & runs["error"].isna()]
    return None if sweep.empty else float(sweep.sort_values("rate").set_index("rate")["val_knn20"].idxmax())


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that a row is judged by: those at the best rate of its sweep, also those that diverged."""
    return runs[runs["rate"] == best_rate(runs, sweep_seed(runs))]


def lines_of(frame: pd.DataFrame, rows: Iterable[str]) -> list[tuple[str, pd.DataFrame]]:
    """Name and runs of each line of a table, by words, length and place in ``rows``; of several configs the latest."""
    if frame.get("checksum", pd.Series(dtype=str)).nunique() > 1:
        raise ValueError(f"the runs of a table must be of the same images, got {set(frame['checksum'].dropna())}")
    place = {name: index for index, name in enumerate(rows)}
    frame = frame.assign(place=frame["name"].map(place).fillna(len(place)))
    groups = frame.groupby(["words", "epochs", "place", "name"], dropna=False)
    return [(str(key[3]), runs[runs["config"] == runs["config"].iloc[-1]]) for key, runs in groups]


def spread(values: "pd.Series[float]", digits: int) -> str:
    """``mean ± std`` of the runs of a line, the mean alone of one seed, "undefined" where a value is.

    Example:
        >>> spread(pd.Series([0.5, 0.7]), 2), spread(pd.Series([0.5]), 2), spread(pd.Series([0.5, None]), 2)
        ('0.60 ± 0.14', '0.50', 'undefined')
    """
    if values.isna().any():
        return "undefined"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def markdown(study: str, out: Path = SHIPPED, table: Path = TABLE) -> str:
    """The table of a study, under what its runs have in common."""
    content, frame = read_table(table)[study], read(out / f"{study}.csv")
    if frame.empty:
        raise ValueError(f"there is no finished run of {study} in {out}")
    if "val_knn20" not in frame:  # every run diverged
        frame = frame.reindex(columns=[*frame.columns, *{"val_knn20", content.get("sort", "val_knn20")}])
    lines, several = lines_of(frame, content["rows"]), frame["epochs"].nunique() > 1
    used, sort = pd.concat([runs for _, runs in lines]), content.get("sort")
    if sort:
        lines.sort(key=lambda line: -np.nan_to_num(chosen(line[1])[sort].mean(), nan=-1.0))
    heads = [*(["epochs"] if several else []), "training", "lr", "seeds", *content["columns"]]
    hours = f", {used['all_seconds'].sum() / 3600:.2f} h in all" if "all_seconds" in used else ""
    parts = [*common(used, ["words", "train_images", "val_images", "test_images", "checksum", *MACHINE])]
    parts += [
        f"- runs: {len(used)}{hours}",
        "",
        *markdown_table(heads, [_cells(*line, content, several) for line in lines]),
    ]
    if content.get("sweep"):
        first = pd.concat([runs[runs["seed"] == sweep_seed(runs)].assign(name=name) for name, runs in lines])
        tried = first.assign(text=first["val_knn20"].map("{:.4f}".format).where(first["error"].isna(), "diverged"))
        tried = tried.pivot(index="name", columns="rate", values="text").fillna("")
        heads = ["validation kNN 20 at lr", *(f"{rate:g}" for rate in tried.columns)]
        parts += ["", *markdown_table(heads, tried.reset_index().to_numpy())]
    return "\n".join([*parts, "", NOTES])


def _cells(name: str, runs: pd.DataFrame, content: dict[str, Any], several: bool) -> list[str]:
    title = {**content["defaults"], **content["rows"].get(name, {})}.get("title", name)
    first, best = [*([str(runs["epochs"].iloc[0])] if several else []), title], chosen(runs)
    good = best[best["error"].isna()]
    if good.empty:
        return [*first, "diverged at every rate", *[""] * (len(content["columns"]) + 1)]
    rate, swept = good["rate"].iloc[0], runs.loc[runs["seed"] == sweep_seed(runs), "rate"]
    edge = "\\*" if swept.nunique() > 1 and rate in (swept.min(), swept.max()) else ""
    seeds = f"{len(good)}" if len(good) == len(best) else f"{len(good)} of {len(best)}, others diverged"
    return [*first, f"{rate:g}{edge}", seeds, *(_cell(good, *column) for column in content["columns"].values())]


def _cell(good: pd.DataFrame, column: str | list[str], digits: int | None) -> str:
    if isinstance(column, list):
        return "{} ({})".format(*(_cell(good, part, digits) for part in column))
    values = good.get(column, pd.Series([np.nan] * len(good)))
    if digits is None:
        return _plain(values.iloc[0])
    if column.startswith("seconds_to") and values.isna().any():
        return "not reached"
    return f"{values.max():.{digits}f}" if column.startswith("peak") else spread(values, digits)


def summary(out: Path = SHIPPED) -> str:
    """The leading losses at five and at fifteen epochs, to three decimals."""
    frames, rows = [read(out / f"{study}.csv") for study in ("recipes", "recipes_15")], []
    for name in SUMMARY:
        found = [chosen(frame[frame["name"] == name]) if name in set(frame["name"]) else None for frame in frames]
        columns = ["test_knn20", "test_linear", "test_class_cosine"]
        cells = ["" if runs is None else spread(runs[column], 3) for runs in found for column in columns]
        rows.append([read_table()["recipes"]["rows"][name]["title"], *cells])
    heads = [f"{epochs} epochs: {head}" for epochs in (5, 15) for head in ("kNN(20)", "linear probe", "class cosine")]
    return "\n".join(markdown_table(["loss", *heads], rows))


def timing(name: str, out: Path = SHIPPED) -> str:
    """The table of a timing (``benchmarks.timing``)."""
    frame = read(out / f"{name}.csv")
    if frame.empty:
        raise ValueError(f"there is no {name}.csv in {out}")
    shown = frame.drop(columns=[*MACHINE, "words"], errors="ignore").dropna(axis=1, how="all")
    if "loss" in shown:  # times relative to a copy of the embeddings and to SupCon
        times = shown.pivot(index=["rows", "dim", "classes"], columns="loss", values="milliseconds")
        shown = shown.join(times.reindex(columns=["floor", "supcon", "pml"]), on=times.index.names)
        shown["it / floor"] = shown["milliseconds"] / shown.pop("floor")
        for other in ("supcon", "pml"):
            shown[f"{other} / it"] = shown.pop(other) / shown["milliseconds"]
    if "measured" in shown:  # a column for each number of classes and dimensions, in the order of the file
        sizes = shown["classes"].map("{:,}".format) + " x " + shown["dim"].map("{:,}".format)
        wide = shown.assign(size=sizes).pivot(index="measured", columns="size", values="value")
        shown = wide.reindex(index=shown["measured"].unique(), columns=sizes.unique()).reset_index()
    rows = [[_plain(value, 3) for value in row] for row in shown.astype(object).itertuples(index=False)]
    return "\n".join([*common(frame, MACHINE), "", *markdown_table(list(shown), rows)])


def common(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """What the runs have in common; where they differ, all values."""
    known = {column: frame[column].dropna().drop_duplicates() for column in columns if column in frame}
    told = {name: f"{name} {', '.join(sorted(map(_plain, values)))}" for name, values in known.items() if any(values)}
    data = ", ".join(told.pop(name) for name in list(told) if name not in MACHINE)
    return [*([f"- data: {data}"] if data else []), f"- machine: {', '.join(told.values())}"]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]


def _plain(value: Any, digits: int = 6) -> str:
    if isinstance(value, str) or pd.isna(value):
        return "" if not isinstance(value, str) else value
    if value != int(value) and (digits == 6 or abs(value) < 1000):
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if digits < 6 else str(int(value))


def comparison_figure(studies: Sequence[str], out: Path = SHIPPED) -> Figure:
    """kNN and class cosine of each line, best on top: mean over seeds, sample standard deviation as a bar.

    Two panels for each study; SimO's forms are blue, other losses orange. Diverged runs are left out.
    """
    columns, parts = {"test_knn20": "test kNN(20)", "test_class_cosine": "class cosine"}, []
    for study in studies:
        frame = read(out / f"{study}.csv")
        good = pd.concat([chosen(runs) for _, runs in lines_of(frame, ())]) if len(frame) else frame
        good = good[good["error"].isna()]
        if good.empty:
            raise ValueError(f"there is no finished run of {study} with numbers to draw")
        parts.append(good.groupby("name")[[*columns]].agg(["mean", "std"]).sort_values(("test_knn20", "mean")))
    heights = [1.0 + 0.24 * len(part) for part in parts]
    figure = Figure(figsize=(8.0, sum(heights)), layout="constrained")
    grid = figure.subplots(len(parts), 2, sharey="row", squeeze=False, height_ratios=heights)
    for study, panels, part in zip(studies, grid, parts, strict=True):
        colors = ["#0072B2" if name.startswith("simo") else "#D55E00" for name in part.index]  # of Okabe & Ito
        for axes, (column, label) in zip(panels, columns.items(), strict=True):
            axes.errorbar(part[column, "mean"], part.index, xerr=part[column, "std"], fmt="none", ecolor=colors)
            axes.scatter(part[column, "mean"], part.index, c=colors, s=25)
            axes.set_xlabel(label)
            axes.tick_params(axis="y", labelsize="small")
            axes.grid(axis="x", alpha=0.3)
        panels[0].set_title(study, fontsize="medium", loc="left")
    return figure


def levels_figure(out: Path = SHIPPED) -> Figure:
    """Milliseconds against N, a panel for each D and C, a line for each loss."""
    shapes = list(read(out / "levels.csv").groupby(["dim", "classes"], sort=False))
    figure = Figure(figsize=(3.6 * len(shapes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, ((dim, classes), cases) in zip(panels, shapes, strict=True):
        times = cases.pivot(index="rows", columns="loss", values="milliseconds")
        times.plot(ax=panel, loglog=True, style="o-", markersize=3, legend=panel is panels[0], grid=True, xlabel="N")
        panel.set(title=f"D = {dim}, C = {classes:,}", ylabel="ms, forward and backward, one thread")
    return figure


def per_class_figure(taken: pd.DataFrame) -> Figure:
    """Each class's kNN over the snapshots of a run as a heat map, under the number of groups that stay apart.

    Classes are in the order in which they pass one half for good: one class at a time is a staircase.
    """
    accuracy = taken.pivot_table(index="class", columns="epoch", values="knn20", sort=False)
    above = (accuracy.iloc[:, ::-1] > 0.5).cumprod(axis=1).sum(axis=1)  # snapshots at the end that are above one half
    last = accuracy.iloc[:, -1].where(above == 0, 1.0)
    accuracy = accuracy.loc[
        pd.DataFrame({"above": -above, "last": -last}).sort_values(["above", "last"], kind="stable").index
    ]
    rows, count = accuracy.shape
    figure = Figure(figsize=(max(6.0, 2 + 0.35 * count), 3.2 + 0.32 * rows), layout="constrained")
    upper, axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, rows))
    upper.step(range(count), taken.groupby("epoch")["group"].max() + 1, where="mid", color="black")
    upper.set(ylim=(0.5, rows + 0.5), ylabel="groups apart", title="Classes over training (validation)")
    image = axes.imshow(accuracy, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(rows), accuracy.index)
    axes.set_xticks(range(count), [f"{epoch:.2g}" for epoch in accuracy.columns])
    axes.set_xlabel("epoch")
    figure.colorbar(image, ax=axes, label="accuracy of 20 nearest neighbours")
    return figure


def snapshot_figures(study: str, names: Sequence[str] | None, out: Path = SHIPPED) -> dict[str, Figure]:
    """Pictures of the best run of each row's first seed: classes over training, cosines of class means at the end, and
    a scatter plot of each snapshot where the run left its points in ``out/points``.
    """
    taken, runs, figures = read(out / f"{study}_snapshots.csv"), read(out / f"{study}.csv"), {}
    for name, own in lines_of(runs[runs["name"].isin(names or set(runs["name"]))], ()):
        best = chosen(own)
        if best.empty:
            continue
        first = best[best["seed"] == sweep_seed(own)].iloc[0]
        course = taken[(taken[KEYS] == first[KEYS]).all(axis=1)]
        course = course[(course["split"] == "val") & (course["class"] != "all")]
        last = course[course["step"] == course["step"].max()]
        means = torch.tensor(last.filter(regex=r"^mean_\d+$").dropna(axis=1).to_numpy())
        figures[f"{name}_per_class_knn"] = per_class_figure(course)
        figures[f"{name}_similarity"] = class_similarity_figure(means, list(last["class"]))
        length = first["steps"] if pd.isna(first["epochs"]) else first["epochs"]
        points = out / "points" / f"{study}-{name}-{length}-lr{first['rate']:g}-seed{first['seed']}.npz"
        if points.is_file():
            stored = np.load(points)
            labels = torch.from_numpy(stored["labels"])
            for step, embeddings in zip(sorted(set(course["step"])), stored["points"], strict=True):
                title = f"Step {step}: {len(embeddings)} validation embeddings"
                shown = project_2d(torch.from_numpy(embeddings))
                figures[f"{name}_scatter_{step:06d}"] = scatter_figure(shown, labels, list(last["class"]), title)
    return figures


def main(words: Sequence[str] | None = None) -> None:
    """Print tables; draw pictures where asked to."""
    own = argparse.ArgumentParser("python -m benchmarks.tables", description=__doc__, allow_abbrev=False)
    own.add_argument(
        "names", nargs="+", help="studies of experiments.yaml, timings, summary, scaling_model, or prototypes"
    )
    own.add_argument("--out", type=Path, default=SHIPPED, metavar="FOLDER", help="of the CSV files (default: shipped)")
    own.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="another table of experiments")
    own.add_argument("--plot", type=Path, metavar="FILE", help="draw the studies, or levels, into FILE")
    own.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the snapshots of the studies' runs, too")
    own.add_argument("--rows", nargs="+", metavar="NAME", help="rows that --figures draws (default: all)")
    given = own.parse_args(words)
    try:
        for name in given.names:
            if name in read_table(given.table):
                print(markdown(name, given.out, given.table))
            elif name == "scaling_model":
                print(scaling_model())
            elif name == "prototypes":
                print(prototypes())
            else:
                print(summary(given.out) if name == "summary" else timing(name, given.out))
            for file, figure in (snapshot_figures(name, given.rows, given.out) if given.figures else {}).items():
                given.figures.mkdir(parents=True, exist_ok=True)
                figure.savefig(given.figures / f"{file}.png", dpi=100)
        if given.plot:
            levels = given.names == ["levels"]
            figure = levels_figure(given.out) if levels else comparison_figure(given.names, given.out)
            figure.savefig(given.plot, dpi=100)
    except ValueError as error:
        own.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for | head
    main()
