"""Time and memory of ``simo fit``: each fit is the command itself in a process of its own."""

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
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
from benchmarks.machine import Row, in_process, memory_mib, milliseconds, now
from benchmarks.scaling_model import CASES
from benchmarks.train import make_parts
from simo_lightning import SimOLoss

DIGITS, CIFAR10 = str(ROOT / "configs" / "digits.yaml"), str(ROOT / "configs" / "cifar10_cpu.yaml")
SIMO = str(Path(sys.executable).with_name("simo"))
NO_VALIDATION = ["--trainer.limit_val_batches", "0", "--best.monitor", "train/loss", "--trainer.max_epochs", "100"]
ALL_CLASSES = (1024, 128, 512, 512)  # n, D, C, P of a batch whose classes do not grow with the number of processes
DIM = 13  # size of the embeddings that Watch counts: no other tensor has as many columns


class OneLayer(nn.Sequential):
    """An encoder of negligible cost: a step then takes the time of everything else."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__(nn.Flatten(), nn.AdaptiveAvgPool1d(64), nn.Linear(64, dim))


class ExitAfterFirstStep(pl.Callback):
    """Ends the process after its first training step."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)


class Watch(pl.Callback):
    """Prints at the end of a fit: median step in ms, seconds in hooks (of the trainer's SimpleProfiler), memory and
    tensors after each epoch, peak memory, and the largest number of embeddings in memory during a validation.

    Args:
        steps: Ends the fit after this number of steps; 0: after its own length.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps, self.kept = steps, 0
        self.ends: list[float] = []
        self.mib: list[float] = []
        self.tensors: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.ends.append(now())
        trainer.should_stop = 0 < self.steps < len(self.ends) - 5

    def on_validation_batch_end(self, *_: Any) -> None:
        shapes = {value.data_ptr(): value.shape for value in _tensors()}.values()  # a view counts once
        self.kept = max(self.kept, sum(shape[0] for shape in shapes if len(shape) == 2 and shape[1] == DIM))

    def on_train_epoch_end(self, *_: Any) -> None:
        self.tensors.append(len(_tensors()))
        self.mib.append(memory_mib("VmRSS"))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            hooks = {name: sum(times) for name, times in getattr(trainer.profiler, "recorded_durations", {}).items()}
            steps = np.diff(self.ends[5:]) if len(self.ends) > 6 else [0.0]  # the first ones warm up
            found = {"ms": 1e3 * float(np.median(steps)), "hooks": hooks, "kept": self.kept, "mib": self.mib}
            print("\n" + json.dumps({**found, "tensors": self.tensors, "peak_mib": memory_mib()}), flush=True)


def _tensors() -> list[Tensor]:
    gc.collect()
    return [value for value in gc.get_objects() if issubclass(type(value), Tensor)]


def python(words: list[str], world: int = 1) -> str:
    """What ``python words`` prints in a process of its own, or in ``world`` processes of torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path} | ({"OMP_NUM_THREADS": "1"} if world > 1 else {})
    command = [sys.executable, *launch, *words]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def seconds(words: list[str], repeats: int) -> tuple[float, float]:
    """Median wall and CPU seconds of ``python words``; with several repeats the first warms the caches."""
    costs = []
    for _ in range(repeats):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        python(words)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    walls, cpus = zip(*costs[-5:], strict=True)
    return statistics.median(walls), statistics.median(cpus)


def config_words(given: argparse.Namespace) -> list[str]:
    """Digits with --quick, else CIFAR-10."""
    return ["--config", DIGITS] if given.quick else ["--config", CIFAR10, "--data.data_dir", given.data_dir]


def simo_fit(*words: str, world: int = 1, steps: int = 0) -> Row:
    """``simo fit`` in fresh processes; returns what the first one's Watch printed."""
    callback = json.dumps({"class_path": "benchmarks.timing_fit.Watch", "init_args": {"steps": steps}})
    with tempfile.TemporaryDirectory() as folder:
        own = ["--run_dir", folder, "--trainer.num_sanity_val_steps", "0", "--trainer.callbacks+", callback]
        printed = python([SIMO, "fit", *words, *own], world)
    found: Row = json.loads(next(line for line in printed.splitlines() if line.startswith('{"ms"')))
    return found


