"""The command: python -m benchmarks.paper."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.table import NOTES, markdown
from benchmarks.recipes.command import PASSED, new_parser, parse, run_to_the_end
from benchmarks.recipes.drive import Driver
from benchmarks.recipes.plan import BASE, ROOT, read_recipes, read_setting
from benchmarks.recipes.store import read_results

FOLDER = ROOT / "configs" / "paper"
_HELP = """\
Makes the paper's experiments again: trains each recipe of configs/paper/ (laid over configs/recipes/base.yaml, in the
format of configs/recipes/), measures each class on the validation split along training, and judges the last epoch on
the test split: kNN, linear probe, |cos| between class means, classes that stay apart. The rates of a recipe's file are
tried on the first seed; the best by validation kNN(20) is run on the others.

Each run leaves OUT/results/<run>.json and OUT/figures/<run>/: per_class_*.png, and similarity and scatter along
training. A run whose file is there is not made again; the same words go on where the command was stopped.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments.

    Returns:
        Their parser.
    """
    passed = f"Words that begin with {', '.join(PASSED)} go to every run."
    own = new_parser("python -m benchmarks.paper", _HELP, f"{passed}\n\nin the table:\n{NOTES}")
    own.add_argument(
        "--recipes", nargs="+", metavar="NAME", help="names, or .yaml files (default: all of configs/paper/)"
    )
    own.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(default: 0)")
    own.add_argument("--epochs", type=int, default=5, help="of every run (default: 5)")
    own.add_argument("--rates", nargs="+", type=float, metavar="LR", help="in place of the recipes' own")
    own.add_argument("--snapshots", type=int, default=21, metavar="N", help="along training (default: 21)")
    own.add_argument("--base", type=Path, default=BASE, metavar="FILE", help="config under all recipes")
    return own


def main(words: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        words: Of the command line; None for sys.argv.

    Returns:
        Exit status.
    """
    command = parser()
    given, overrides = parse(command, words)
    if given.out is None:
        command.error("--out FOLDER is needed")
    try:
        if given.table:
            print(markdown(read_results(given.out)))
            return 0
        setting = read_setting(given.base, given.rates, given.epochs, overrides)
        names = given.recipes or sorted(path.stem for path in FOLDER.glob("*.yaml"))
        recipes = read_recipes([_file_of(name) for name in names], setting)
    except ValueError as error:
        command.error(str(error))
    extra = {"snapshots": given.snapshots}
    driver = Driver(setting, given.data_dir, given.out, given.seeds, "benchmarks.paper.run", extra, markdown)
    failures = driver.drive(recipes)
    if failures:
        print("\nfailed; the same words try again:", *failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _file_of(name: str) -> str:
    return name if name.endswith(".yaml") else str(FOLDER / f"{name}.yaml")


if __name__ == "__main__":
    run_to_the_end(main)
