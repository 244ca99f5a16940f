"""One run, in a process of its own: reads its job from stdin, trains with snapshots, evaluates, writes JSON and PNG."""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from benchmarks.paper.figures import write_figures
from benchmarks.paper.snapshots import Snapshots, measure
from benchmarks.recipes.evaluate import NEIGHBORS, embed, geometry, linear_probe, neighbors
from benchmarks.recipes.run import about, make_parts, peak_mib
from benchmarks.recipes.store import write_result


def run(job: dict[str, Any], figures: Path) -> dict[str, Any]:
    """Train, measure along the way, evaluate the last epoch.

    Args:
        job: As ``benchmarks.recipes.drive.Driver.job_of`` makes it, and ``snapshots``, their number.
        figures: Folder of the run's pictures.

    Returns:
        What the JSON file holds; ``metrics`` is None and ``error`` says why where the run diverged.
    """
    start = time.perf_counter()
    parts = make_parts(job)
    result: dict[str, Any] = {**about(job, parts), "metrics": None, "error": None}
    parts.datamodule.setup("fit")
    snapshots = Snapshots(parts.datamodule, job["snapshots"])
    parts.trainer.callbacks.append(snapshots)
    try:
        parts.trainer.fit(parts.model, datamodule=parts.datamodule)
        if parts.trainer.interrupted:  # Lightning takes a Ctrl-C for an end like any other
            raise KeyboardInterrupt
        result["metrics"] = evaluate(parts.trainer, parts)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        result["error"] = f"diverged: {error}"
    names = list(parts.datamodule.class_names)
    result |= {"class_names": names, "train_class_names": parts.datamodule.train_class_names}
    result |= {"snapshots": snapshots.taken, "figures": []}
    if result["metrics"]:
        result["figures"] = write_figures(figures, snapshots.taken, snapshots.scatter, snapshots.labels, names)
    return {**result, "seconds": {"all": time.perf_counter() - start}, "peak_mib": peak_mib()}


def evaluate(trainer: pl.Trainer, parts: LightningCLI) -> dict[str, Any]:
    """The numbers of the last epoch, always on the true classes.

    Args:
        trainer: That trained.
        parts: Module and data.

    Returns:
        Keys val and test.
    """
    module, data = parts.model, parts.datamodule
    data.setup("test")
    module.to(trainer.strategy.root_device).eval()
    loaders = (data.bank_dataloader(), data.val_dataloader(), data.test_dataloader())
    bank, val, test = (embed(trainer, module, data, loader) for loader in loaders)
    judged = {key: value for key, value in measure(bank, test, data.num_classes).items() if key != "means"}
    per_class = {"knn20_per_class": judged.pop("knn"), "mean_per_class": judged.pop("mean_accuracy")}
    test_metrics = {f"knn{k}": neighbors(bank, test, k) for k in NEIGHBORS}
    test_metrics |= {"linear": linear_probe(bank, test), **geometry(test, data.num_classes)}
    return {"val": {"knn20": neighbors(bank, val, 20)}, "test": {**test_metrics, **judged, **per_class}}


def main() -> None:
    """Read the job, run it, write its file."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    job = json.load(sys.stdin)
    target = Path(job["target"])
    write_result(target, run(job, target.parent.parent / "figures" / target.stem))


if __name__ == "__main__":
    main()
