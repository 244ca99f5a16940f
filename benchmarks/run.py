"""The command: python -m benchmarks.run STUDY.

Trains the rows of a study of benchmarks/experiments.yaml under one protocol and prints its table.

The learning rates of a row are each run on its first seed; the rate with the best kNN(20) on the validation split is
then run on the other seeds. The validation split is used for nothing else. The test split is evaluated once per run,
after its last step.

Each run is a fresh process with OMP_NUM_THREADS threads. It adds one row to FOLDER/STUDY.csv, and its
snapshots during training, if it has any, to FOLDER/STUDY_snapshots.csv. A finished run is not repeated, so the same
command continues where it was stopped, and the CSV files of benchmarks/results/ count as finished once they are
copied to FOLDER. When a row or its base config has changed, its runs are repeated, and the table omits the old ones.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.experiments import ROOT, TABLE, Experiment, append, experiments, read, read_table
from benchmarks.tables import best_rate, markdown

PASSED = ("--trainer.", "--model.", "--data.")
_MORE = """\
Further arguments that begin with --trainer., --model. or --data. go to every run, as in the simo command:
  --model.encoder.width 0.25   --data.samples_per_class 50   --trainer.accelerator gpu

exit status: 0, or 1 if a run failed, 2 for a wrong argument, 130 after Ctrl-C
"""


class RunFailed(Exception):
    """A run ended without a result; the text says where its log is."""


def train(row: Experiment, out: Path, bar: "tqdm[Any]") -> None:
    """The sweep of a row on its first seed, then the best rate on the others; only the runs that are missing."""
    for rate in row.rates:
        ensure(row, rate, row.seeds[0], out, bar)
    frame = read(out / f"{row.study}.csv")
    digest = row.job(row.rates[0], row.seeds[0])["row"]["config"]
    best = best_rate(frame[(frame["name"] == row.name) & (frame["config"] == digest)], row.seeds[0])
    if best is None:
        raise RunFailed(f"{row.name} diverged at every learning rate of its sweep")
    for seed in row.seeds[1:]:
        ensure(row, best, seed, out, bar)


def ensure(row: Experiment, rate: float, seed: int, out: Path, bar: "tqdm[Any]") -> None:
    """Make one run unless the CSV has it."""
    frame, job = read(out / f"{row.study}.csv"), row.job(rate, seed)
    what = f"{row.name}, lr {rate:g}, seed {seed}"
    keys = {key: job["row"][key] for key in ("name", "config", "rate", "seed")}
    found = frame[(frame["name"] == row.name) & (frame["config"] == keys["config"])]
    if len(found[(found["rate"] == rate) & (found["seed"] == seed)]):
        bar.write(f"{what}: made before")
    else:
        stem = f"{row.study}-{row.name}-{row.epochs or row.steps}-lr{rate:g}-seed{seed}"
        result = run_in_a_process(job, out, stem, bar)
        if row.snapshots:
            append(out / f"{row.study}_snapshots.csv", [{**keys, **taken} for taken in result["snapshots"]])
        append(out / f"{row.study}.csv", [result["row"]])  # last: a run that counts as made is whole
        made = result["row"]
        told = made["error"] or f"kNN(20) {made['val_knn20']:.4f} on validation, {made['test_knn20']:.4f} on test"
        bar.write(f"{what}: {told}, {made['all_seconds']:.0f} s")
    bar.update()


def run_in_a_process(job: dict[str, Any], out: Path, stem: str, bar: "tqdm[Any]") -> dict[str, Any]:
    """One run; its process ends with the command and does not receive the terminal's Ctrl-C."""
    log, target = out.resolve() / "logs" / f"{stem}.log", out.resolve() / "logs" / f"{stem}.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    told = {**job, "target": str(target), "points": str(out.resolve() / "points" / f"{stem}.npz")}
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": search}, "start_new_session": True, "text": True}
    with log.open("w") as file:
        words = [sys.executable, "-m", "benchmarks.train"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=file, stderr=file, **options)
        try:
            bar.write(f"{stem}: running as process {process.pid}, log {log}")
            process.communicate(json.dumps(told))
        finally:
            process.kill()
            process.wait()
    if process.returncode or not target.is_file():
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        status = process.returncode
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise RunFailed(f"{stem}: failed ({how}): {last[0]} (log: {log})")
    result: dict[str, Any] = json.loads(target.read_text())
    target.unlink()
    return result


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    style = argparse.RawDescriptionHelpFormatter
    own = argparse.ArgumentParser(
        "python -m benchmarks.run", None, __doc__, _MORE, formatter_class=style, allow_abbrev=False
    )
    own.add_argument("study", nargs="?", help="name of the study; with --list, all studies by default")
    own.add_argument("--data.data_dir", dest="data_dir", metavar="DIR", help="folder of the images")
    own.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the CSV files and logs")
    own.add_argument("--names", nargs="+", metavar="NAME", help="rows (default: all of the study)")
    own.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the rows' own")
    own.add_argument("--rates", nargs="+", type=float, metavar="LR", help="learning rates instead of the rows' own")
    own.add_argument("--epochs", type=int, metavar="N", help="length instead of the rows' own")
    own.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="another table of experiments")
    own.add_argument("--list", action="store_true", help="print the studies or the rows of one, and exit")
    return own


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status."""
    command = parser()
    given, passed = command.parse_known_args(words)
    wrong = [word for word in passed if word.startswith("-") and not word.startswith(PASSED)]
    if wrong or (passed and not passed[0].startswith(PASSED)):
        command.error(f"unknown: {' '.join(wrong or passed)}")
    passed += [] if given.data_dir is None else [f"--data.data_dir={given.data_dir}"]
    own = {"epochs": given.epochs, "words": tuple(passed)}
    own |= {key: tuple(dict.fromkeys(getattr(given, key))) for key in ("rates", "seeds") if getattr(given, key)}
    try:
        if given.list and given.study is None:
            for name, study in read_table(given.table).items():
                print(f"{name:<18}{len(study['rows']):>3} rows  {study['about']}")
            return 0
        if given.study is None or not (given.out or given.list):
            command.error("STUDY and --out FOLDER are needed")
        rows = experiments(given.study, given.names, given.table, **own)
    except ValueError as error:
        command.error(str(error))
    if given.list:
        for row in rows:
            length = f"{row.epochs} epochs" if row.steps is None else f"{row.steps} steps"
            print(f"{row.name:<24}{row.title}  ({length}, lr {', '.join(map(str, row.rates))}, {len(row.seeds)} seeds)")
        return 0
    return drive(given.study, rows, given.out, given.table)


def drive(study: str, rows: Sequence[Experiment], out: Path, table: Path) -> int:
    """Train all rows and print the table; a row that fails does not stop the others."""
    failures = []
    total = sum(len(row.rates) + len(row.seeds) - 1 for row in rows)
    with tqdm(total=total, desc=study, unit="run") as bar:
        for row in rows:
            try:
                train(row, out, bar)
            except RunFailed as failure:
                bar.write(str(failure))
                failures.append(str(failure))
    if (out / f"{study}.csv").is_file():
        print(markdown(study, out, table))
    if failures:
        print("\nfailed; the same command tries again:", *failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the run in progress, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
