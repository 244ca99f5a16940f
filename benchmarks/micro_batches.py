"""Peak memory and time of one training step, whole and by micro-batches.

    python -m benchmarks.micro_batches --json FILE

4,096 CIFAR-size images, ResNet-10 of half width with a small stem of stride 2, SimOLoss, float32. Each case runs in a
process of its own; its memory is the largest resident set less what the process held before its first step.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from simo_lightning import ImageEncoder, SimOLoss, SimOModule

MIB = 2**20


def resident() -> int:
    """Resident set now, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(images: int, size: int | None, norm: Any, steps: int) -> dict[str, Any]:
    """One case: a warm-up step, then the fastest of ``steps``."""
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet10", width=0.5, stem="small_stride2", norm=norm)
    module = SimOModule(encoder, SimOLoss(), micro_batch_size=size)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]  # no trainer here
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    batch = torch.randn(images, 3, 32, 32), torch.arange(images) % 10
    before, times = resident(), []
    for step in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = module.training_step(batch, step)["loss"]
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"size": size, "norm": norm, "mib": (peak - before) / MIB, "seconds": min(times[1:]), "loss": float(loss)}


def in_a_fresh_process(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.micro_batches", "--case", json.dumps(case)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| norm | micro-batch | peak memory | of whole | step | time ratio | loss |", "|" + "---|" * 7]
    for result in results:
        whole = next(other for other in results if other["norm"] == result["norm"] and other["size"] is None)
        lines.append(
            f"| {result['norm']} | {result['size'] or 'whole'} | {result['mib']:,.0f} MiB "
            f"| {result['mib'] / whole['mib']:.1%} | {result['seconds']:.2f} s "
            f"| {result['seconds'] / whole['seconds']:.2f} | {result['loss']:.6f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=4096, help="images of the batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 256, 64], help="micro-batch sizes")
    parser.add_argument("--norms", nargs="+", default=["batch", "group"], help="norms of the encoder")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each case")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a fresh process is told
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    about = machine()
    print(*(f"{name} {value}" for name, value in about.items()), f"images {arguments.images}", sep=", ")
    cases = [(norm, size) for norm in arguments.norms for size in (None, *arguments.sizes)]
    common = {"images": arguments.images, "steps": arguments.steps}
    results = [in_a_fresh_process({"size": size, "norm": norm, **common}) for norm, size in cases]
    print(*table(results), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, **common, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
