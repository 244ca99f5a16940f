"""Memory of a fit over 50 epochs, what it keeps of an epoch's embeddings, and its peak on CIFAR-10.

    python -m benchmarks.memory [--data.data_dir DIR] [--json FILE]

- growth: ``simo fit`` on digits with a small encoder, validation, kNN, geometry, plots and checkpoints in every epoch;
  at each end of an epoch, after a garbage collection, the resident set and the number of live tensors. The slope is
  that of the least-squares line over the second half of the epochs, when all caches are full.
- kept: rows of all live tensors with as many columns as an embedding, just after the last batch of a validation of
  20,000 images of noise, with kNN and without; what remains without is the plot's points, a batch, and up to 4,096 rows
  that the geometry and the alarm each hold back before they add them to their sums.
- peak: largest resident set of one epoch of configs/cifar10_cpu.yaml, validation and kNN included, on CIFAR-10 or on
  noise of its shape.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from benchmarks.machine import CPU_CONFIG, ROOT, about, data_words, write_json

DIM = 13  # of the embedding: no other tensor here has so many columns
# Largest slopes that count as no growth. The resident set moves by pages of the allocator: 50 epochs of 1,000 steps at
# this slope would cost 5 MiB.
MIB_PER_EPOCH, TENSORS_PER_EPOCH = 0.1, 0.1


class Ledger(pl.Callback):
    """Writes down what is in memory after each epoch and after the last batch of each validation.

    Attributes:
        latest: The one made last, by whatever parser.
        mib: Resident set after each epoch.
        tensors: Live tensors after each epoch.
        rows: Rows of live tensors with DIM columns, after the last batch of each validation.
    """

    latest: "Ledger"

    def __init__(self) -> None:
        Ledger.latest = self
        self.mib: list[float] = []
        self.tensors: list[int] = []
        self.rows: list[int] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count embeddings."""
        if not trainer.sanity_checking and batch_idx + 1 == trainer.num_val_batches[0]:
            gc.collect()
            found = {value.data_ptr(): value.shape for value in live_tensors()}  # a view counts once
            self.rows.append(sum(shape[0] for shape in found.values() if len(shape) == 2 and shape[1] == DIM))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count all."""
        gc.collect()
        self.tensors.append(len(live_tensors()))
        self.mib.append(resident_mib())


def live_tensors() -> list[torch.Tensor]:
    """All tensors that Python knows of."""
    return [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]


def resident_mib() -> float:
    """Resident set now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def fit(words: list[str]) -> None:
    """Run ``simo fit`` in this process, its output on stderr."""
    from simo_lightning.cli import main as simo

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        simo(["fit", *words, "--run_dir", folder, "--trainer.enable_progress_bar", "false"])


def watch(words: list[str]) -> Ledger:
    """A fit under the eyes of a ledger."""
    fit([*words, "--trainer.callbacks+", "benchmarks.memory.Ledger"])
    latest: Ledger = sys.modules["benchmarks.memory"].Ledger.latest  # type: ignore[attr-defined]  # not __main__'s
    return latest


def slope(values: list[float] | list[int]) -> float:
    """Of the least-squares line over the second half, per epoch."""
    half = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(half)), half, 1)[0])


def growth(epochs: int) -> dict[str, Any]:
    """Slopes and whether they count as none."""
    ledger = watch([
        *("--config", str(ROOT / "configs" / "digits.yaml"), "--trainer.max_epochs", str(epochs)),
        *("--model.encoder.width", "0.125", "--plots.every_n_epochs", "1", "--plots.max_points", "20"),
    ])  # fmt: skip
    mib, tensors = slope(ledger.mib), slope(ledger.tensors)
    return {
        "epochs": epochs,
        "mib_per_epoch": mib,
        "tensors_per_epoch": tensors,
        "tolerance": {"mib_per_epoch": MIB_PER_EPOCH, "tensors_per_epoch": TENSORS_PER_EPOCH},
        "grows": mib > MIB_PER_EPOCH or tensors > TENSORS_PER_EPOCH,
        "mib": ledger.mib,
        "tensors": ledger.tensors,
    }


def kept(images: int = 40_000) -> dict[str, Any]:
    """Embeddings alive at the end of a validation of half the images."""
    words = [
        *("--config", str(CPU_CONFIG), *data_words(None, images), "--data.val_fraction", "0.5"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--best.monitor", "train/loss"),
        *("--model.encoder", "benchmarks.throughput.OneLayer", "--model.encoder.dim", str(DIM)),
    ]
    rows = {
        "rows_with_knn": max(watch(words).rows),
        "rows_without": max(watch([*words, "--knn.every_n_epochs", "1000"]).rows),
    }
    return {"validation_images": images // 2, **rows}


def peak(data_dir: Path | None, images: int) -> dict[str, Any]:
    """Peak of a fit in this process, and what it held when everything was imported."""
    import simo_lightning.cli  # noqa: F401

    before = resident_mib()
    fit(["--config", str(CPU_CONFIG), *data_words(data_dir, images), "--trainer.max_epochs", "1"])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"imports_mib": before, "peak_mib": largest, "data": "noise" if data_dir is None else "CIFAR-10"}


def in_a_fresh_process(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """One of the three, alone, so that none sees what another left."""
    words = ["--part", part, "--epochs", str(options.epochs), "--images", str(options.images)]
    words += [] if options.data_dir is None else ["--data.data_dir", str(options.data_dir)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        raise RuntimeError(f"the part {part} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data.data_dir", dest="data_dir", type=Path, help="CIFAR-10; default: noise of its shape")
    parser.add_argument("--images", type=int, default=50_000, help="of the noise")
    parser.add_argument("--epochs", type=int, default=50, help="of the fit on digits")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--part", choices=["growth", "kept", "peak"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        own = {"growth": (options.epochs,), "kept": (), "peak": (options.data_dir, options.images)}
        print(json.dumps({"growth": growth, "kept": kept, "peak": peak}[options.part](*own[options.part])))
        return
    result = {part: in_a_fresh_process(part, options) for part in ("growth", "kept", "peak")}
    grown = result["growth"]
    print(f"growth  {grown['mib_per_epoch']:.3f} MiB and {grown['tensors_per_epoch']:.2f} tensors an epoch")
    print(f"kept    {result['kept']}")
    print(f"peak    {result['peak']}")
    write_json(options.json, {**about(), **result})


if __name__ == "__main__":
    main()
