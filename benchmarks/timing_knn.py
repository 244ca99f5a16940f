"""Time and memory of the nearest neighbours of many queries, and the share of validation in a fit."""

import argparse
import json
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.machine import Row, in_process, memory_mib
from benchmarks.timing_fit import DIGITS, SIMO, config_words, python
from simo_lightning import PairDataModule
from simo_lightning.data.sources import ImageSource, LabelledImages, Split
from simo_lightning.functional.knn import class_tie
from simo_lightning.functional.neighbors import largest_keys

K, CLASSES = 20, 1000


def search_case(what: str, queries: int, bank: int, dim: int) -> Row:
    """The 20 nearest of each query: by ``ours``, by ``faiss`` (flat index), or the ``product`` alone, without them.

    Seconds include what each does with the bank before: the index of faiss, and lengths of 1. The peak is that of the
    process minus what it holds before.
    """
    generator = torch.Generator().manual_seed(0)
    asked, stored = (torch.randn(rows, dim, generator=generator) for rows in (queries, bank))
    labels, before = torch.arange(bank) % CLASSES, memory_mib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "ours":
        largest_keys(asked, stored, K, class_tie(labels, CLASSES), CLASSES)
    elif what == "faiss":
        _faiss(asked, stored)
    else:
        _product(asked, stored)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rate = 2e-9 * queries * bank * dim / wall
    sizes = {"queries": queries, "bank": bank, "dim": dim, "k": K}
    grown = memory_mib() - before
    return {"search": what, **sizes, "seconds": wall, "cpu_seconds": cpu, "gflop_per_s": rate, "peak_mib": grown}


def _faiss(asked: Tensor, stored: Tensor) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(stored.shape[1])
    index.add(torch.nn.functional.normalize(stored).numpy())
    index.search(torch.nn.functional.normalize(asked).numpy(), K)


def _product(asked: Tensor, stored: Tensor) -> None:
    """The floor: all products, in tiles that stay in the cache."""
    tile = torch.empty(4096, 512)
    for rows in stored.split(4096):
        for columns in asked.split(512):
            torch.mm(rows, columns.mT, out=tile.view(-1)[: len(rows) * len(columns)].view(len(rows), len(columns)))


def knn(given: argparse.Namespace) -> list[Row]:
    """Ours, faiss and the product in turns, each in a process of its own: three rounds, of 50,000 queries one."""
    queries = 50_000 if given.full else given.queries
    sizes = {"queries": 512, "bank": 20_000, "dim": 32} if given.quick else {"bank": given.bank, "dim": given.dim}
    sizes = {"queries": queries, **sizes}
    rounds = 1 if given.full or given.quick else 3
    return [
        {"round": number, **in_process(search_case, what=what, **sizes)}
        for number in range(rounds)
        for what in ("ours", "faiss", "product")
    ]


class ValidationShare(pl.Callback):
    """Prints at the end of a fit the CPU seconds of its epochs and of the validations within."""

    def __init__(self) -> None:
        self.seconds = {"fit": 0.0, "validation": 0.0}
        self._start: dict[str, float] = {}

    def on_train_start(self, *_: Any) -> None:
        self._start["fit"] = time.process_time()

    def on_validation_start(self, *_: Any) -> None:
        self._start["validation"] = time.process_time()

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seconds["validation"] += time.process_time() - self._start["validation"]

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seconds["fit"] = time.process_time() - self._start["fit"]
        print("\n" + json.dumps(self.seconds), flush=True)


class ManyImages(PairDataModule):
    """200,000 random images of 8 x 8 of ten classes, of which a tenth is validation."""

    def load(self, split: Split) -> ImageSource | None:
        """The training images."""
        if split != "train":
            return None
        images = torch.randint(256, (200_000, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(len(images)) % 10
        return LabelledImages(images, labels, [str(label) for label in range(10)])


def validation(given: argparse.Namespace) -> list[Row]:
    """Share of validation in a fit with the default callbacks of the command."""
    tiny = ["--config", DIGITS, "--data", "benchmarks.timing_knn.ManyImages"]
    tiny += ["--model.encoder", "benchmarks.timing_fit.OneLayer"]
    cases = {"digits, 5 epochs": ["--config", DIGITS, "--trainer.max_epochs", "5"]}
    if not given.quick:
        cases |= {
            "CIFAR-10, 1 epoch": [*config_words(given), "--trainer.max_epochs", "1"],
            "CIFAR-10, 1 epoch, bank_size auto": [
                *config_words(given),
                *["--trainer.max_epochs", "1", "--knn.bank_size", "auto"],
            ],
            "200,000 images, one linear layer, 2 epochs": [*tiny, "--trainer.max_epochs", "2"],
        }
    return [{"fit": name, **validation_case(words)} for name, words in cases.items()]


def validation_case(words: list[str]) -> Row:
    """CPU seconds of a fit and of its validations."""
    callback = json.dumps({"class_path": "benchmarks.timing_knn.ValidationShare"})
    with tempfile.TemporaryDirectory() as folder:
        printed = python([SIMO, "fit", *words, "--run_dir", folder, "--trainer.callbacks+", callback])
    found = json.loads(next(line for line in printed.splitlines() if line.startswith('{"fit"')))
    shares = {f"{name}_cpu_seconds": value for name, value in found.items()}
    return {**shares, "validation_percent": 100 * found["validation"] / found["fit"]}
