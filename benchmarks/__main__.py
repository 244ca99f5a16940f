"""The command: python -m benchmarks, one protocol for all losses over every task.

Every loss is trained with the same encoder, epochs, batches and augmentation. Its learning rate and its main parameter
are chosen on the closed set by MAP@R among validation images, on the first seed; all tasks then use this setting, on
all seeds. benchmarks/tasks/tasks.yaml has the data sets, losses, sweeps and tasks, benchmarks/TASKS.md the results.

Each run is a fresh process. A finished run is not repeated: the same command continues where it was stopped, and the
CSV files of benchmarks/results count as finished once they are copied to FOLDER. A run of which only the CSV is there,
and not its embeddings, is repeated only if a score of it is missing.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments import append
from benchmarks.machine import Row, about, in_process
from benchmarks.tasks.plan import KEYS, TABLE, Plan
from benchmarks.tasks.tables import page
from benchmarks.tasks.work import work

Result = tuple[Row | None, Row | None]


def parser(plan: Plan) -> argparse.ArgumentParser:
    """The command's arguments; each data set has one for its folder."""
    own = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_folders(own)
    own.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the CSV files and the embeddings")
    for name, known in (("tasks", plan.tasks), ("losses", plan.losses)):
        own.add_argument(f"--{name}", nargs="+", choices=known, metavar="NAME", help=f"default: {', '.join(known)}")
    own.add_argument("--workers", type=int, default=2, help="runs side by side (default: 2)")
    own.add_argument("--threads", type=int, default=1, help="of each run, on a CPU (default: 1)")
    own.add_argument("--minutes", type=float, metavar="M", help="start no run after this time")
    own.add_argument("--gpu", action="store_true", help="train ResNet-18 at full width on a GPU, in bfloat16")
    own.add_argument(
        "--table", type=Path, default=TABLE, metavar="FILE", help="another table of data, losses and tasks"
    )
    return own


def drive(plan: Plan, given: argparse.Namespace) -> bool:
    """Make all runs that are missing; False if the time was up or a run failed."""
    folders = {name: getattr(given, name) for name in plan.data if getattr(given, name) is not None}
    tasks, losses = given.tasks or list(plan.tasks), given.losses or list(plan.losses)
    end = float("inf") if given.minutes is None else time.monotonic() + 60 * given.minutes
    whole = True
    with ThreadPoolExecutor(given.workers) as pool:  # each thread waits for the process of a run
        for stage, score in plan.stages(list(folders), tasks, losses):
            trained, scored = plan.runs(), plan.scored()
            jobs = []
            for run in stage:
                made = plan.made(run, trained)
                if not (plan.made(run, scored) if score else made):
                    jobs.append(plan.job(run, folders[run.data], given.threads, made, score))
            whole &= make(plan, pool, given.workers, jobs, end)
            if time.monotonic() > end:
                break
    return whole


def make(plan: Plan, pool: ThreadPoolExecutor, workers: int, jobs: Iterable[dict[str, Any]], end: float) -> bool:
    """Make these runs, as many at a time as there are workers; False if the time was up or one failed."""
    waiting, going, whole = list(jobs), dict[Future[Result], dict[str, Any]](), True
    while waiting or going:
        while waiting and len(going) < workers:
            if time.monotonic() > end:
                waiting, whole = [], False
                break
            job = waiting.pop(0)
            going[pool.submit(in_process, work, job=job)] = job
        if not going:
            break
        for future in wait(going, return_when=FIRST_COMPLETED).done:
            job = going.pop(future)
            what = f"{job['data']} {job['task']} {job['loss']} {job['variant']} lr {job['rate']:g} seed {job['seed']}"
            try:
                run, scores = future.result()
            except Exception as error:  # of this run; the others go on
                print(f"{what}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                whole = False
                continue
            keys = {key: job[key] for key in KEYS}
            if run is not None:
                append(plan.out / "tasks.csv", [{**keys, **run, **about(), "threads": job["threads"]}])
            if scores is not None:
                append(plan.out / "tasks_scores.csv", [{**keys, **scores}])
            told = "scored" if run is None else run["error"] or f"{run['val_map_at_r']:.4f} in {run['seconds']:.0f} s"
            print(f"{what}: {told}", flush=True)
    return whole


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status: 0, or 1 if something is missing."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--table", type=Path, default=TABLE)
    table = first.parse_known_args(words)[0].table
    if not table.is_file():
        first.error(f"--table must be a file, got {table}")
    plan = Plan(table=table)
    command = parser(plan)
    given = command.parse_args(words)
    plan.check_folders(command, given)
    if given.workers < 1 or given.threads < 1:
        command.error(f"--workers and --threads must be at least 1, got {given.workers} and {given.threads}")
    if given.gpu and not torch.cuda.is_available():
        command.error("--gpu needs a GPU, found none")
    plan = Plan(given.out, table, given.gpu)
    whole = drive(plan, given)
    print(page(plan))
    if not whole:
        print("\nsome runs are missing; the same command continues", file=sys.stderr)
    return 0 if whole else 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)
