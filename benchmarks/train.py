"""One run of the table in a process of its own: reads its job from stdin, trains, evaluates, writes one JSON file."""

import json
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import AdamW
from torch.utils.data import DataLoader

from benchmarks.apart import classes_apart
from benchmarks.machine import about, memory_mib, now
from simo_lightning import OneCycle, ProbeModule
from simo_lightning.functional.knn import knn_predict
from simo_lightning.metrics import ClassCosine, ClassCosineMax, EffectiveRank, ScatterRatio

NEIGHBORS = (1, 20, 200)
MARKS = (0.80, 0.85)  # validation kNN(20) whose time is noted
GEOMETRY = {
    "class_cosine": ClassCosine,
    "class_cosine_max": ClassCosineMax,
    "effective_rank": EffectiveRank,
    "scatter_ratio": ScatterRatio,
}
POINTS = 1000  # validation embeddings of a snapshot that are kept for a scatter plot
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Embedded(NamedTuple):
    """A split as the encoder maps it: ``(N, D)`` and ``(N,)`` on the CPU; CRC-32 of the raw images."""

    embeddings: Tensor
    labels: Tensor
    checksum: int


def make_parts(config: dict[str, Any], words: list[str]) -> LightningCLI:
    """Trainer, module and data as ``simo fit`` makes them, without its callbacks; nothing has run yet."""
    own = {**QUIET, "devices": 1, "limit_val_batches": 0}
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=[
            *("--config", json.dumps(config)),
            *(f"--trainer.{name}={json.dumps(value)}" for name, value in own.items()),
            *words,
        ],
    )


@torch.no_grad()
def embed(trainer: pl.Trainer, module: Any, data: Any, loader: DataLoader) -> Embedded:
    """Embed a split without augmentation, in the precision of training, as ``val/knn`` does."""
    training, precision, checksum = module.training, trainer.precision_plugin, 0
    module.eval()
    embeddings, labels = [], []
    for batch in loader:
        for part in batch:
            checksum = zlib.crc32(part.contiguous().numpy().tobytes(), checksum)
        images, classes = data.prepare(move_data_to_device(batch, module.device), augment=False)
        with precision.forward_context():
            embeddings.append(module.embed(precision.convert_input(images)).cpu())
        labels.append(classes.cpu())
    module.train(training)
    return Embedded(torch.cat(embeddings), torch.cat(labels), checksum)


def knn(bank: Embedded, queries: Embedded, k: int) -> float:
    """Accuracy of k nearest neighbours by cosine among all of the bank; nan where it has fewer than k."""
    if k > len(bank.labels):
        return float("nan")
    predicted = knn_predict(queries.embeddings, bank.embeddings, bank.labels, k)
    return float((predicted == queries.labels).double().mean())


