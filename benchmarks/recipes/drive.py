"""Makes the runs that are not there yet, one process for each, and says how far it is."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipes.plan import Recipe, Setting
from benchmarks.recipes.process import RunFailed, run_in_a_process
from benchmarks.recipes.store import Result, best_rate, path_of, put_aside, read_results, write_text
from benchmarks.recipes.table import markdown


class Driver:
    """Trains recipes, each at its best learning rate, on every seed.

    Args:
        setting: What the recipes share.
        data_dir: Folder of the images; None: what the base config says.
        out: Folder of the results.
        seeds: The first one is the sweep's.
        module: What makes a run of a job.
        extra: For every job.
        table: Markdown of the results.
    """

    def __init__(
        self,
        setting: Setting,
        data_dir: str | None,
        out: Path,
        seeds: Sequence[int],
        module: str = "benchmarks.recipes.run",
        extra: dict[str, Any] | None = None,
        table: Callable[[Sequence[Result]], str] = markdown,
    ) -> None:
        self.setting, self.data_dir, self.out, self.seeds = setting, data_dir, out, list(dict.fromkeys(seeds))
        self.module, self.extra, self.table = module, extra or {}, table
        self.total, self.done = 0, 0
        self.seconds: list[float] = []  # of the runs that this call made

    def drive(self, recipes: Sequence[Recipe]) -> list[str]:
        """Make all runs that are missing, recipe by recipe; the table is written after each.

        A run that fails ends its recipe, not the others.

        Args:
            recipes: In order.

        Returns:
            What failed, a line each.
        """
        failures = []
        for recipe in recipes:
            for path in put_aside(self.out, recipe, self.setting.epochs):
                print(f"the config of {recipe.name} has changed: an earlier run is put aside as {path}", flush=True)
        self.total = sum(len(recipe.rates) + len(self.seeds) - 1 for recipe in recipes)
        for recipe in recipes:
            planned = self.done + len(recipe.rates) + len(self.seeds) - 1
            try:
                self.train(recipe)
            except RunFailed as failure:
                print(failure, file=sys.stderr, flush=True)
                failures.append(str(failure))
            self.done = planned
            if any((self.out / "results").glob("*.json")):
                write_text(self.out / "table.md", self.table(read_results(self.out)) + "\n")
        return failures

    def train(self, recipe: Recipe) -> None:
        """The sweep of one recipe on the first seed, then its best rate on the others.

        Args:
            recipe: The recipe.

        Raises:
            RunFailed: If a run ended without a result.
        """
        for rate in recipe.rates:
            self.ensure(recipe, rate, self.seeds[0])
        finished = [result for result in read_results(self.out) if result["digest"] == recipe.digest]
        best = best_rate(finished, self.seeds[0])
        if best is None:
            raise RunFailed(f"{recipe.name} diverged at every learning rate of its sweep")
        for seed in self.seeds[1:]:
            self.ensure(recipe, best, seed)

    def ensure(self, recipe: Recipe, rate: float, seed: int) -> None:
        """Make one run unless its file is there.

        Args:
            recipe: The recipe.
            rate: Learning rate.
            seed: Of model and data.

        Raises:
            RunFailed: If it ended without a result.
        """
        self.done += 1
        target = path_of(self.out, recipe.name, self.setting.epochs, rate, seed)
        place = f"[{self.done}/{self.total}] {recipe.name}, lr {rate:g}, seed {seed}"
        if target.is_file():
            print(f"{place}: {_said(json.loads(target.read_text()))}, made before", flush=True)
            return
        start, job = time.monotonic(), {**self.job_of(recipe, rate, seed, target), **self.extra}
        run_in_a_process(self.module, job, target, self.out / "logs" / f"{target.stem}.log", place)
        self.seconds.append(time.monotonic() - start)
        print(f"{place}: {_said(json.loads(target.read_text()))}; {self.left()}", flush=True)

    def job_of(self, recipe: Recipe, rate: float, seed: int, target: Path) -> dict[str, Any]:
        """What a run's process is told.

        Args:
            recipe: The recipe.
            rate: Learning rate.
            seed: Of model and data.
            target: File that it writes.

        Returns:
            A dictionary for JSON.
        """
        folder = [] if self.data_dir is None else ["--data.data_dir", self.data_dir]
        return {
            "recipe": recipe.name,
            "title": recipe.title,
            "digest": recipe.digest,
            "setting": self.setting.digest,
            "rate": rate,
            "seed": seed,
            "epochs": self.setting.epochs,
            "config": recipe.config_of(rate, seed),
            "overrides": [*self.setting.overrides, *folder],
            "target": str(target.resolve()),
        }

    def left(self) -> str:
        """Estimate of the time that is left, from the runs that this call made."""
        minutes = (self.total - self.done) * sum(self.seconds) / len(self.seconds) / 60
        return f"about {minutes / 60:.1f} h left" if minutes >= 90 else f"about {minutes:.0f} min left"


def _said(result: Result) -> str:
    if not result["metrics"]:
        return str(result["error"])
    val, test = result["metrics"]["val"]["knn20"], result["metrics"]["test"]["knn20"]
    return f"kNN(20) {val:.4f} on validation, {test:.4f} on test, {result['seconds']['all']:.0f} s"
