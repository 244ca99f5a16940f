"""Streaming: images a second against litdata's own loader, and peak memory with four times as many images."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import Row, in_process, memory_mib
from benchmarks.timing_embed import as_the_command, cpu_seconds
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.streaming import Record, StreamPairDataModule, write_stream

FILES = 400  # generated; the others repeat them
CLASSES, P, K = 100, 25, 16


def make_stream(folder: Path, pixels: int, images: int, chunk_bytes: int) -> None:
    """A stream of smooth JPEG images of 100 classes."""
    random = np.random.default_rng(0)
    (folder / "files").mkdir(parents=True)
    for number in range(FILES):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((pixels, pixels), Image.Resampling.BICUBIC).save(folder / "files" / f"{number}.jpg", quality=90)
    records = (Record(f"{number % FILES}.jpg", number % CLASSES) for number in range(images))
    names = [f"class {number}" for number in range(CLASSES)]
    write_stream(records, names, folder / "stream", folder / "files", chunk_bytes=chunk_bytes, workers=2, check=False)


def data_module(folder: Path, pixels: int, workers: int) -> StreamPairDataModule:
    """Without augmentation, as litdata's loader."""
    data = StreamPairDataModule(
        folder / "stream", classes_per_batch=P, samples_per_class=K, image_size=pixels, num_workers=workers,
        augment=None, mean=[0.5] * 3, std=[0.25] * 3,
    )  # fmt: skip
    data.setup("fit")
    return data


class _Decoded(litdata.StreamingDataset):  # type: ignore[misc]
    """litdata's own order, our decoder."""

    preprocessing: Preprocessing

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:
        from io import BytesIO

        image, label, _ = super().__getitem__(index)
        return torch.from_numpy(self.preprocessing.read(BytesIO(image))[0].copy()), label


def epoch(loader: Any) -> tuple[int, float, float]:
    """Images, seconds and CPU seconds of an epoch, workers included."""
    cpu, start, images = cpu_seconds(), time.perf_counter(), 0
    for batch in loader:
        images += len(batch[0])
    seconds = time.perf_counter() - start
    del loader, batch  # ends the workers, whose time counts from then on
    return images, seconds, cpu_seconds() - cpu


def speed_case(pixels: int, images: int, workers: int, rounds: int) -> Row:
    """Epochs in turn, each with new workers: ours, and litdata's StreamingDataset with its StreamingDataLoader."""
    as_the_command()
    found: dict[str, list[tuple[int, float, float]]] = {"ours": [], "litdata": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_stream(folder, pixels, images, 4 * 2**20)

        def ours() -> Any:
            return data_module(folder, pixels, workers).train_dataloader()

        def theirs() -> Any:
            dataset = _Decoded(str(folder / "stream" / "train"), shuffle=True, drop_last=True)
            dataset.preprocessing = Preprocessing(pixels)
            return litdata.StreamingDataLoader(dataset, batch_size=P * K, num_workers=workers)

        for number in range(rounds):
            for loader in (ours, theirs) if number % 2 else (theirs, ours):
                found["ours" if loader is ours else "litdata"].append(epoch(loader()))
    rate = {name: [images / seconds for images, seconds, _ in runs] for name, runs in found.items()}
    cpu = {name: [1e6 * used / images for images, _, used in runs] for name, runs in found.items()}
    ratios = [mine / other for mine, other in zip(rate["ours"], rate["litdata"], strict=True)]
    spent = [other / mine for mine, other in zip(cpu["ours"], cpu["litdata"], strict=True)]
    return {
        "case": "speed", "pixels": pixels, "images": images, "workers": workers, "rounds": rounds,
        "images/s": statistics.median(rate["ours"]), "litdata, images/s": statistics.median(rate["litdata"]),
        "ratio": statistics.median(ratios), "CPU us": statistics.median(cpu["ours"]),
        "litdata, CPU us": statistics.median(cpu["litdata"]), "CPU: litdata / ours": statistics.median(spent),
    }  # fmt: skip


def make_case(folder: str, images: int) -> None:
    """The stream of ``memory_case``."""
    make_stream(Path(folder), 16, images, 8 * 2**20)


def memory_case(folder: str, images: int) -> Row:
    """Peak memory of one process that sets up the data, draws the order and reads one epoch."""
    torch.set_num_threads(1)
    before, start = memory_mib("VmRSS"), time.process_time()
    data = data_module(Path(folder), 16, 0)
    loader = data.train_dataloader()
    used = np.zeros(images // (P * K) + 1, dtype=np.int64)
    for number, (_, labels, _) in enumerate(loader):
        used[number] = len(labels)
    return {
        "case": "memory", "pixels": 16, "images": int(used.sum()), "workers": 0, "before_mib": before,
        "peak_mib": memory_mib(), "CPU us": 1e6 * (time.process_time() - start) / used.sum(),
    }  # fmt: skip


def stream(given: argparse.Namespace) -> list[Row]:
    """Speed on images of 32 and 256 pixels; memory of 300,000 and 1,200,000 images of 16 pixels."""
    rounds = 2 if given.quick else 3
    cases = [(32, 2000, 1)] if given.quick else [(32, 40_000, 0), (32, 40_000, 2), (256, 4000, 0), (256, 4000, 2)]
    rows = [in_process(speed_case, pixels=p, images=n, workers=w, rounds=rounds) for p, n, w in cases]
    for images in (2000, 8000) if given.quick else (300_000, 1_200_000):
        with tempfile.TemporaryDirectory() as folder:
            in_process(make_case, folder=folder, images=images)
            rows.append(in_process(memory_case, folder=folder, images=images))
    return rows
