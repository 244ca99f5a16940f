"""One run, in a process of its own: reads its job from stdin, trains, evaluates, writes one JSON file."""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningCLI

from benchmarks.recipes.evaluate import embed, geometry, linear_probe, neighbors
from benchmarks.recipes.run import about, make_parts, peak_mib
from benchmarks.recipes.store import write_result


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        job: As ``benchmarks.semi.__main__`` makes it of a ``Run``.

    Returns:
        What the JSON file holds; ``metrics`` is None and ``error`` says why where the run diverged.
    """
    start = time.perf_counter()
    parts = make_parts({**job, "epochs": -1, "overrides": [*job["overrides"], f"--trainer.max_steps={job['steps']}"]})
    own = {name: job[name] for name in ("arm", "fraction", "steps", "images", "digest")}
    known = {"recipe": job["arm"], "title": job["arm"], "setting": job["digest"], "epochs": -1}
    result: dict[str, Any] = {**about({**known, **job}, parts), **own, "metrics": None, "error": None}
    begin = time.perf_counter()
    try:
        parts.trainer.fit(parts.model, datamodule=parts.datamodule)
        if parts.trainer.interrupted:  # Lightning takes a Ctrl-C for an end like any other
            raise KeyboardInterrupt
        result["seconds"] = {"train": time.perf_counter() - begin}
        result |= evaluate(parts)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        result["error"] = f"diverged: {error}"
    seconds = {**result.get("seconds", {}), "all": time.perf_counter() - start}
    return {**result, "seconds": seconds, "peak_mib": peak_mib()}


def evaluate(parts: LightningCLI) -> dict[str, Any]:
    """The numbers of the last step: only labelled training images are a bank or train the probe.

    Args:
        parts: Trainer, module and data.

    Returns:
        ``metrics`` with the keys val and test, and ``data``, the sizes.
    """
    trainer, module, data = parts.trainer, parts.model, parts.datamodule
    data.setup("test")
    module.to(trainer.strategy.root_device).eval()
    bank = embed(trainer, module, data, data.bank_dataloader())
    metrics, sizes = {}, {"labelled": len(bank.labels)}
    for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        split = embed(trainer, module, data, loader)
        sizes[name] = len(split.labels)
        metrics[name] = {
            "knn20": neighbors(bank, split, 20),
            "linear": linear_probe(bank, split),
            **geometry(split, data.num_classes),
        }
    return {"metrics": metrics, "data": sizes}


def main() -> None:
    """Read the job, run it, write its file."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    job = json.load(sys.stdin)
    write_result(Path(job["target"]), run(job))


if __name__ == "__main__":
    main()
