"""Speed over processes: the whole fit, the gather and the loss, and a model on paper of 1,024 GPUs.

    python -m benchmarks.scaling [--json FILE]
    python -m benchmarks.scaling --model

- fit: ``simo fit`` with configs/cifar10_cpu.yaml on noise of CIFAR-10's shape, one thread a process, by one process and
  by two under DDP (gloo): with the same images over all of them (strong), and with the same on each (weak).
- gather and loss: gather_rows, SimOLoss and the backward pass of both, 120 rows a process, in 1, 2, 4 and 8 processes
  of one thread. Where there are fewer cores than processes they wait for each other: the column "cores" says so.
- model: bytes and operations of one step on each rank, as the functions below have them.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from benchmarks.machine import CPU_CONFIG, ROOT, about, data_words, write_json
from benchmarks.scaling_model import markdown
from simo_lightning import SimOLoss
from simo_lightning.distributed import gather_rows

ROWS = 120  # of a process
WORLDS = (1, 2, 4, 8)


class StepTimes(pl.Callback):
    """Times the steps of a fit after the first few, prints their median from the first process and ends the fit.

    Args:
        steps: That are timed.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take the time."""
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) > self.steps + 5
        if trainer.should_stop and trainer.is_global_zero:
            times = [end - start for start, end in zip(self.ends[5:-1], self.ends[6:], strict=True)]
            print(json.dumps({"seconds": statistics.median(times)}), flush=True)


def start(world: int, words: list[str]) -> list[dict[str, Any]]:
    """Run this file's words in as many processes as ranks of one job; gives the JSON that rank 0 prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
        job = {} if world == 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **place}
        command = [sys.executable, "-m", "benchmarks.scaling", *words]
        environment = {**os.environ, **job, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT))
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{' '.join(words)} ended with {[rank.returncode for rank in ranks]} in {world} processes")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def run_fit(world: int, samples: int, steps: int, folder: str) -> None:
    """One process of a fit: 10 classes of ``samples`` images."""
    from simo_lightning.cli import main as simo

    torch.set_num_threads(1)
    simo([
        *("fit", "--config", str(CPU_CONFIG), *data_words(None, 10_000), "--data.samples_per_class", str(samples)),
        *("--run_dir", folder, "--trainer.limit_val_batches", "0", "--best.monitor", "train/loss"),
        *("--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.max_epochs", "100"),
        *("--trainer.strategy", "ddp" if world > 1 else "auto"),
        *("--trainer.callbacks+", "benchmarks.scaling.StepTimes", "--trainer.callbacks.steps", str(steps)),
    ])  # fmt: skip


def run_gather(world: int, steps: int) -> None:
    """One process of the gather and the loss; rank 0 prints the medians."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    rank, loss = int(os.environ.get("RANK", "0")), SimOLoss(form="softmax")
    labels = torch.arange(ROWS) % 10
    for dim in (16, 128):
        embeddings = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        times = []
        for _ in range(steps + 5):
            begin = time.perf_counter()
            rows = gather_rows(embeddings)
            middle = time.perf_counter()
            value = loss(rows, gather_rows(labels))
            after = time.perf_counter()
            value.backward()
            times.append((middle - begin, after - middle, time.perf_counter() - after))
        parts = [1e3 * statistics.median(part) for part in zip(*times[5:], strict=True)]
        found = {"dim": dim, "gather_ms": parts[0], "loss_ms": parts[1], "backward_ms": parts[2], "step_ms": sum(parts)}
        if rank == 0:
            print(json.dumps({"world": world, "rows": ROWS * world, **found}), flush=True)
    if world > 1:
        dist.destroy_process_group()


def measure_fits(steps: int, repeats: int) -> dict[str, Any]:
    """Median step of one process and of two, strong and weak, by turns."""
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, world, samples in (("one", 1, 12), ("strong", 2, 6), ("weak", 2, 12)):
            with tempfile.TemporaryDirectory() as folder:
                words = ["--part", "fit", str(world), str(samples), str(steps), folder]
                times.setdefault(name, []).append(start(world, words)[0]["seconds"])
    one, strong, weak = (statistics.median(times[name]) for name in ("one", "strong", "weak"))
    return {
        "step_ms": {"1 x 120 images": 1e3 * one, "2 x 60 images": 1e3 * strong, "2 x 120 images": 1e3 * weak},
        "strong_speedup": one / strong,
        "weak_efficiency": one / weak,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", action="store_true", help="print the model's tables and measure nothing")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="processes of gather and loss")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a fit; five times as many of the gather")
    parser.add_argument("--repeats", type=int, default=3, help="fits of each kind")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(markdown())
    elif options.part and options.part[0] == "fit":
        run_fit(*(int(word) for word in options.part[1:4]), options.part[4])
    elif options.part:
        run_gather(*(int(word) for word in options.part[1:]))
    else:
        cores = about()["hardware"]["cores"]
        gathers = []
        for world in options.worlds:
            gathers += start(world, ["--part", "gather", str(world), str(5 * options.steps)])
            print(*(f"{case}\n" for case in gathers[-2:]), end="", flush=True)
        fits = measure_fits(options.steps, options.repeats) if options.repeats else None
        print(fits)
        write_json(options.json, {**about(), "threads": 1, "cores": cores, "fit": fits, "gather_and_loss": gathers})


if __name__ == "__main__":
    main()
