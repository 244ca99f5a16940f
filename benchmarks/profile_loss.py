"""Where the time of a loss goes: operations of torch's profiler, forward and backward on one thread.

    python -m benchmarks.profile_loss [--rows 16384] [--dim 128] [--classes 10] [--level centroid] [--out FILE.txt]

It asks nothing of the package but SimOLoss, so that the same file tells of an earlier commit.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from simo_lightning import SimOLoss

REPEATS = 20
SHOWN = 14  # operations


def measure(level: str, rows: int, dim: int, classes: int) -> str:
    """Time and profile one shape.

    Args:
        level: Of SimOLoss, at its default form.
        rows: N.
        dim: D.
        classes: C.

    Returns:
        A table.
    """
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, dim, generator=draw).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=draw)
    loss = SimOLoss(level, "softmax" if level in ("centroid", "pair") else "log")

    def step() -> None:
        embeddings.grad = None
        loss(embeddings, labels).backward()

    seconds = []
    for _ in range(REPEATS + 2):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(REPEATS):
            step()
    table = profiler.key_averages().table("self_cpu_time_total", row_limit=SHOWN, max_name_column_width=40)
    median, least = statistics.median(seconds[2:]) * 1e3, min(seconds[2:]) * 1e3
    head = f"{level}, N = {rows}, D = {dim}, C = {classes}: median {median:.2f} ms, least {least:.2f} ms (unprofiled)"
    return f"{head}\nprofile of {REPEATS} repeats:\n{table}"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384, help="N (default: 16384)")
    parser.add_argument("--dim", type=int, default=128, help="D (default: 128)")
    parser.add_argument("--classes", type=int, default=10, help="C (default: 10)")
    parser.add_argument("--level", default="centroid", choices=["group", "class", "centroid", "pair"])
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = measure(given.level, given.rows, given.dim, given.classes)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
