"""The command: python -m benchmarks.timing NAME --out FOLDER, time and memory of the loss, the data and ``simo``.

Times are medians of torch.utils.benchmark or of many steps. Every case runs in a process of its own, so that its peak
memory is its own.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import (
    timing_decode,
    timing_embed,
    timing_fit,
    timing_knn,
    timing_moments,
    timing_pack,
    timing_stream,
    timing_training,
)
from benchmarks.experiments import append, timings
from benchmarks.machine import Row, about, in_process, memory_mib, milliseconds, now
from benchmarks.tables import timing as table
from simo_lightning import ImageEncoder, SimOLoss, SimOModule
from simo_lightning.functional.chunks import sum_of_chunks

LARGEST = {"pair": 16384, "pml": 4096, "supcon": 65536}  # N, where memory or time is quadratic


def make_loss(name: str) -> Callable[[Tensor, Tensor], Any]:
    """A loss by name: default, default compiled, a level, a level and form, supcon (:func:`compact_supcon`), pml
    (SupConLoss of pytorch-metric-learning), or floor, which only copies the embeddings.
    """
    if name == "floor":
        return lambda embeddings, labels: embeddings.detach().clone()
    if name == "supcon":
        return compact_supcon
    if name == "pml":
        return SupConLoss(temperature=0.1)  # type: ignore[no-any-return]
    level, _, form = name.partition(" ")
    if level != "default":
        return SimOLoss(level=level, form=form or "log")  # type: ignore[arg-type]
    loss = SimOLoss()
    if form == "compiled":
        loss.compile()
    return loss


def compact_supcon(embeddings: Tensor, labels: Tensor, temperature: float = 0.1, entries: int = 2**21) -> Tensor:
    """SupCon in its fastest plain form: one N x N product and a logsumexp, in chunks of ``entries`` as the package's
    own losses, and class sums for the positives. For labels 0..C-1 of two embeddings or more each.
    """
    unit, counts = F.normalize(embeddings), torch.bincount(labels)
    sums = torch.zeros(len(counts), unit.shape[1]).index_add(0, labels, unit)
    positives = ((unit * sums[labels]).sum(dim=1) - 1) / (counts[labels] - 1) / temperature

    def log_sums(rows: Tensor, itself: Tensor, unit: Tensor) -> Tensor:
        return (rows @ unit.T / temperature).scatter(1, itself, -torch.inf).logsumexp(dim=1).sum()

    itself = torch.arange(len(unit)).unsqueeze(1)
    sums_over_others = sum_of_chunks(log_sums, max(1, entries // len(unit)), (unit, itself), (unit,))
    return (sums_over_others - positives.sum()) / len(unit)


def draw(rows: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings that require a gradient, and labels."""
    embeddings = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    return embeddings.requires_grad_(), torch.arange(rows) % classes


def loss_case(loss: str, rows: int, dim: int, classes: int) -> Row:
    """Forward and backward of a loss on one thread; memory is the peak of the process minus what it held before."""
    torch.set_num_threads(1)
    function, compiled = make_loss(loss), loss.endswith("compiled")

    def step(embeddings: Tensor, labels: Tensor) -> None:
        embeddings.grad = None
        value = function(embeddings, labels)
        if value.requires_grad:
            value.backward()

    step(*draw(rows if compiled else 2 * classes, dim, classes))  # warm-up; a second size would compile for all sizes
    batch, before = draw(rows, dim, classes), memory_mib("VmRSS")
    start = now()
    step(*batch)
    once = 1e3 * (now() - start)
    grown = None if compiled else max(0.0, memory_mib() - before)  # compilation itself takes more
    time_ms, repeats = (once, 1) if once > 10_000 else milliseconds(lambda: step(*batch))
    sizes = {"rows": rows, "dim": dim, "classes": classes}
    return {"loss": loss, **sizes, "repeats": repeats, "milliseconds": time_ms, "peak_mib": grown}


def losses(losses: list[str], shapes: list[tuple[int, int, int]]) -> list[Row]:
    """All feasible cases: at least 2 embeddings per class, no N x N matrix or (C, D, D) moments that are too large."""
    cases = [(name, n, d, c) for n, d, c in shapes for name in losses if 2 * c <= n <= LARGEST.get(name, n)]
    cases = [one for one in cases if one[0] != "class" or one[3] * one[2] ** 2 <= 2**23]
    cases = [one for one in cases if not one[0].endswith("compiled") or one[1] * one[3] <= 2**27]  # unrolls its chunks
    return [in_process(loss_case, loss=name, rows=n, dim=d, classes=c) for name, n, d, c in cases]


