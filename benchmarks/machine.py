"""Machine and versions beside each number; time, memory and fresh processes."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Timer

from benchmarks.experiments import ROOT

Row = dict[str, Any]
Result = TypeVar("Result")
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "scikit-learn", "pytorch-metric-learning")
MACHINE = ("cpu", "cores", "gpu", "threads", "load_before", "python", *PACKAGES, "commit", "date")


def about() -> Row:
    """The columns ``MACHINE`` of every CSV."""
    info = Path("/proc/cpuinfo")
    cpus = (
        [line.split(":")[1].strip() for line in info.open() if line.startswith("model name")] if info.exists() else []
    )
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
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
    """Seconds, after the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_mib(field: str = "VmHWM") -> float:
    """Peak resident memory of this process in MiB, or the current one with ``VmRSS``; nan without Linux's /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


def milliseconds(step: Callable[[], Any], seconds: float = 1.0) -> tuple[float, int]:
    """Median time of a step with this process's number of threads, and the number of steps timed."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    measured = timer.blocked_autorange(min_run_time=seconds)
    return 1e3 * measured.median, measured.number_per_run * len(measured.times)


def in_process(function: Callable[..., Result], **arguments: Any) -> Result:
    """Call a function in a process of its own, forked from one that has imported what the function needs."""
    context = get_context("forkserver")
    is_timing = function.__module__.startswith("benchmarks.timing")
    context.set_forkserver_preload(["benchmarks.timing" if is_timing else function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, **arguments).result()