def throughput(given: argparse.Namespace) -> list[Row]:
    """simo fit without validation; a bare loop of the same encoder and optimizer; that loop fed by a DataLoader."""
    words, steps = config_words(given), 5 if given.quick else 300
    fit = simo_fit(*words, *NO_VALIDATION, steps=steps)["ms"]
    one_layer = simo_fit(*words, *NO_VALIDATION, "--model.encoder", "benchmarks.timing_fit.OneLayer", steps=steps)["ms"]
    fed = in_process(bare_case, words=words, workers=sorted({0, 1 if given.quick else os.cpu_count()}))
    size, bare = fed.pop("images"), fed.pop("bare")
    rows = {"simo fit, images per second": 1e3 * size / fit, "bare loop, images per second": 1e3 * size / bare}
    rows |= {"simo fit / bare loop": bare / fit, **{f"{name} / bare loop": bare / ms for name, ms in fed.items()}}
    rows |= {"simo fit / the faster of these": min(fed.values()) / fit}
    rows |= {"simo fit, ms a step": fit, "bare loop, ms a step": bare, "simo fit of one linear layer, ms": one_layer}
    return [{"quantity": name, "value": value} for name, value in rows.items()]


def bare_case(words: list[str], workers: list[int]) -> Row:
    """ms a step of forward, backward and optimizer with the sum of squares as loss, on one batch that lies on the
    device; and fed by a DataLoader that applies torchvision's crop, flip and normalisation to PIL images.
    """
    sys.argv = ["benchmarks"]  # LightningCLI warns of two sources of arguments
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
    hooks = simo_fit(*config_words(given), "--trainer.max_epochs", "1", "--trainer.profiler", "simple")["hooks"]
    times: dict[str, Row] = defaultdict(lambda: {"training_s": 0.0, "validation_s": 0.0})
    for name, taken in hooks.items():
        hook = re.match(r"\[Callback\](\w+).*\.(on_\w+)$", name)
        if hook and hook[1] != "Watch":
            times[hook[1]]["validation_s" if "validation" in hook[2] else "training_s"] += taken
    epoch = hooks["run_training_epoch"] / 100
    rows = [{"callback": name, **both, "percent_of_epoch": sum(both.values()) / epoch} for name, both in times.items()]
    return sorted(rows, key=lambda row: -row["percent_of_epoch"])


def startup(given: argparse.Namespace) -> list[Row]:
    """Seconds of fresh processes: the help, the import of Lightning's command line, fits up to their first step."""
    commands = {"import LightningCLI": ["-c", "from lightning.pytorch.cli import LightningCLI"]}
    commands |= {"simo --help": [SIMO, "--help"], "simo fit --help": [SIMO, "fit", "--help"]}
    with tempfile.TemporaryDirectory() as folder:
        fit = [SIMO, "fit", "--run_dir", folder, "--trainer.num_sanity_val_steps", "0"]
        fit += ["--trainer.callbacks+", "benchmarks.timing_fit.ExitAfterFirstStep"]
        commands["digits, first step"] = [*fit, "--config", DIGITS]
        commands |= {} if given.quick else {"CIFAR-10, first step": [*fit, *config_words(given)]}
        costs = {name: seconds(words, repeats=1 if given.quick else 6) for name, words in commands.items()}
    return [{"command": name, "wall_s": wall, "cpu_s": cpu} for name, (wall, cpu) in costs.items()]


