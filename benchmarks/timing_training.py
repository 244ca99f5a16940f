"""Training speed: ``simo fit``, its step built up part by part, and the training loops of two libraries, in turns."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.transforms.multi_view_transform import MultiViewTransform
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.experiments import ROOT
from benchmarks.machine import Row, in_process, now
from benchmarks.timing_fit import CIFAR10, DIGITS, NO_VALIDATION, simo_fit
from benchmarks.train import make_parts
from simo_lightning.data import find_splits

PHOTOS = str(ROOT / "configs" / "photos_cpu.yaml")
LIBRARIES = ("lightly", "pytorch-metric-learning")


class Images(Dataset):  # type: ignore[type-arg]
    """PIL images in memory with a transform."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Any]) -> None:
        to_pil = v2.ToPILImage()
        self.images, self.labels, self.transform = [to_pil(image) for image in images], labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


class InPrecision(nn.Module):
    """An encoder in the precision and memory format of a run: what the loops of the libraries are given."""

    def __init__(self, encoder: nn.Module, precision: Any, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.encoder, self.precision, self.memory_format = encoder, precision, memory_format
        self.to(memory_format=memory_format)

    def forward(self, images: Tensor) -> Tensor:
        with self.precision.forward_context():
            embeddings: Tensor = self.encoder(images.contiguous(memory_format=self.memory_format))
        return embeddings.float()


class Training:
    """The parts of one config, and everything that trains them.

    Args:
        words: Arguments of ``simo fit``, the config first.
    """

    def __init__(self, words: list[str]) -> None:
        sys.argv = ["benchmarks"]  # LightningCLI warns of two sources of arguments
        config = yaml.safe_load(Path(words[1]).read_text())
        parts = make_parts({key: config[key] for key in ("trainer", "model", "data") if key in config}, words[2:])
        self.module, self.data = parts.model, parts.datamodule
        self.data.prepare_data()
        self.data.setup("fit")
        precision, memory_format = parts.trainer.precision_plugin, self.module.memory_format
        self.model = InPrecision(self.module.encoder, precision, memory_format).train()
        self.optimizer = self.module.optimizer(self.module.encoder.parameters())
        self.raw = next(iter(self.data.train_dataloader()))
        self.batch = self.data.prepare(self.raw, augment=True)
        self.size = len(self.batch[1])

    def step(self, batch: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        images, labels = batch
        value = loss(self.model(images), labels)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()

    def loops(self) -> dict[str, Callable[[], Iterable[None]]]:
        """Endless loops, one step an iteration; each has what the one before it has, and one part more."""

        def repeat(make_batch: Callable[[], Any], loss: Callable[[Tensor, Tensor], Tensor]) -> Iterable[None]:
            while True:
                yield self.step(make_batch(), loss)

        def epochs() -> Iterable[None]:
            while True:
                for batch in self.data.train_dataloader():
                    yield self.step(self.data.prepare(batch, augment=True), self.module.loss)

        return {
            "bare loop: encoder and optimizer": lambda: repeat(lambda: self.batch, lambda x, _: x.square().sum()),
            "with the loss": lambda: repeat(lambda: self.batch, self.module.loss),
            "with the augmentation of a batch": lambda: repeat(
                lambda: self.data.prepare(self.raw, augment=True), self.module.loss
            ),
            "with the loader": epochs,
        }

    def dataset(self, data_dir: str | None, transform: Callable[[Any], Any]) -> Any:
        """The training images for the other libraries: files in class folders, or PIL images in memory."""
        if data_dir is not None:
            return ImageFolder(str(find_splits(data_dir)["train"]), transform)
        batches = list(self.data.bank_dataloader())
        images, labels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
        return Images(images, labels, transform)

    def lightly(self, data_dir: str | None, transform: Callable[[Any], Any], workers: int) -> Iterable[None]:
        """The loop of lightly's examples with two views: as many images a step as here."""
        views = MultiViewTransform([transform, transform])
        data = LightlyDataset.from_torch_dataset(self.dataset(data_dir, views))
        loss = NTXentLoss(temperature=0.1)
        options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": workers}
        while True:
            for (first, second), _, _ in DataLoader(data, self.size // 2, persistent_workers=workers > 0, **options):
                value = loss(self.model(first), self.model(second))
                value.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                yield None

    def metric_learning(self, data_dir: str | None, transform: Callable[[Any], Any], workers: int) -> "MetricLossOnly":
        """The trainer of pytorch-metric-learning with its sampler of K images of each class."""
        data = self.dataset(data_dir, transform)
        labels = data.targets if data_dir is not None else data.labels
        sampler = MPerClassSampler(labels, self.data.samples_per_class, self.size, length_before_new_iter=10**6)
        models, optimizers = {"trunk": self.model}, {"trunk_optimizer": self.optimizer}
        options = {"sampler": sampler, "dataloader_num_workers": workers}
        return MetricLossOnly(models, optimizers, self.size, {"metric_loss": SupConLoss(0.1)}, data, **options)


def median_ms(loop: Iterable[None], seconds: float) -> float:
    """Median time of the steps of a loop in ms, without the first three."""
    ends, start = [], now()
    for _ in loop:
        ends.append(now())
        if len(ends) > 8 and ends[-1] - start > seconds:
            break
    return 1e3 * statistics.median(end - begin for begin, end in pairwise(ends[2:]))


def trainer_ms(trainer: Any, seconds: float) -> float:
    """The same of a trainer of pytorch-metric-learning."""
    ends, start = [], now()

    class Enough(Exception):
        pass

    def note(_: Any) -> None:
        ends.append(now())
        if len(ends) > 8 and ends[-1] - start > seconds:
            raise Enough

    trainer.end_of_iteration_hook = note
    trainer.iterations_per_epoch = 10**6
    with suppress(Enough):
        trainer.train()
    return 1e3 * statistics.median(end - begin for begin, end in pairwise(ends[2:]))


def loops_case(words: list[str], data_dir: str | None, seconds: float, workers: list[int]) -> Row:
    """ms a step of everything but ``simo fit``, and the number of images of a step."""
    training = Training(words)
    size, (channels, pixels) = training.size, training.batch[0].shape[1:3]
    crop: Any = (
        v2.RandomResizedCrop(pixels, scale=(0.5, 1.0)) if data_dir else v2.RandomCrop(pixels, 2, padding_mode="reflect")
    )
    flip = [v2.RandomHorizontalFlip()] if channels == 3 else []
    normalize = v2.Normalize([0.5] * channels, [0.25] * channels)
    transform = v2.Compose([crop, *flip, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalize])
    found: Row = {name: median_ms(make(), seconds) for name, make in training.loops().items()}
    for count in workers:
        lightly, other = (f"{name}, {count} workers" for name in LIBRARIES)
        found[lightly] = median_ms(training.lightly(data_dir, transform, count), seconds)
        found[other] = trainer_ms(training.metric_learning(data_dir, transform, count), seconds)
    return {"images": size, **found}


def training(given: argparse.Namespace) -> list[Row]:
    """Rounds of ``simo fit`` and all other loops in turn: on photographs, and on CIFAR-10 and digits; medians."""
    cases: dict[str, tuple[list[str], str | None]] = {}
    if given.photos_dir:
        photos = ["--config", PHOTOS, "--data.data_dir", given.photos_dir, "--data.image_size", "128"]
        cases["photographs, 128 pixels"] = (photos, given.photos_dir)
    if given.data_dir:
        cases["CIFAR-10"] = (["--config", CIFAR10, "--data.data_dir", given.data_dir], None)
        cases["digits"] = (["--config", DIGITS], None)
    if given.quick:
        cases["digits"] = (["--config", DIGITS], None)
    rows, rounds, seconds = [], 1 if given.quick else 3, 0.5 if given.quick else 5.0
    for name, (words, folder) in cases.items():
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            start = time.perf_counter()
            fit = simo_fit(*words, *NO_VALIDATION, steps=5 if given.quick else 100)["ms"]
            other = in_process(loops_case, words=words, data_dir=folder, seconds=seconds, workers=[0, 2])
            print(f"{name}: a round in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            size = other.pop("images")
            for what, ms in {**other, "simo fit": fit}.items():
                times.setdefault(what, []).append(ms)
        bare = times["bare loop: encoder and optimizer"]
        for what, values in times.items():
            ratios = [one / ms for one, ms in zip(bare, values, strict=True)]
            rates = [1e3 * size / ms for ms in values]
            rows.append({
                "data": name, "loop": what, "ms a step": statistics.median(values),
                "images/s": statistics.median(rates), "share of the bare loop": statistics.median(ratios),
                "lowest": min(ratios), "highest": max(ratios), "rounds": rounds,
            })  # fmt: skip
    return rows
