"""A run in a process of its own, with a log, that does not outlive the command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.recipes.plan import ROOT


class RunFailed(Exception):
    """A run ended without a result; the text says where its log is."""


def run_in_a_process(module: str, job: dict[str, Any], target: Path, log: Path, place: str = "") -> None:
    """Run ``python -m module`` with the job as JSON on its stdin.

    Args:
        module: That reads a job and writes ``target``.
        job: For JSON.
        target: File that there must be after it.
        log: What it says.
        place: How the run is called in what is printed; "": the target's name, and nothing is printed at its start.

    Raises:
        RunFailed: If it ended without that file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, text=True
        )
        try:
            if place:
                print(f"{place}: running as process {process.pid}, log {log}", flush=True)
            process.communicate(json.dumps(job))
        finally:
            process.kill()
            process.wait()
    status = process.returncode
    if status or not target.is_file():
        last = log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise RunFailed(f"{place or target.stem}: failed ({how}): {last[0]} (all of it: {log})")
