"""Time and memory of ``simo fit``: each fit is the command itself in a process of its own."""

import argparse
import gc
import json
import os
import re
import socket
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.experiments import ROOT
from benchmarks.machine import Fresh, Row, case, fresh, milliseconds, now, resident_mib
from benchmarks.train import make_parts
from simo_lightning import SimOLoss
from simo_lightning.distributed import gather_rows

DIGITS, CIFAR10 = str(ROOT / "configs" / "digits.yaml"), str(ROOT / "configs" / "cifar10_cpu.yaml")
SIMO = ["-c", "from simo_lightning.cli import main; main()"]
NO_VALIDATION = ["--trainer.limit_val_batches", "0", "--best.monitor", "train/loss", "--trainer.max_epochs", "100"]
DIM = 13  # of the embeddings that Watch counts: no other tensor has so many columns


class OneLayer(nn.Module):
    """An encoder that costs next to nothing: a step's time is then what surrounds the encoder."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(dim)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.linear(images.flatten(1))
        return embeddings


class Watch(pl.Callback):
    """Prints at the end of a fit: median step in ms, seconds in hooks (of the trainer's SimpleProfiler), memory after
    each epoch, and rows of embeddings alive after the last batch of a validation.

    Args:
        steps: Ends the fit after so many; 0: after its own length.
        leave: End the process after the first step, for the time until then.
    """

    def __init__(self, steps: int = 0, leave: bool = False) -> None:
        self.steps, self.leave = steps, leave
        self.ends: list[float] = []
        self.mib: list[float] = []
        self.tensors: list[int] = []
        self.kept = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.leave:
            os._exit(0)
        self.ends.append(now())
        trainer.should_stop = 0 < self.steps < len(self.ends) - 5

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if index + 1 == trainer.num_val_batches[0]:
            rows = {value.data_ptr(): value.shape for value in _tensors()}  # a view counts once
            found = sum(shape[0] for shape in rows.values() if len(shape) == 2 and shape[1] == DIM)
            self.kept = max(self.kept, found)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.tensors.append(len(_tensors()))
        self.mib.append(resident_mib())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and self.ends:
            hooks = {name: sum(times) for name, times in getattr(trainer.profiler, "recorded_durations", {}).items()}
            steps = np.diff(self.ends[5:]) if len(self.ends) > 6 else [0.0]  # the first ones warm up
            found = {"ms": 1e3 * float(np.median(steps)), "hooks": hooks, "kept": self.kept}
            print("\n" + json.dumps({**found, "mib": self.mib, "tensors": self.tensors}), flush=True)


def _tensors() -> list[Tensor]:
    gc.collect()
    return [value for value in gc.get_objects() if issubclass(type(value), Tensor)]


def config_words(given: argparse.Namespace) -> list[str]:
    """Digits with --quick, else CIFAR-10."""
    return ["--config", DIGITS] if given.quick else ["--config", CIFAR10, "--data.data_dir", given.data_dir]


def simo_fit(*words: str, world: int = 1, steps: int = 0) -> tuple[Row, Fresh]:
    """``simo fit`` in fresh processes; gives what rank 0's Watch printed, and its cost."""
    callback = json.dumps({"class_path": "benchmarks.timing_fit.Watch", "init_args": {"steps": steps}})
    with tempfile.TemporaryDirectory() as folder:
        own = ["--run_dir", folder, "--trainer.num_sanity_val_steps", "0", "--trainer.callbacks+", callback]
        done = ranks([*SIMO, "fit", *words, *own], world)
    return json.loads(next(line for line in done.out.splitlines() if line.startswith('{"ms"'))), done


def ranks(words: list[str], world: int) -> Fresh:
    """A command in as many processes as ranks of one job, one thread each where they are several; gives rank 0's."""
    if world == 1:
        return fresh(words)()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    waits = [fresh(words, RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", **job) for rank in range(world)]
    first, *_ = [wait() for wait in waits]
    return first


def throughput(given: argparse.Namespace) -> list[Row]:
    """simo fit without validation; a bare loop of the same encoder and optimizer; that loop fed by a DataLoader."""
    words, steps = config_words(given), 5 if given.quick else 300
    fit, _ = simo_fit(*words, *NO_VALIDATION, steps=steps)
    around, _ = simo_fit(*words, *NO_VALIDATION, "--model.encoder", "benchmarks.timing_fit.OneLayer", steps=steps)
    bare = case(
        "benchmarks.timing_fit.bare_case", words=words, workers=sorted({0, 1 if given.quick else os.cpu_count()})
    )
    size, loop = bare.pop("images"), bare.pop("bare")
    rows = {"simo fit, images per second": 1e3 * size / fit["ms"], "bare loop, images per second": 1e3 * size / loop}
    rows |= {
        "simo fit / bare loop": loop / fit["ms"],
        **{f"{name} / bare loop": loop / ms for name, ms in bare.items()},
    }
    rows |= {"simo fit / the faster of these": min(bare.values()) / fit["ms"]}
    rows |= {
        "simo fit, ms a step": fit["ms"],
        "bare loop, ms a step": loop,
        "simo fit of one linear layer, ms": around["ms"],
    }
    return [{"quantity": name, "value": value} for name, value in rows.items()]


def bare_case(words: list[str], workers: list[int]) -> Row:
    """ms a step of forward, backward and optimizer with the sum of squares as loss, on one batch that lies on the
    device; and fed by a DataLoader that applies torchvision's crop, flip and normalisation to PIL images.
    """
    config = yaml.safe_load(Path(words[1]).read_text())
    parts = make_parts({key: config[key] for key in ("trainer", "model", "data") if key in config}, words[2:])
    module, data, precision = parts.model, parts.datamodule, parts.trainer.precision_plugin
    data.setup("fit")
    encoder = module.to(parts.trainer.strategy.root_device).encoder.train()
    optimizer, size = module.optimizer(encoder.parameters()), len(next(iter(data.train_dataloader()))[1])
    raw = torch.cat([images for images, _ in data.bank_dataloader(limit=50 * size)])

    def step(images: Tensor) -> None:
        with precision.forward_context():
            loss = encoder(images.to(module.device, memory_format=torch.channels_last)).float().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    batch = raw[:size].float().div(128).sub(1).to(module.device)
    found = {"images": size, "bare": milliseconds(lambda: step(batch), seconds=5)[0]}
    crop, flip = transforms.RandomCrop(raw.shape[-1], 2, padding_mode="reflect"), transforms.RandomHorizontalFlip()
    transform = transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])

    def stack(some: Any) -> Tensor:
        return torch.stack([transform(one) for one in some])

    pictures: Any = [transforms.ToPILImage()(image) for image in raw]
    for count in workers:
        ends = []
        options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": count}
        for images in DataLoader(pictures, size, collate_fn=stack, **options):
            step(images)
            ends.append(now())
        found[f"PIL and torchvision transforms, {count} workers"] = 1e3 * float(np.median(np.diff(ends[1:])))
    return found


def callbacks(given: argparse.Namespace) -> list[Row]:
    """Seconds in the hooks of each callback, by Lightning's SimpleProfiler, in an epoch with one validation."""
    found, _ = simo_fit(*config_words(given), "--trainer.max_epochs", "1", "--trainer.profiler", "simple")
    times: dict[str, Row] = defaultdict(lambda: {"training_s": 0.0, "validation_s": 0.0})
    for name, seconds in found["hooks"].items():
        hook = re.match(r"\[Callback\](\w+).*\.(on_\w+)$", name)
        if hook and hook[1] != "Watch":
            times[hook[1]]["validation_s" if "validation" in hook[2] else "training_s"] += seconds
    epoch = found["hooks"]["run_training_epoch"] / 100
    rows = [{"callback": name, **both, "percent_of_epoch": sum(both.values()) / epoch} for name, both in times.items()]
    return sorted(rows, key=lambda row: -row["percent_of_epoch"])


def startup(given: argparse.Namespace) -> list[Row]:
    """Seconds of fresh processes: the help, the import of what it is built on, fits up to their first step."""
    leave = ["--trainer.callbacks+", '{"class_path": "benchmarks.timing_fit.Watch", "init_args": {"leave": true}}']
    commands = {"import LightningCLI": ["-c", "from lightning.pytorch.cli import LightningCLI"]}
    commands |= {"simo --help": [*SIMO, "--help"], "simo fit --help": [*SIMO, "fit", "--help"]}
    with tempfile.TemporaryDirectory() as folder:
        fit = [*SIMO, "fit", "--run_dir", folder, *leave, "--trainer.num_sanity_val_steps", "0"]
        commands["digits, first step"] = [*fit, "--config", DIGITS]
        commands |= {} if given.quick else {"CIFAR-10, first step": [*fit, *config_words(given)]}
        costs = {
            name: [fresh(words)() for _ in range(1 if given.quick else 6)][-5:] for name, words in commands.items()
        }
    median = statistics.median
    rows = [(name, median(c.wall for c in cost), median(c.cpu for c in cost)) for name, cost in costs.items()]
    return [{"command": name, "wall_s": wall, "cpu_s": cpu} for name, wall, cpu in rows]


def memory(given: argparse.Namespace) -> list[Row]:
    """Growth of a fit on digits with everything on in every epoch (slope over the second half); embeddings that a
    validation leaves in memory, with kNN and without; peak of one epoch.
    """
    epochs, words, one = 4 if given.quick else 50, config_words(given), ["--trainer.max_epochs", "1"]
    small = ["--model.encoder.width", "0.125", "--plots.every_n_epochs", "1", "--plots.max_points", "20"]
    grown, _ = simo_fit("--config", DIGITS, "--trainer.max_epochs", str(epochs), *small)
    rows = {}
    for name, unit in (("mib", "MiB"), ("tensors", "tensors")):
        half = grown[name][epochs // 2 :]
        rows[f"growth over {epochs} epochs, {unit} an epoch"] = float(np.polyfit(np.arange(len(half)), half, 1)[0])
    short = [*words, *one, "--data.val_fraction", "0.4", "--trainer.limit_train_batches", "7"]
    short += ["--model.encoder", "benchmarks.timing_fit.OneLayer", "--model.encoder.dim", str(DIM)]
    for name, more in (("with kNN", []), ("without", ["--knn.every_n_epochs", "1000", "--best.monitor", "train/loss"])):
        found, _ = simo_fit(*short, *more)
        rows[f"embeddings kept after a validation of 0.4 of the images, {name}"] = found["kept"]
    rows["resident after the imports, MiB"] = fresh(["-c", "import simo_lightning.cli"])().mib
    rows["peak of one epoch of configs/cifar10_cpu.yaml, MiB"] = simo_fit(*words, *one)[1].mib
    return [{"quantity": name, "value": value} for name, value in rows.items()]


def scaling(given: argparse.Namespace) -> list[Row]:
    """A step of simo fit on one process and on two, one thread each; and the gather and the loss alone."""
    words, rows = [*config_words(given), *NO_VALIDATION, "--trainer.accelerator", "cpu"], []
    for world, samples in ((1, 12), (2, 6), (2, 12)):
        own = ["--trainer.strategy", "ddp" if world > 1 else "auto", "--trainer.devices", str(world)]
        own += ["--data.samples_per_class", str(samples)]
        found, _ = simo_fit(*words, *own, world=world, steps=3 if given.quick else 40)
        sizes = {"processes": world, "rows": 10 * samples * world, "dim": 16}
        rows.append({"what": "simo fit", **sizes, "step_ms": found["ms"]})
    for world in (1, 2) if given.quick else (1, 2, 4, 8):
        code = f"from benchmarks.timing_fit import gather_case; gather_case({world}, {5 if given.quick else 200})"
        rows += [json.loads(line) for line in ranks(["-c", code], world).out.splitlines() if line.startswith("{")]
    return rows


def gather_case(world: int, steps: int, rows: int = 120) -> None:
    """One process of the gather and the loss; rank 0 prints the medians."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    rank, loss, labels = int(os.environ.get("RANK", "0")), SimOLoss(form="softmax"), torch.arange(rows) % 10
    for dim in (16, 128):
        embeddings = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        times = []
        for _ in range(steps + 5):
            ends = [now()]
            gathered = gather_rows(embeddings)
            ends.append(now())
            value = loss(gathered, gather_rows(labels))
            ends.append(now())
            value.backward()
            times.append(np.diff([*ends, now()]))
        parts = dict(zip(("gather_ms", "loss_ms", "backward_ms"), 1e3 * np.median(times[5:], axis=0), strict=True))
        sizes = {"processes": world, "rows": rows * world, "dim": dim}
        if rank == 0:
            print(json.dumps({"what": "gather and loss", **sizes, **parts, "step_ms": sum(parts.values())}), flush=True)
    if world > 1:
        dist.destroy_process_group()


BENCHMARKS = [throughput, callbacks, startup, memory, scaling]
