"""What all benchmarks share: machine and versions beside each number, fresh processes, time and memory."""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from benchmarks.experiments import ROOT

Row = dict[str, Any]
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "scikit-learn", "pytorch-metric-learning")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB elsewhere


def about() -> Row:
    """Columns of every CSV: processor, cores, GPU, threads, load of the last minute, versions, commit and date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def now() -> float:
    """Seconds, once the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 2**20


def resident_mib() -> float:
    """Resident set of this process now, in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def milliseconds(step: Callable[[], Any], seconds: float = 1.0) -> tuple[float, int]:
    """Median time of a step on this process's threads, and the number of steps that it is of."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    measured = timer.blocked_autorange(min_run_time=seconds)
    return 1e3 * measured.median, measured.number_per_run * len(measured.times)


class Fresh(NamedTuple):
    """What a process cost: wall and CPU seconds, its peak memory; and what it printed."""

    wall: float
    cpu: float
    mib: float
    out: str


def fresh(words: list[str], **environment: str) -> Callable[[], Fresh]:
    """Start ``python words`` in a process of its own; gives a function that waits for its end."""
    out, start = tempfile.TemporaryFile("w+"), time.perf_counter()  # noqa: SIM115
    process = subprocess.Popen([sys.executable, *words], stdout=out, cwd=ROOT, env={**os.environ, **environment})

    def wait() -> Fresh:
        _, status, usage = os.wait4(process.pid, 0)
        wall, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        with out:
            out.seek(0)
            printed = out.read()
        if process.returncode:
            raise RuntimeError(f"python {' '.join(words)} ended with {process.returncode}")
        return Fresh(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _UNIT / 2**20, printed)

    return wait


def case(function: str, **arguments: Any) -> Row:
    """Call ``module.function`` in a fresh process; arguments and result travel as JSON."""
    module, name = function.rsplit(".", 1)
    code = f"import json, sys; from {module} import {name}; print(json.dumps({name}(**json.loads(sys.argv[1]))))"
    found: Row = json.loads(fresh(["-c", code, json.dumps(arguments)])().out.splitlines()[-1])
    return found
