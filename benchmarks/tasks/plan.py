"""Which runs the protocol needs, which of them have been made, and what was chosen."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.experiments import SHIPPED, read

TABLE = Path(__file__).with_name("tasks.yaml")
# not arguments of the loss
OF_THE_RUN = ("loss_lr_factor", "embedding_dim", "classes_per_batch", "samples_per_class", "projection_head")
KEYS = ["data", "task", "loss", "variant", "rate", "seed", "config"]
WIDEN = 8  # a sweep ends at this factor beyond its first rates
PROTOCOL = 2  # raise it when training changes what a number means: all runs are then made again


@dataclass(frozen=True)
class Run:
    """One training run; ``variant`` is the JSON of what differs from the loss's default, "" for none."""

    data: str
    task: str
    loss: str
    variant: str
    rate: float
    seed: int


class Plan:
    """The protocol of a table, and the results in a folder.

    Args:
        out: Folder of ``tasks.csv`` (runs), ``tasks_scores.csv`` and the embeddings.
        table: YAML file as ``tasks.yaml``; what it lacks is that of the file that it names as ``base``.
        gpu: Whether to train ResNet-18 at full width.
    """

    def __init__(self, out: Path = SHIPPED, table: Path = TABLE, gpu: bool = False) -> None:
        content: dict[str, Any] = yaml.safe_load(table.read_text())
        if "base" in content:
            content = {**yaml.safe_load((table.parent / content["base"]).read_text()), **content}
        self.out, self.gpu = out, gpu
        self.data, self.losses, self.tasks = content["data"], content["losses"], content["tasks"]
        self.rates, self.seeds = [float(rate) for rate in content["rates"]], content["seeds"]
        self.widen, self.heads = content.get("widen", WIDEN), content["projection_heads"]
        self.sweeps_batches = content["sweep_batches"]
        self.encoder = {"backbone": "resnet18", "width": 1.0} if gpu else content["encoder"]
        self._frames: dict[str, tuple[int, pd.DataFrame]] = {}
        self.known: dict[Any, Any] = {}  # what has been read from the results, until they grow

    def add_folders(self, command: argparse.ArgumentParser) -> None:
        """Give a command an argument for the folder of each data set."""
        for name, entry in self.data.items():
            command.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"{entry['title']}: {entry['about']}")

    def check_folders(self, command: argparse.ArgumentParser, given: argparse.Namespace) -> None:
        """End a command without a folder, or with one that lacks a split, with one line."""
        folders = {name: getattr(given, name) for name in self.data}
        if not any(folders.values()):
            command.error(f"a folder of images is needed: {', '.join(f'--{name} DIR' for name in folders)}")
        for name, folder in folders.items():
            needed = ["train", "val", "test"] if self.data[name]["val_fraction"] is None else ["train", "test"]
            if folder is not None and not all((folder / split).is_dir() for split in needed):
                command.error(f"--{name} must hold folders {', '.join(needed)}, got {folder}")

    def about(self, data: str) -> dict[str, Any]:
        """The entry of a data set without what is not of a run, and with the encoder."""
        entry = self.data[data]
        own = {key: value for key, value in entry.items() if key not in ("title", "about", "batches")}
        return {**own, "encoder": {**self.encoder, **entry.get("encoder", {})}}

    def variants(self, loss: str) -> list[str]:
        """What is swept of a loss besides its rate, as JSON."""
        return [json.dumps(each, sort_keys=True) for each in self.losses[loss].get("variants", [])]

    def batches(self, data: str, variant: str) -> list[str]:
        """A variant with the other batches of a data set, as JSON."""
        given, others = json.loads(variant) if variant else {}, self.data[data].get("batches", [])
        return [json.dumps({**given, **each}, sort_keys=True) for each in others if self.sweeps_batches]

    def with_head(self, variant: str) -> str:
        """A variant behind a projection head, as JSON."""
        return json.dumps({**(json.loads(variant) if variant else {}), "projection_head": True}, sort_keys=True)

    def tried(self, data: str, loss: str, head: bool) -> list[str]:
        """The variants that have been tried, with or without a projection head."""
        return [each for each in self.sweep(data, loss)["variant"].unique() if ("projection_head" in each) == head]

    def setting(self, run: Run) -> dict[str, Any]:
        """Class path and arguments of the run's loss, and what else it sets."""
        entry = self.losses[run.loss]
        given = {**entry.get("run", {}), **(json.loads(run.variant) if run.variant else {})}
        own = {key: given.pop(key) for key in OF_THE_RUN if key in given}
        loss = entry["loss"]
        return {**own, "class_path": loss["class_path"], "init_args": {**loss.get("init_args", {}), **given}}

    def keys(self, run: Run) -> dict[str, Any]:
        """The columns of a run that identify it; ``config`` is a digest of all that determines its result."""
        task = {key: value for key, value in self.tasks[run.task].items() if key not in ("title", "data")}
        content = [PROTOCOL, self.about(run.data), task, self.setting(run)]
        digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=6).hexdigest()
        return {**run.__dict__, "config": digest}

    def file(self, run: Run) -> Path:
        """Where the run keeps its embeddings."""
        digest = hashlib.blake2b(json.dumps(self.keys(run), sort_keys=True).encode(), digest_size=8).hexdigest()
        return self.out / "embeddings" / f"{run.data}-{run.task}-{run.loss}-{run.seed}-{digest}.npz"

    def runs(self) -> pd.DataFrame:
        """The finished runs of the present table."""
        return self._current("tasks.csv")

    def scored(self) -> pd.DataFrame:
        """The scores of the present table."""
        return self._current("tasks_scores.csv")

    def _current(self, name: str) -> pd.DataFrame:
        """Rows of a CSV that are of the present table, read again only if the file has grown: rows are only added."""
        path = self.out / name
        size = path.stat().st_size if path.is_file() else 0
        if name not in self._frames or self._frames[name][0] != size:
            frame = results(path)
            known = [self._is_current(row) for row in frame[KEYS].to_dict("records")]
            self._frames[name] = size, frame[pd.Series(known, index=frame.index, dtype=bool)]
            self.known.clear()
        return self._frames[name][1]

    def _is_current(self, row: dict[str, Any]) -> bool:
        if row["data"] not in self.data or row["task"] not in self.tasks or row["loss"] not in self.losses:
            return False
        if "projection_head" in row["variant"] and not self.heads:
            return False
        run = Run(**{name: row[name] for name in KEYS[:-1]})
        return bool(self.keys(run)["config"] == row["config"])

    def made(self, run: Run, frame: pd.DataFrame) -> bool:
        """Whether a frame has the run."""
        keys = self.keys(run)
        return bool((frame[KEYS] == pd.Series(keys)[KEYS]).all(axis=1).any())

    def sweep(self, data: str, loss: str) -> pd.DataFrame:
        """The runs from which the setting of a loss on a data set is chosen."""
        frame = self.runs()
        at = (frame["data"] == data) & (frame["loss"] == loss) & (frame["task"] == "closed")
        return frame[at & (frame["seed"] == self.seeds[0])]

    def best(self, data: str, loss: str, among: Sequence[str] | None = None) -> tuple[str, float] | None:
        """Variant and rate with the best MAP@R among the validation images; None if none has converged.

        Args:
            data: Data set.
            loss: Loss.
            among: Variants to choose from; None: all with a projection head where the table has it, else all without.
        """
        self.runs()
        key = data, loss, None if among is None else tuple(among)
        if key not in self.known:
            frame = self.sweep(data, loss)
            frame = frame[frame["error"].isna()]
            frame = frame[frame["variant"].isin(self.tried(data, loss, self.heads) if among is None else among)]
            row = None if frame.empty else frame.loc[frame["val_map_at_r"].astype(float).idxmax()]
            self.known[key] = None if row is None else (str(row["variant"]), float(row["rate"]))
        found: tuple[str, float] | None = self.known[key]
        return found

    def stages(
        self, data: Sequence[str], tasks: Sequence[str], losses: Sequence[str]
    ) -> Iterator[tuple[list[Run], bool]]:
        """Runs in the order in which they can be made, since each stage depends on the results of those before; and
        whether they are scored, as those of a chosen setting are.
        """
        first = self.seeds[0]
        for each in data:
            yield [Run(each, "closed", loss, "", rate, first) for loss in losses for rate in self.rates], False
            for runs in self.further_rates(each, dict.fromkeys(losses, "")):
                yield runs, False
            # the loss's own variants at the best rate, then other batches with the best of these
            for step in ("variants", "batches"):
                runs = []
                for loss in losses:
                    found = self.best(each, loss, ["", *self.variants(loss)])
                    if found is not None:
                        others = self.variants(loss) if step == "variants" else self.batches(each, found[0])
                        runs += [Run(each, "closed", loss, other, found[1], first) for other in others]
                yield runs, False
            if self.heads:  # the best of all behind a projection head, which may need another rate
                heads, runs = {}, []
                for loss in losses:
                    found = self.best(each, loss, self.tried(each, loss, head=False))
                    if found is not None:
                        heads[loss] = self.with_head(found[0])
                        rates = (found[1], 2 * found[1])
                        runs += [Run(each, "closed", loss, heads[loss], rate, first) for rate in rates]
                yield runs, False
                for runs in self.further_rates(each, heads):
                    yield runs, False
            yield self.chosen(each, tasks, losses), True

    def further_rates(self, data: str, variants: Mapping[str, str]) -> Iterator[list[Run]]:
        """More runs of a variant of each loss, while the best rate so far is the largest or the smallest."""
        asked: set[Run] = set()  # a run that failed is not asked for again
        while True:
            rates = {loss: self.next_rate(data, loss, variant) for loss, variant in variants.items()}
            runs = [
                Run(data, "closed", loss, variants[loss], rate, self.seeds[0])
                for loss, rate in rates.items()
                if rate is not None
            ]
            runs = [run for run in runs if run not in asked]
            if not runs:
                return
            asked |= set(runs)
            yield runs

    def next_rate(self, data: str, loss: str, variant: str = "") -> float | None:
        """The rate to try next, where the best one so far is the largest or the smallest; None where it is between."""
        found, best = self.sweep(data, loss), self.best(data, loss, [variant])
        tried = sorted(found.loc[found["variant"] == variant, "rate"].astype(float))
        if best is None or (not variant and not set(self.rates) <= set(tried)):
            return None
        if best[1] == tried[-1] and tried[-1] < max(self.rates) * self.widen:
            return tried[-1] * 2
        if best[1] == tried[0] and tried[0] > min(self.rates) / self.widen:
            return tried[0] / 2
        return None

    def chosen(self, data: str, tasks: Sequence[str], losses: Sequence[str]) -> list[Run]:
        """All runs by which the losses are judged: at the chosen setting, those of a task side by side."""
        best = {loss: self.best(data, loss) for loss in losses}
        return [
            Run(data, task, loss, *found, seed)
            for task in tasks
            if data in self.tasks[task].get("data", self.data)
            for seed in self.seeds
            for loss, found in best.items()
            if found is not None
        ]

    def job(self, run: Run, folder: Path, threads: int, made: bool, score: bool) -> dict[str, Any]:
        """Everything a process needs to make a run, or to score the embeddings of one that has been made."""
        accelerator = "gpu" if self.gpu else "cpu"
        common = {"about": self.about(run.data), "given": self.tasks[run.task], "setting": self.setting(run)}
        place = {"folder": str(folder), "file": str(self.file(run)), "accelerator": accelerator, "threads": threads}
        return {**self.keys(run), **common, **place, "made": made, "score": score}


def results(path: Path) -> pd.DataFrame:
    """A CSV of runs or scores, with the columns that identify a run in any case."""
    frame = read(path)
    for name in (*KEYS, "error", "val_map_at_r"):
        if name not in frame:
            frame[name] = pd.Series(dtype=object)
    frame["variant"] = frame["variant"].fillna("")
    return frame
