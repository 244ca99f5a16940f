"""Forward and backward of every level of SimOLoss against SupCon and against a copy of the embeddings.

    python -m benchmarks.loss --json FILE --plot FILE.png [--quick]

Every case runs in a process of its own on one thread; the time is the median of its repeats, the memory the growth of
the process's peak over what it held before. Three yardsticks: pytorch-metric-learning's SupConLoss, a compact SupCon
(one N x N product and a logsumexp, below) and the floor: reading the embeddings and writing a gradient of their size.
A case whose N x N matrices would not fit, or that ran over the time limit at a smaller N, is left out.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.machine import about, write_json
from simo_lightning.plotting import class_colors

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
    return SimOLoss(form="softmax") if name == "centroid" else SimOLoss(level=name, form="log")  # type: ignore[arg-type]


def make_step(name: str, embeddings: Tensor, labels: Tensor) -> Callable[[], Any]:
    """What is timed: forward and backward, or for the floor a copy of the embeddings."""
    if name == "floor":
        return lambda: embeddings.detach().clone()
    loss = make(name)
    return lambda: loss(embeddings, labels).backward()


def measure(name: str, rows: int, dim: int, classes: int, seconds: float = 1.0) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, dim, generator=generator).requires_grad_()
    labels = torch.arange(rows) % classes
    step = make_step(name, embeddings, labels)
    make_step(name, embeddings[: 4 * classes].detach().requires_grad_(), labels[: 4 * classes])()  # warms up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        embeddings.grad = None
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        if times[0] > 4:  # one look at what takes so long is enough
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    case = {"loss": name, "rows": rows, "dim": dim, "classes": classes, "repeats": len(times)}
    return {**case, "milliseconds": 1e3 * statistics.median(times), "peak_mib": peak / 1024}


def fits(name: str, rows: int, dim: int, classes: int) -> bool:
    """Whether a case is tried at all."""
    if name == "class" and classes * dim**2 * 4 > LARGEST_CLASS_STATE:
        return False
    return rows <= QUADRATIC.get(name, rows) and rows >= 4 * classes


def run(name: str, rows: int, dim: int, classes: int) -> dict[str, Any] | None:
    """One case in a process of its own, forked so that nothing is imported again; None where it failed or took over
    three minutes.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure(name, rows, dim, classes)))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] | None = receiver.recv() if receiver.poll(180) else None
    except EOFError:
        result = None
    process.kill()
    process.join()
    return result


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


def figure(cases: list[dict[str, Any]]) -> Figure:
    """Milliseconds against N, a panel for each D and C."""
    shapes = list(dict.fromkeys((case["dim"], case["classes"]) for case in cases))
    drawing = Figure(figsize=(3.6 * len(shapes), 3.6), layout="constrained")
    panels = drawing.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    colors = class_colors(len(LOSSES))
    for panel, (dim, classes) in zip(panels, shapes, strict=True):
        for color, name in zip(colors, LOSSES, strict=True):
            own = [case for case in cases if (case["loss"], case["dim"], case["classes"]) == (name, dim, classes)]
            times = [case["milliseconds"] for case in own]
            panel.loglog([case["rows"] for case in own], times, "o-", color=color, label=name, markersize=3)
        panel.set(title=f"D = {dim}, C = {classes:,}", xlabel="N")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, forward and backward, one thread")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawing


def main() -> None:
    """Run the cases and write what came out."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="picture of time against N")
    parser.add_argument("--quick", action="store_true", help="only N = 512 and 4,096 with D = 16 and C = 10")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make("pml")  # its imports, once for all cases
    wanted = [(16, 10)] if options.quick else SHAPES
    cases = []
    for dim, classes in wanted:
        for rows in ROWS[:2] if options.quick else ROWS:
            for name in (name for name in LOSSES if fits(name, rows, dim, classes)):
                case = run(name, rows, dim, classes)
                print(f"{name:>9} N={rows:<9,} D={dim:<4} C={classes:<6,}", case and f"{case['milliseconds']:.2f} ms")
                cases += [case] if case else []
    ratios(cases)
    write_json(options.json, {**about(), "threads": 1, "cases": cases})
    if options.plot:
        figure(cases).savefig(options.plot, dpi=160)
    print(table(cases))


if __name__ == "__main__":
    main()
