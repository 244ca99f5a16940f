"""Seconds from the command to its help, and to the first training step.

    python -m benchmarks.startup [--data.data_dir DIR] [--json FILE]

Each time is that of a fresh process, the commands by turns; ratios are medians over turns. ``simo --help`` is compared
with the import of what it is built on, ``from lightning.pytorch.cli import LightningCLI``. A fit is the command with
its config, ended after one step: the whole of it is from the start of the process until that step is done. CIFAR-10's
is measured only where its folder is given, and run once before, so that its images are cached.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import CPU_CONFIG, ROOT, about, write_json

IMPORT = "from lightning.pytorch.cli import LightningCLI"
SIMO = "from simo_lightning.cli import main; main()"
# Leaves when the step is done, without validation.
FIRST_STEP = """
import os, sys
import lightning.pytorch as pl
from simo_lightning.cli import main
class Leave(pl.Callback):
    def on_train_batch_end(self, *_):
        os._exit(0)
sys.modules["first_step"] = sys.modules["__main__"]
main()
"""


def run(code: str, words: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process that runs Python code."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"the command ended with {done.returncode}: {done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fit_words(config: Path, folder: str, *more: str) -> list[str]:
    """Words of a fit that ends after its first step."""
    words = ["fit", "--config", str(config), "--run_dir", folder, "--trainer.num_sanity_val_steps", "0", *more]
    return [*words, "--trainer.callbacks+", "first_step.Leave"]


def commands(data_dir: Path | None, folder: str) -> dict[str, tuple[str, list[str]]]:
    """Code and words of each."""
    found: dict[str, tuple[str, list[str]]] = {
        "import LightningCLI": (IMPORT, []),
        "simo --help": (SIMO, ["--help"]),
        "simo fit --help": (SIMO, ["fit", "--help"]),
        "digits, first step": (FIRST_STEP, fit_words(ROOT / "configs" / "digits.yaml", folder)),
    }
    if data_dir is not None:
        cifar = fit_words(CPU_CONFIG, folder, "--data.data_dir", str(data_dir))
        found["CIFAR-10, first step"] = (FIRST_STEP, cifar)
    return found


def measure(data_dir: Path | None, repeats: int) -> dict[str, Any]:
    """All commands by turns, after one turn that fills the caches."""
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            for name, (code, words) in commands(data_dir, folder).items():
                taken = run(code, words)
                times.setdefault(name, []).extend([taken] if turn else [])
                print(f"{name:<24}{taken[0]:8.2f} s wall{taken[1]:8.2f} s CPU", flush=True)
    imports, helps = times["import LightningCLI"], times["simo --help"]
    ratios = [[mine / its for mine, its in zip(*pair, strict=True)] for pair in zip(helps, imports, strict=True)]
    wall, cpu = (statistics.median(ratio) for ratio in zip(*ratios, strict=True))
    seconds = {
        name: {"wall": statistics.median(wall for wall, _ in both), "cpu": statistics.median(cpu for _, cpu in both)}
        for name, both in times.items()
    }
    return {"help_to_import": wall, "help_to_import_cpu_time": cpu, "seconds": seconds, "repeats": repeats}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data.data_dir", dest="data_dir", type=Path, help="CIFAR-10")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    os.environ["NO_COLOR"] = "1"
    result = measure(options.data_dir, options.repeats)
    print(f"simo --help / import LightningCLI: {result['help_to_import']:.2f}")
    write_json(options.json, {**about(), **result})


if __name__ == "__main__":
    main()
