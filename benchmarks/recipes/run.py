"""One run, in a process of its own: reads its job from stdin, trains, evaluates, writes one JSON file."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from benchmarks.recipes.evaluate import QUIET, evaluate
from benchmarks.recipes.plan import ROOT
from benchmarks.recipes.store import write_result

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "scikit-learn", "pytorch-metric-learning")


def make_parts(job: dict[str, Any]) -> LightningCLI:
    """Trainer, module and data of a job, as a LightningCLI that has run nothing yet.

    Args:
        job: Its config, epochs and overrides count.

    Returns:
        With ``trainer``, ``model``, ``datamodule`` and the whole ``config``.
    """
    own = {**QUIET, "max_epochs": job["epochs"], "limit_val_batches": 0}
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=[
            *("--config", json.dumps(job["config"])),
            *job["overrides"],
            *(f"--trainer.{name}={json.dumps(value)}" for name, value in own.items()),
        ],
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        job: As ``drive.job_of`` makes it.

    Returns:
        What the JSON file holds; ``metrics`` is None and ``error`` says why where the run diverged.

    Raises:
        ValueError: If the run cannot be, such as one of several devices.
    """
    start = time.perf_counter()
    parts = make_parts(job)
    if parts.trainer.world_size != 1:
        raise ValueError(f"a run must have one process and one device, got {parts.trainer.world_size}")
    result: dict[str, Any] = {**about(job, parts), "metrics": None, "data": None, "error": None}
    parts.datamodule.setup("fit")
    begin, result["peak_mib_start"] = time.perf_counter(), peak_mib()
    seconds = {"prepare": begin - start}
    try:
        parts.trainer.fit(parts.model, datamodule=parts.datamodule)
        if parts.trainer.interrupted:  # Lightning takes a Ctrl-C for an end like any other
            raise KeyboardInterrupt
        seconds["train"], result["peak_mib_train"] = time.perf_counter() - begin, peak_mib()
        begin = time.perf_counter()
        result |= evaluate(parts.trainer, parts.model, parts.datamodule, job["seed"])
        seconds["evaluate"] = time.perf_counter() - begin
    except ValueError as error:
        if "finite" not in str(error):
            raise
        result["error"] = f"diverged: {error}"  # a rate of the sweep may be too high
    if torch.cuda.is_available():
        result["peak_mib_device"] = torch.cuda.max_memory_allocated() / 2**20
    return {**result, "seconds": {**seconds, "all": time.perf_counter() - start}, "peak_mib": peak_mib()}


def about(job: dict[str, Any], parts: LightningCLI) -> dict[str, Any]:
    """What was run, by what, on what.

    Args:
        job: The job.
        parts: Made of it.

    Returns:
        Keys of the JSON file.
    """
    config = yaml.safe_load(parts.parser.dump(parts.config, skip_none=False))
    config.pop("config", None)
    config["data"]["init_args"].pop("data_dir", None)  # where the images lie on this machine; their checksum tells more
    known = ("recipe", "title", "digest", "setting", "rate", "seed", "epochs")
    return {
        **{name: job[name] for name in known},
        "config": config,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit(),
    }


def hardware() -> dict[str, Any]:
    """Processor, number of cores in reach and GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": names[0] if names else platform.machine(), "cores": cores, "gpu": gpu}


def commit() -> str | None:
    """The git commit, with ``-dirty`` where a tracked file differs from it; None outside of git."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    """Read the job, run it, write its file."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    job = json.load(sys.stdin)
    write_result(Path(job["target"]), run(job))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
