"""Class moments: a batch, all metrics and the callbacks by number of classes and dimensions, with peak memory.

Times are CPU times on one thread, which other work on the machine hardly changes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.machine import Row, in_process, memory_mib
from simo_lightning.callbacks import CollapseAlarm, EmbeddingPlots, GeometryMonitor
from simo_lightning.functional.geometry import computable_metrics
from simo_lightning.functional.moments import ClassMoments, class_blocks, class_second_moments, class_sums

BATCH = 500
SIZES: tuple[tuple[int, int], ...] = ((10, 16), (1_000, 128), (1_000, 512), (1_000, 2_048), (10_000, 512))
CALLBACKS: dict[str, type[Callback]] = {
    each.__name__: each for each in (GeometryMonitor, EmbeddingPlots, CollapseAlarm)
}
CALLBACK_SIZES: tuple[tuple[int, int], ...] = ((2_000, 256), (10_000, 512))
FORMER_BYTES = 2**31  # of second moments; three times as much memory
STREAMED = 1_000_000


def seconds(step: Callable[[], Any]) -> float:
    """CPU time of one call in this process."""
    start = time.process_time()
    step()
    return time.process_time() - start


def draw(rows: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings around one random centre for each class, classes of equal size in random order, and labels."""
    generator = torch.Generator().manual_seed(0)
    centers, labels = (
        torch.randn(classes, dim, generator=generator),
        torch.randperm(rows, generator=generator) % classes,
    )
    return centers[labels] + 0.3 * torch.randn(rows, dim, generator=generator), labels


def sizes_case(classes: int, dim: int) -> list[Row]:
    """Batches of 500 until each class has several embeddings, then every metric; nothing else is in memory."""
    torch.set_num_threads(1)
    embeddings, labels = draw(max(10 * BATCH, 4 * classes), dim, classes)
    before = memory_mib("VmRSS")
    moments = ClassMoments.zeros(classes, dim)
    batches = list(zip(embeddings.split(BATCH), labels.split(BATCH), strict=True))
    each = [seconds(lambda batch=batch: moments.add_(*batch)) for batch in batches]
    measured = {"a batch of 500, ms": 1e3 * median(each)}
    metrics = computable_metrics(moments)
    times = {name: seconds(lambda metric=metric: metric(moments)) for name, metric in metrics.items()}
    measured |= {"all metrics, s": sum(times.values()), **{f"{name}, s": time_s for name, time_s in times.items()}}
    measured["peak above the start, MiB"] = memory_mib() - before
    return [{"measured": name, "classes": classes, "dim": dim, "value": value} for name, value in measured.items()]


def former_case(classes: int, dim: int) -> list[Row]:
    """A batch of 500 as of version 0.1: new (C, D, D) sums, which are then added to those so far."""
    torch.set_num_threads(1)
    embeddings, labels = draw(BATCH, dim, classes)
    so_far = [torch.zeros(classes, dim, dim, dtype=torch.float64), torch.zeros(classes, dim, dtype=torch.float64)]
    before = memory_mib("VmRSS")

    def add() -> None:
        rows = embeddings.double()
        blocks = class_blocks(labels, torch.bincount(labels, minlength=classes))
        batch = class_second_moments(rows, blocks, classes), class_sums(rows, labels, classes)
        so_far[:] = [mine + theirs for mine, theirs in zip(so_far, batch, strict=True)]

    repeats = 1 if classes * dim**2 > 2**26 else 5
    times = [seconds(add) for _ in range(repeats)]
    measured = {
        "a batch of 500 in version 0.1, ms": 1e3 * median(times),
        "its peak above the start, MiB": memory_mib() - before,
    }
    return [{"measured": name, "classes": classes, "dim": dim, "value": value} for name, value in measured.items()]


def streamed_case(classes: int, dim: int, rows: int) -> list[Row]:
    """Embeddings drawn and added a batch at a time; the time is that of the additions."""
    torch.set_num_threads(1)
    before = memory_mib("VmRSS")
    moments, generator, total = ClassMoments.zeros(classes, dim), torch.Generator().manual_seed(0), 0.0
    for _ in range(rows // BATCH):
        batch = torch.randn(BATCH, dim, generator=generator), torch.randint(classes, (BATCH,), generator=generator)
        total += seconds(lambda batch=batch: moments.add_(*batch))
    assert int(moments.counts.sum()) == rows
    measured = {f"{rows:,} embeddings, s": total, "their peak above the start, MiB": memory_mib() - before}
    return [{"measured": name, "classes": classes, "dim": dim, "value": value} for name, value in measured.items()]


class Given(LightningModule):
    """Its embeddings are its inputs."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The batch itself."""
        return {"embeddings": batch[0], "labels": batch[1]}


def callback_case(callback: str, classes: int, dim: int) -> list[Row]:
    """Validation of four embeddings for each class with one callback, or with none."""
    torch.set_num_threads(1)
    loader = DataLoader(TensorDataset(*draw(4 * classes, dim, classes)), BATCH)
    with tempfile.TemporaryDirectory() as folder:
        found = [] if callback == "no callback" else [CALLBACKS[callback]()]
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=found, **options)
        before = memory_mib("VmRSS")
        time_s = seconds(lambda: trainer.validate(Given(), loader, verbose=False))
    measured = {f"{callback}, s": time_s, f"{callback}: peak above the start, MiB": memory_mib() - before}
    return [{"measured": name, "classes": classes, "dim": dim, "value": value} for name, value in measured.items()]


def moments(given: argparse.Namespace) -> list[Row]:
    """Every size and every callback in a process of its own."""
    sizes, callback_sizes, rows = SIZES, CALLBACK_SIZES, STREAMED
    if given.quick:
        sizes, callback_sizes, rows = sizes[:1], ((20, 16),), 5_000
    found = [row for c, d in sizes for row in in_process(sizes_case, classes=c, dim=d)]
    former = [(c, d) for c, d in sizes if 8 * c * d**2 <= FORMER_BYTES]
    found += [row for c, d in former for row in in_process(former_case, classes=c, dim=d)]
    found += in_process(streamed_case, classes=sizes[-1][0], dim=sizes[-1][1], rows=rows)
    cases = [(name, c, d) for name in ("no callback", *CALLBACKS) for c, d in callback_sizes]
    return found + [row for name, c, d in cases for row in in_process(callback_case, callback=name, classes=c, dim=d)]
