"""The command: python -m benchmarks.paper."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.process import RunFailed, run_in_a_process
from benchmarks.paper.table import NOTES, markdown
from benchmarks.recipes.drive import Driver
from benchmarks.recipes.plan import BASE, ROOT, Recipe, Setting, read_recipes, read_setting
from benchmarks.recipes.store import best_rate, path_of, put_aside, read_results, write_text

FOLDER = ROOT / "configs" / "paper"
_HELP = """\
Makes the paper's experiments again: trains each recipe of configs/paper/ (laid over configs/recipes/base.yaml, in the
format of configs/recipes/), measures each class on the validation split along training, and judges the last epoch on
the test split: kNN, linear probe, |cos| between class means, classes that stay apart. The rates of a recipe's file are
tried on the first seed; the best by validation kNN(20) is run on the others.

Each run leaves OUT/results/<run>.json and OUT/figures/<run>/: per_class_*.png, and similarity and scatter along
training. A run whose file is there is not made again; the same words go on where the command was stopped.
"""
_PASSED = ("--trainer.", "--model.", "--data.")


def parser() -> argparse.ArgumentParser:
    """The command's arguments.

    Returns:
        Their parser.
    """
    own = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=_HELP,
        epilog=f"Words that begin with {', '.join(_PASSED)} go to every run.\n\nin the table:\n{NOTES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("--data.data_dir", dest="data_dir", metavar="DIR", help="folder of the images")
    own.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results/, figures/, logs/ go")
    own.add_argument(
        "--recipes", nargs="+", metavar="NAME", help="names, or .yaml files (default: all of configs/paper/)"
    )
    own.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(default: 0)")
    own.add_argument("--epochs", type=int, default=5, help="of every run (default: 5)")
    own.add_argument("--rates", nargs="+", type=float, metavar="LR", help="in place of the recipes' own")
    own.add_argument("--snapshots", type=int, default=21, metavar="N", help="along training (default: 21)")
    own.add_argument("--base", type=Path, default=BASE, metavar="FILE", help="config under all recipes")
    own.add_argument("--table", action="store_true", help="print the table of the files in OUT/results, and no more")
    return own


class PaperDriver(Driver):
    """Makes the runs that are not there yet.

    Args:
        setting: What the recipes share.
        data_dir: Folder of the images; None: what the base config says.
        out: Folder of the results.
        seeds: The first one is the sweep's.
        snapshots: Number of measurements along training.
    """

    def __init__(self, setting: Setting, data_dir: str | None, out: Path, seeds: Sequence[int], snapshots: int) -> None:
        super().__init__(setting, data_dir, out, seeds)
        self.snapshots = snapshots

    def make(self, recipe: Recipe) -> None:
        """The sweep of one recipe on the first seed, then its best rate on the others.

        Args:
            recipe: The recipe.

        Raises:
            RunFailed: If a run ended without a result, or none of the sweep did.
        """
        for path in put_aside(self.out, recipe, self.setting.epochs):
            print(f"the config of {recipe.name} has changed: an earlier run is put aside as {path}", flush=True)
        for rate in recipe.rates:
            self.ensure(recipe, rate, self.seeds[0])
        best = best_rate([run for run in read_results(self.out) if run["digest"] == recipe.digest], self.seeds[0])
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
        target = path_of(self.out, recipe.name, self.setting.epochs, rate, seed)
        made = "made before"
        if not target.is_file():
            made = "made"
            job = {**self.job_of(recipe, rate, seed, target), "snapshots": self.snapshots}
            run_in_a_process("benchmarks.paper.run", job, target, self.out / "logs" / f"{target.stem}.log")
        result = json.loads(target.read_text())
        said = f"kNN(20) {result['metrics']['test']['knn20']:.4f}" if result["metrics"] else result["error"]
        print(f"{recipe.name}, lr {rate:g}, seed {seed}: {said}, {made}", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        words: Of the command line; None for sys.argv.

    Returns:
        Exit status.
    """
    command = parser()
    given, overrides = command.parse_known_args(words)
    wrong = [word for word in overrides if word.startswith("-") and not word.startswith(_PASSED)]
    if wrong or (overrides and not overrides[0].startswith(_PASSED)):
        command.error(f"unknown: {' '.join(wrong or overrides)}")
    try:
        if given.table:
            print(markdown(read_results(given.out)))
            return 0
        setting = read_setting(given.base, given.rates, given.epochs, overrides)
        names = given.recipes or sorted(path.stem for path in FOLDER.glob("*.yaml"))
        recipes = read_recipes([_file_of(name) for name in names], setting)
    except ValueError as error:
        command.error(str(error))
    driver, failures = PaperDriver(setting, given.data_dir, given.out, given.seeds, given.snapshots), []
    for recipe in recipes:
        try:
            driver.make(recipe)
        except RunFailed as failure:
            print(failure, file=sys.stderr, flush=True)
            failures.append(failure)
        if any((given.out / "results").glob("*.json")):
            write_text(given.out / "table.md", markdown(read_results(given.out)) + "\n")
    return 1 if failures else 0


def _file_of(name: str) -> str:
    return name if name.endswith(".yaml") else str(FOLDER / f"{name}.yaml")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run ends too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same words go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
