"""The command: python -m benchmarks.recipes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipes.command import new_parser, parse, run_to_the_end
from benchmarks.recipes.drive import Driver
from benchmarks.recipes.picture import comparison_figure
from benchmarks.recipes.plan import BASE, read_recipes, read_setting, recipe_names
from benchmarks.recipes.store import read_results
from benchmarks.recipes.table import PROTOCOL, markdown

_PICTURES = (".png", ".svg", ".pdf")
_HELP = """\
Trains recipes under the same encoder, data, augmentation, budget and seeds, and judges them alike.

A recipe is a YAML file in configs/recipes/ that is laid over base.yaml. The learning rates of its sweep are each run
on the first seed; the rate with the best kNN(20) on the validation split is then run on the other seeds. That choice
is all that the validation split is used for. The test split is looked at once per run, after its last epoch.

Each run is a fresh process, on as many threads as OMP_NUM_THREADS says, and leaves one file in OUT/results. A run whose
file is there is not made again, so the same words go on where the command was stopped. When a recipe or the base has
changed, the runs of the former one move to OUT/stale. The rates of earlier calls count in the choice of the best.
"""
_MORE = """\
Other words that begin with --trainer., --model. or --data. go to every run, as in the simo command:
  --model.encoder.width 0.25   --data.samples_per_class 50   --trainer.accelerator gpu

exit status: 0, or 1 if a run failed, 2 for a wrong argument, 130 after Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments.

    Returns:
        Their parser.
    """
    own = new_parser("python -m benchmarks.recipes", _HELP, f"{_MORE}\nin the table:\n{PROTOCOL}")
    own.add_argument(
        "--recipes", nargs="+", metavar="NAME", help="names, or .yaml files (default: all of configs/recipes/)"
    )
    own.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    own.add_argument("--epochs", type=int, default=5, help="of every run (default: 5)")
    own.add_argument(
        "--rates",
        nargs="+",
        type=float,
        metavar="LR",
        help="learning rates of every sweep (default: the recipe's own, else the base's)",
    )
    own.add_argument("--base", type=Path, default=BASE, metavar="FILE", help="config under all recipes")
    own.add_argument("--plot", type=_picture, metavar="FILE", help="draw the table into FILE (.png, .svg, .pdf), too")
    own.add_argument("--list", action="store_true", help="print the recipes and their learning rates, and no more")
    return own


def main(words: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        words: Of the command line; None for sys.argv.

    Returns:
        Exit status.
    """
    command = parser()
    arguments, overrides = parse(command, words)
    if arguments.out is None and not arguments.list:
        command.error("--out FOLDER is needed")
    try:
        if arguments.table:
            print(markdown(read_results(arguments.out)))
            _draw(arguments.out, arguments.plot)
            return 0
        setting = read_setting(arguments.base, arguments.rates, arguments.epochs, overrides)
        recipes = read_recipes(arguments.recipes or recipe_names(), setting)
    except ValueError as error:
        command.error(str(error))
    if arguments.list:
        width = max(len(recipe.name) for recipe in recipes)
        for recipe in recipes:
            print(f"{recipe.name:<{width}}  {recipe.title}  (lr {', '.join(f'{rate:g}' for rate in recipe.rates)})")
        return 0
    failures = Driver(setting, arguments.data_dir, arguments.out, arguments.seeds).drive(recipes)
    results = read_results(arguments.out)
    if results:
        print(f"\n{markdown(results)}\n\nwritten to {arguments.out / 'table.md'}")
        _draw(arguments.out, arguments.plot)
    if failures:
        print("\nfailed; the same words try again:", *failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _picture(name: str) -> Path:
    """A name that can be drawn to, known before the first run."""
    path = Path(name)
    if path.suffix not in _PICTURES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(_PICTURES)}, got {name}")
    return path


def _draw(out: Path, target: Path | None) -> None:
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        comparison_figure(read_results(out)).savefig(target)


if __name__ == "__main__":
    run_to_the_end(main)