def memory(given: argparse.Namespace) -> list[Row]:
    """Growth of a fit on digits with all callbacks in every epoch (slope over the second half); embeddings in memory
    during a validation, with kNN and without; peak of one epoch.
    """
    epochs, words, one = 4 if given.quick else 50, config_words(given), ["--trainer.max_epochs", "1"]
    small = ["--model.encoder.width", "0.125", "--plots.every_n_epochs", "1", "--plots.max_points", "20"]
    grown = simo_fit("--config", DIGITS, "--trainer.max_epochs", str(epochs), *small)
    rows = {}
    for name, unit in (("mib", "MiB"), ("tensors", "tensors")):
        half = grown[name][epochs // 2 :]
        rows[f"growth over {epochs} epochs, {unit} an epoch"] = float(np.polyfit(np.arange(len(half)), half, 1)[0])
    short = [*words, *one, "--data.val_fraction", "0.4", "--trainer.limit_train_batches", "7"]
    short += ["--model.encoder", "benchmarks.timing_fit.OneLayer", "--model.encoder.dim", str(DIM)]
    for name, more in (("with kNN", []), ("without", ["--knn.every_n_epochs", "1000", "--best.monitor", "train/loss"])):
        kept = simo_fit(*short, *more)["kept"]
        rows[f"embeddings kept after a validation of 0.4 of the images, {name}"] = kept
    code = "import simo_lightning.cli; from benchmarks.machine import memory_mib; print(memory_mib())"
    rows["resident after the imports, MiB"] = float(python(["-c", code]))
    rows["peak of one epoch, MiB"] = simo_fit(*words, *one)["peak_mib"]
    return [{"quantity": name, "value": value} for name, value in rows.items()]


def scaling(given: argparse.Namespace) -> list[Row]:
    """A step of simo fit on one process and on two, one thread each; and the loss alone, by both ways to reduce it."""
    words, rows = [*config_words(given), *NO_VALIDATION, "--trainer.accelerator", "cpu"], []
    for world, samples in ((1, 12), (2, 6), (2, 12)):
        own = ["--trainer.strategy", "ddp" if world > 1 else "auto", "--trainer.devices", str(world)]
        own += ["--data.samples_per_class", str(samples)]
        found = simo_fit(*words, *own, world=world, steps=3 if given.quick else 40)
        sizes = {"processes": world, "rows": 10 * samples * world, "dim": 16}
        rows.append({"what": "simo fit", **sizes, "step_ms": found["ms"]})
    for world in (1, 2) if given.quick else (1, 2, 4, 8):
        rows += loss_over_ranks(world, steps=5 if given.quick else 100)
    return rows


def loss_over_ranks(world: int, steps: int) -> list[Row]:
    """Median times of the loss of ``world`` processes, by the embeddings of all and by sums over each class."""
    printed = python(["-m", "benchmarks.timing_fit", str(steps)], world)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def loss_over_ranks_case(steps: int) -> None:
    """One process of the loss; rank 0 prints the medians.

    ``step_ms`` is the wall time of forward and backward pass. ``own_ms`` is the CPU time of the thread that computes,
    without the waiting for a core and for other processes, which two cores cannot avoid with eight of them. ``kb`` is
    what this process hands to collectives. With ``reduce`` "none" every process computes the loss of its own embeddings
    alone, at the same time as the others: what more processes per core cost by themselves (cold caches).
    """
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        dist.init_process_group("gloo")
    for rows, dim, classes, own in (*CASES, ALL_CLASSES):
        labels = ((rank * own + torch.arange(rows) % own) % classes).sort().values
        embeddings = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        for reduce in ("none", "gather", "sums"):
            loss, times, sent = SimOLoss(form="softmax"), [], 0
            for _ in range(steps + 5):
                if world > 1:
                    dist.barrier()
                with SentBytes() as counter:
                    start, own_start = now(), time.thread_time()
                    terms = loss.terms if reduce == "none" else partial(loss.terms_over_ranks, reduce=reduce)
                    sum(terms(embeddings, labels).values()).backward()
                    times.append((now() - start, time.thread_time() - own_start))
                sent = counter.bytes
            step, own_time = 1e3 * np.median(times[5:], axis=0)
            sizes = {"processes": world, "rows": rows * world, "dim": dim, "classes": min(classes, world * own)}
            row = {"what": "loss", "reduce": reduce, **sizes, "step_ms": step, "own_ms": own_time, "kb": sent / 1e3}
            if rank == 0:
                print(json.dumps(row), flush=True)
    if world > 1:
        dist.destroy_process_group()


class SentBytes:
    """Counts the bytes of the tensors that this process hands to collectives."""

    def __enter__(self) -> "SentBytes":
        self.bytes, self.originals = 0, (dist.all_reduce, dist.all_gather)
        reduce, gather = self.originals

        def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.nbytes
            return reduce(tensor, *args, **kwargs)

        def all_gather(parts: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.nbytes
            return gather(parts, tensor, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce, dist.all_gather = self.originals


BENCHMARKS = [throughput, callbacks, startup, memory, scaling]

if __name__ == "__main__":
    loss_over_ranks_case(int(sys.argv[1]))