def loss_benchmark(name: str, quick: bool) -> list[Row]:
    """A table of ``timings`` in experiments.yaml; its first shape alone with ``quick``."""
    content = timings()[name]
    return losses(content["losses"], content["shapes"][: 1 if quick else None])


def profile_case(rows: int = 16384, dim: int = 128, classes: int = 10, repeats: int = 20) -> list[Row]:
    """Operations of torch's profiler that take the most time in the default loss, on one thread."""
    torch.set_num_threads(1)
    (embeddings, labels), loss = draw(rows, dim, classes), make_loss("default")
    time_ms, _ = milliseconds(lambda: loss(embeddings, labels).backward())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            loss(embeddings, labels).backward()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events) / 100
    what = {"case": f"default, N = {rows:,}, D = {dim}, C = {classes}", "median_ms": time_ms}
    found = [(event.key, event.self_cpu_time_total / total, event.count) for event in events[:14]]
    return [{**what, "operation": name, "self_percent": share, "calls": calls} for name, share, calls in found]


def micro_batch_case(images: int, size: int | None, norm: str) -> Row:
    """A training step of CIFAR-size images in micro-batches: its time, and the growth of the process's peak memory."""
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet10", width=0.5, stem="small_stride2", norm=norm)
    module = SimOModule(encoder, SimOLoss(), micro_batch_size=size)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]  # no trainer here
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    batch, before = (torch.randn(images, 3, 32, 32), torch.arange(images) % 10), memory_mib("VmRSS")

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()

    step()
    grown = memory_mib() - before
    sizes = {"norm": norm, "images": images, "micro_batch": size or images}
    return {**sizes, "peak_mib": grown, "seconds": milliseconds(step)[0] / 1e3}


def micro_batches(given: argparse.Namespace) -> list[Row]:
    """Whole batches and micro-batches, with batch norm and group norm."""
    images, sizes = (512, (None, 64)) if given.quick else (4096, (None, 1024, 256, 64))
    cases = [(norm, size) for norm in ("batch", "group") for size in sizes]
    return [in_process(micro_batch_case, images=images, size=size, norm=norm) for norm, size in cases]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "loss": lambda given: loss_benchmark("loss", given.quick),
    "levels": lambda given: loss_benchmark("levels", given.quick),
    "profile": lambda given: in_process(profile_case, rows=600 if given.quick else 16384),
    "micro_batches": micro_batches,
    "decode": timing_decode.decode,
    "embed": timing_embed.embed,
    "training": timing_training.training,
    "pack": timing_pack.pack,
    "moments": timing_moments.moments,
    "stream": timing_stream.stream,
    "knn": timing_knn.knn,
    "validation": timing_knn.validation,
    **{f.__name__: f for f in timing_fit.BENCHMARKS},
}


def main() -> None:
    """Measure, write the CSV and print its table."""
    own = argparse.ArgumentParser("python -m benchmarks.timing", description=__doc__, allow_abbrev=False)
    own.add_argument("names", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    own.add_argument(
        "--data.data_dir",
        dest="data_dir",
        help="CIFAR-10, for all that times simo fit; photographs in class folders, for decode",
    )
    own.add_argument("--photos.data_dir", dest="photos_dir", help="photographs in class folders, for training")
    own.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of NAME.csv, which is replaced")
    own.add_argument("--quick", action="store_true", help="small cases, on digits instead of CIFAR-10")
    own.add_argument("--queries", type=int, default=5000, help="of knn")
    own.add_argument("--bank", type=int, default=1_280_000, help="embeddings that knn compares with")
    own.add_argument("--dim", type=int, default=128, help="of the embeddings of knn")
    own.add_argument("--full", action="store_true", help="knn with 50,000 queries, one round")
    given = own.parse_args()
    need_data = {"validation", *(f.__name__ for f in timing_fit.BENCHMARKS)}
    need_data |= set() if given.photos_dir else {"training"}
    if need_data & {*given.names} and not (given.quick or given.data_dir):
        own.error("--data.data_dir DIR is needed, or --quick")
    for name in given.names:
        machine, path = about(), given.out / f"{name}.csv"
        rows = BENCHMARKS[name](given)
        path.unlink(missing_ok=True)
        append(path, [{**row, **machine} for row in rows])
        print(f"{table(name, given.out)}\n", flush=True)


if __name__ == "__main__":
    main()
