"""The command: python -m benchmarks.semi."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipes.command import PASSED, new_parser, parse, run_to_the_end
from benchmarks.recipes.process import RunFailed, run_in_a_process
from benchmarks.recipes.store import best_rate, read_results, write_text
from benchmarks.semi.plan import ARMS, CONFIG, TITLES, Config, Run, make_run, read_config
from benchmarks.semi.table import NOTES, markdown

_HELP = f"""\
Trains an encoder where few labels are known, with the unlabelled images and without, for the same number of steps:

{chr(10).join(f"  {arm:<16} {TITLES[arm]}" for arm in ARMS)}

All of configs/cifar10_semi.yaml. The rates are tried on the first seed; the best by kNN(20) on the validation split is
run on the others. The test split is looked at once per run, after its last step. A run whose file is in OUT/results is
not made again; the same words go on where the command was stopped.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments.

    Returns:
        Their parser.
    """
    passed = f"Words that begin with {', '.join(PASSED)} go to every run."
    own = new_parser("python -m benchmarks.semi", _HELP, f"{passed}\n\nin the table:\n{NOTES}")
    own.add_argument("--fractions", nargs="+", type=float, default=[0.01, 0.1, 0.5], help="(default: 0.01 0.1 0.5)")
    own.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(default: all)")
    own.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    own.add_argument("--rates", nargs="+", type=float, default=[8e-3], metavar="LR", help="(default: 8e-3)")
    own.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: 2000)")
    own.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="config under all runs")
    return own


def ensure(run: Run, out: Path) -> None:
    """Make one run unless its file is there; a file of another config moves to OUT/stale.

    Args:
        run: The run.
        out: Folder of the results.

    Raises:
        RunFailed: If it ended without a result.
    """
    target, made = out / "results" / f"{run.name}.json", "made before"
    if target.is_file():
        digest = json.loads(target.read_text())["digest"]
        if digest != run.digest:
            stale = out / "stale" / f"{run.name}-{digest}.json"
            stale.parent.mkdir(exist_ok=True)
            target.replace(stale)
            print(f"the config of {run.name} has changed: an earlier run is put aside as {stale}", flush=True)
    if not target.is_file():
        made = "made"
        job = {**run._asdict(), "digest": run.digest, "target": str(target.resolve())}
        run_in_a_process("benchmarks.semi.run", job, target, out / "logs" / f"{run.name}.log")
    result = json.loads(target.read_text())
    said = f"kNN(20) {result['metrics']['val']['knn20']:.4f} on validation" if result["metrics"] else result["error"]
    print(f"{run.name}: {said}, {result['seconds']['all']:.0f} s, {made}", flush=True)


def sweep(base: Config, arm: str, fraction: float, given: argparse.Namespace, overrides: Sequence[str]) -> None:
    """All runs of one arm and share of labels.

    Args:
        base: Config.
        arm: One of ``ARMS``.
        fraction: Share of the labels.
        given: Arguments of the command.
        overrides: Words for every run.

    Raises:
        RunFailed: If a run ended without a result, or diverged at every rate.
    """
    seeds = list(dict.fromkeys(given.seeds))
    runs = [make_run(base, arm, fraction, rate, seeds[0], given.steps, overrides) for rate in given.rates]
    for run in runs:
        ensure(run, given.out)
    results = [json.loads((given.out / "results" / f"{run.name}.json").read_text()) for run in runs]
    best = best_rate(results, seeds[0])
    if best is None:
        raise RunFailed(f"{arm} with {fraction:g} of the labels diverged at every learning rate")
    for seed in seeds[1:]:
        ensure(make_run(base, arm, fraction, best, seed, given.steps, overrides), given.out)


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
    folder = [] if given.data_dir is None else [f"--data.data_dir={given.data_dir}"]
    failures = []
    try:
        if given.table:
            print(markdown(read_results(given.out)))
            return 0
        base = read_config(given.config)
        for fraction in given.fractions:
            for arm in given.arms:
                try:
                    sweep(base, arm, fraction, given, [*overrides, *folder])
                except RunFailed as failure:
                    print(failure, file=sys.stderr, flush=True)
                    failures.append(failure)
                if any((given.out / "results").glob("*.json")):
                    write_text(given.out / "table.md", markdown(read_results(given.out)) + "\n")
    except ValueError as error:
        command.error(str(error))
    return 1 if failures else 0


if __name__ == "__main__":
    run_to_the_end(main)