def per_class(bank: Embedded, queries: Embedded, names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """How well each class is recognised, a row for each; and the number of groups of classes that stay apart."""
    classes = len(names)
    own = torch.nn.functional.one_hot(bank.labels, classes).double()  # (N, C)
    totals = own.sum(0)[:, None]
    predicted = knn_predict(queries.embeddings, bank.embeddings, bank.labels, 20, classes)
    hits = torch.bincount(queries.labels[predicted == queries.labels], minlength=classes)
    knn20 = hits / torch.bincount(queries.labels, minlength=classes)
    bank_rows, query_rows = bank.embeddings.double(), queries.embeddings.double()
    means, directions = own.T @ bank_rows / totals, normalize(own.T @ normalize(bank_rows) / totals)  # (C, D)
    nearest, _, by_cosine = classes_apart(directions, normalize(query_rows), queries.labels)
    _, _, by_distance = classes_apart(means, query_rows, queries.labels)
    frame = pd.DataFrame({"class": names, "knn20": knn20, "nearest_class_mean": nearest})
    frame = frame.assign(group=by_cosine, group_euclidean=by_distance).join(pd.DataFrame(means).add_prefix("mean_"))
    counts = {}
    for end, groups in (("", by_cosine), ("_euclidean", by_distance)):
        counts |= {f"groups{end}": int(groups.max()) + 1, f"alone{end}": int((groups.bincount() == 1).sum())}
    return frame.to_dict("records"), counts


class Snapshots(pl.Callback):
    """Measures the encoder on the validation split at evenly spaced steps, before the first and after the last too.

    The seconds of training exclude it, and the weights are those of a run without snapshots.

    Attributes:
        rows: One for each snapshot (class "all": kNN, and the seconds of training so far), and one for each class.
        points: Some validation embeddings of each snapshot, ``(P, D)``, for pictures; ``labels`` are theirs.
    """

    def __init__(self, data: Any, count: int, bank_size: int) -> None:
        self.data, self.count, self.bank_size = data, count, bank_size
        self.rows: list[dict[str, Any]] = []
        self.points: list[Tensor] = []
        self.labels = torch.zeros(0, dtype=torch.long)
        self._steps: set[int] = set()
        self._trained, self._since = 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self._steps = {round(total * part / (self.count - 1)) for part in range(self.count)}
        self._since = now()
        self._take(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self._steps and self.rows[-1]["step"] != trainer.global_step:
            self._take(trainer, pl_module)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained += now() - self._since
        bank = embed(trainer, pl_module, self.data, self.data.bank_dataloader(limit=self.bank_size))
        val = embed(trainer, pl_module, self.data, self.data.val_dataloader())
        classes, _ = per_class(bank, val, self.data.class_names)
        step = trainer.global_step
        taken = {"split": "val", "step": step, "epoch": step / trainer.num_training_batches, "seconds": self._trained}
        self.rows += [{**taken, "class": "all", "knn20": knn(bank, val, 20)}, *({**taken, **row} for row in classes)]
        rank = torch.nn.functional.one_hot(val.labels).cumsum(0).gather(1, val.labels[:, None])[:, 0]
        shown = rank <= POINTS // self.data.num_classes  # the first few of each class
        self.points.append(val.embeddings[shown])
        self.labels = val.labels[shown]
        self._since = now()


def evaluate(trainer: pl.Trainer, module: Any, data: Any, mlp: bool, seed: int) -> tuple[dict[str, Any], Any]:
    """All numbers of the last step, on the true classes; only labelled training images are a bank or train a probe."""
    data.setup("test")
    module.to(trainer.strategy.root_device)
    validation = data.val_dataloader()
    if isinstance(validation, list):
        raise ValueError("the data must have a validation split, for the learning rate: got val_fraction 0")
    loaders = {"train": data.bank_dataloader(), "val": validation, "test": data.test_dataloader()}
    splits = {name: embed(trainer, module, data, loader) for name, loader in loaders.items()}
    bank, numbers = splits["train"], {f"{name}_images": len(split.labels) for name, split in splits.items()}
    parts = " ".join(str(split.checksum) for split in splits.values())
    numbers["checksum"] = f"{zlib.crc32(parts.encode()):08x}"
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(bank.embeddings.double().numpy(), bank.labels.numpy())
    for name, split in list(splits.items())[1:]:
        found = {f"knn{k}": knn(bank, split, k) for k in NEIGHBORS}
        found["linear"] = float(probe.score(split.embeddings.double().numpy(), split.labels.numpy()))
        for key, metric_class in GEOMETRY.items():
            metric = metric_class(data.num_classes, split.embeddings.shape[1])
            metric.update(split.embeddings, split.labels)
            found[key] = float(metric.compute())
        classes, groups = per_class(bank, split, data.class_names)
        numbers |= {f"{name}_{key}": value for key, value in {**found, **groups}.items()}
    if mlp:
        numbers["test_mlp"] = mlp_head(trainer, module, data, seed)
    return numbers, [{"split": "test", "step": trainer.global_step, **row} for row in classes]


def mlp_head(trainer: pl.Trainer, module: Any, data: Any, seed: int) -> float:
    """Test accuracy of an MLP head trained for one epoch on the frozen encoder: the paper's protocol."""
    seed_everything(seed, verbose=False)
    optimizer = partial(AdamW, lr=4e-3)
    probe = ProbeModule(
        data.num_classes, encoder=module.encoder, head="mlp", optimizer=optimizer, lr_scheduler=OneCycle
    )
    own: dict[str, Any] = {**QUIET, "max_epochs": 1, "devices": 1, "limit_val_batches": 0}
    probe_trainer = pl.Trainer(accelerator=module.device.type, precision=trainer.precision, **own)
    probe_trainer.fit(probe, datamodule=data)
    return float(probe_trainer.test(probe, datamodule=data, verbose=False)[0]["test/accuracy"])


def run(job: dict[str, Any], points: Path | None = None) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        job: As :meth:`benchmarks.experiments.Experiment.job` makes it.
        points: File for the snapshots' embeddings (.npz); None writes none.

    Returns:
        ``row``, the run's line of the CSV, where ``error`` says why it diverged, if it did; and ``snapshots``.
    """
    start = time.perf_counter()
    parts = make_parts(job["config"], job["words"])
    trainer, module, data = parts.trainer, parts.model, parts.datamodule
    data.setup("fit")
    arguments = yaml.safe_load(parts.parser.dump(parts.config, skip_none=False))["data"]["init_args"]
    labelled = (arguments["classes_per_batch"] or data.num_classes) * arguments["samples_per_class"]
    images = (labelled + (arguments.get("unlabelled_per_batch") or 0)) * arguments.get("views", 1)
    row = {**job["row"], "error": None, "images_per_step": images}
    row |= {"label_fraction": arguments.get("label_fraction", 1.0)}
    snapshots = Snapshots(data, job["snapshots"], job["bank_size"]) if job["snapshots"] else None
    trainer.callbacks += [snapshots] if snapshots else []
    begin, row["peak_mib_start"] = time.perf_counter(), memory_mib()
    row["prepare_seconds"], tests = begin - start, []
    try:
        trainer.fit(module, datamodule=data)
        if trainer.interrupted:  # Lightning ends like this on Ctrl-C, too
            raise KeyboardInterrupt
        row |= {"train_seconds": time.perf_counter() - begin, "peak_mib_train": memory_mib()}
        begin = time.perf_counter()
        numbers, tests = evaluate(trainer, module, data, job["mlp"], row["seed"])
        row |= {**numbers, "evaluate_seconds": time.perf_counter() - begin}
    except ValueError as error:
        if "finite" not in str(error):
            raise
        row["error"] = f"diverged: {error}"  # a learning rate of the sweep may be too high
    if snapshots:
        course = [(taken["seconds"], taken["knn20"]) for taken in snapshots.rows if taken["class"] == "all"]
        for mark in MARKS:
            row[f"seconds_to_{mark:.2f}"] = next((seconds for seconds, value in course if value >= mark), None)
        row["train_seconds"] = course[-1][0]
        if points is not None:
            points.parent.mkdir(parents=True, exist_ok=True)
            np.savez(points, points=torch.stack(snapshots.points).numpy(), labels=snapshots.labels.numpy())
    row |= {"all_seconds": time.perf_counter() - start, "peak_mib": memory_mib()}
    return {"row": {**row, **about()}, "snapshots": [*(snapshots.rows if snapshots else []), *tests]}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    job = json.load(sys.stdin)
    result = run(job, Path(job["points"]) if job["snapshots"] else None)
    Path(job["target"]).write_text(json.dumps(result))
