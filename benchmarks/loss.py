"""Forward and backward of every level of SimOLoss against SupCon and against a copy of the embeddings.

    python -m benchmarks.loss --json FILE [--quick]

Every case runs in a process of its own on one thread; the time is the median of its repeats, the memory the growth of
the process's peak over what it held before. Three yardsticks: pytorch-metric-learning's SupConLoss, a compact SupCon
(one N x N product and a logsumexp, below) and the floor: reading the embeddings and writing a gradient of their size.
A case whose N x N matrices would not fit, or that ran over the time limit at a smaller N, is left out.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = [512, 4_096, 16_384, 131_072, 1_000_000]
SHAPES = [(16, 10), (128, 10), (16, 100), (128, 1_000)]  # D, C
LOSSES = ["floor", "group", "class", "centroid", "pair", "supcon", "pml"]
QUADRATIC = {"pair": 16_384, "supcon": 16_384, "pml": 4_096}  # the largest N that is tried
LARGEST_CLASS_STATE = 2**29  # bytes of (C, D, D) at the class level


def compact_supcon(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """SupCon (arXiv 2004.11362, L_out) as briefly as torch can say it."""
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-1e9)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    same = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    return -((log_probability * same).sum(dim=1) / same.sum(dim=1).clamp(min=1)).mean()


def make(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a name."""
    from simo_lightning import SimOLoss

    if name == "supcon":
        return compact_supcon
    if name == "pml":
        from pytorch_metric_learning.losses import SupConLoss

        loss: Callable[[Tensor, Tensor], Tensor] = SupConLoss(temperature=0.1)
        return loss
    return SimOLoss() if name == "centroid" else SimOLoss(level=name, form="log")  # type: ignore[arg-type]


def make_step(name: str, embeddings: Tensor, labels: Tensor) -> Callable[[], Any]:
    """What is timed: forward and backward, or for the floor a copy of the embeddings."""
    if name == "floor":
        return lambda: embeddings.detach().clone()
    loss = make(name)
    return lambda: loss(embeddings, labels).backward()


def measure(name: str, rows: int, dim: int, classes: int, seconds: float = 4.0) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, dim, generator=generator).requires_grad_()
    labels = torch.arange(rows) % classes
    step = make_step(name, embeddings, labels)
    make_step(name, embeddings[: 4 * classes].detach().requires_grad_(), labels[: 4 * classes])()  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        embeddings.grad = None
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        if times[0] > 20:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    case = {"loss": name, "rows": rows, "dim": dim, "classes": classes, "repeats": len(times)}
    return {**case, "milliseconds": 1e3 * statistics.median(times), "peak_mib": peak / 1024}


def fits(name: str, rows: int, dim: int, classes: int) -> bool:
    """Whether a case is tried at all."""
    if name == "class" and classes * dim**2 * 4 > LARGEST_CLASS_STATE:
        return False
    return rows <= QUADRATIC.get(name, rows) and rows >= 4 * classes


def run(arguments: list[str]) -> dict[str, Any] | None:
    """One case in a fresh process; None where it failed or took over three minutes."""
    command = [sys.executable, "-m", "benchmarks.loss", "--case", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def ratios(cases: list[dict[str, Any]]) -> None:
    """Add to each case its time over the floor's and the yardsticks' time over its own, where they ran."""
    times = {(case["loss"], case["rows"], case["dim"], case["classes"]): case["milliseconds"] for case in cases}
    for case in cases:
        where = (case["rows"], case["dim"], case["classes"])
        for other, name in (("supcon", "faster_than_supcon"), ("pml", "faster_than_pml")):
            if (other, *where) in times:
                case[name] = times[(other, *where)] / case["milliseconds"]
        case["times_the_floor"] = case["milliseconds"] / times[("floor", *where)]


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as Markdown."""
    head = ["loss", "N", "D", "C", "ms", "MiB", "x floor", "SupCon / it", "PML SupCon / it"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        numbers = [case["milliseconds"], case["peak_mib"], case["times_the_floor"]]
        numbers += [case.get("faster_than_supcon"), case.get("faster_than_pml")]
        shown = ["" if number is None else f"{number:.3g}" for number in numbers]
        cells = [case["loss"], f"{case['rows']:,}", str(case["dim"]), f"{case['classes']:,}", *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the cases and write what came out."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--quick", action="store_true", help="only N = 512 and 4,096 with D = 16 and C = 10")
    parser.add_argument("--case", nargs=4, metavar=("LOSS", "N", "D", "C"), help="one case, in this process")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], *(int(word) for word in options.case[1:]))))
        return
    wanted = [(16, 10)] if options.quick else SHAPES
    cases = []
    for dim, classes in wanted:
        for rows in ROWS[:2] if options.quick else ROWS:
            for name in (name for name in LOSSES if fits(name, rows, dim, classes)):
                case = run([name, str(rows), str(dim), str(classes)])
                print(f"{name:>9} N={rows:<9,} D={dim:<4} C={classes:<6,}", case and f"{case['milliseconds']:.2f} ms")
                cases += [case] if case else []
    ratios(cases)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "threads": 1, "cases": cases}, indent=1))
    print(table(cases))


if __name__ == "__main__":
    main()
