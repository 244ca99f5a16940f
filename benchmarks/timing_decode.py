"""Reading and augmenting photographs: PhotoAugment in our loader, and torchvision's transforms on its ImageFolder."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.machine import Row
from simo_lightning.data import ImageFolderPairDataModule, PhotoAugment, find_splits


def make_photographs(folder: Path, count: int, width: int, height: int, classes: int = 4) -> None:
    """JPEG files of smooth colours with fine noise, at a quality of 90: 12 megapixels take about 4 MB."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (pixels + random.integers(-6, 7, pixels.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        (folder / str(number % classes)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(folder / str(number % classes) / f"{number:04}.jpg", quality=90)


def images_per_second(loader: Iterable[Any]) -> tuple[float, int]:
    """Images that an epoch of a loader yields in a second, and their number."""
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch[0])
    return images / (time.perf_counter() - start), images


def decode_case(folder: str, size: int, policy: str | None, workers: int, batch: int, rounds: int) -> Row:
    """Paired epochs in turn, after one of each to warm up: random resized crop, flip and a policy, to uint8 tensors.

    The images stay on disk. Both loaders keep their workers from epoch to epoch.
    """
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip()]
    if policy == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    theirs = DataLoader(
        ImageFolder(folder, v2.Compose([*steps, v2.PILToTensor()])), batch, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip
    classes = min(len(theirs.dataset.classes), batch // 2)  # type: ignore[attr-defined]
    data = ImageFolderPairDataModule(
        folder, image_size=size, augment=PhotoAugment(policy=policy), num_workers=workers, max_memory_gib=0.0,  # type: ignore[arg-type]
        classes_per_batch=classes, samples_per_class=batch // classes, val_fraction=0.0, mean=[0.5] * 3, std=[0.25] * 3,
    )  # fmt: skip
    data.setup("fit")
    loaders = {"simo_lightning": data.train_dataloader(), "torchvision": theirs}
    images = {name: images_per_second(loader)[1] for name, loader in loaders.items()}
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name in list(loaders)[:: 1 if number % 2 else -1]:
            found[name].append(images_per_second(loaders[name])[0])
    ratios = [ours / other for ours, other in zip(*found.values(), strict=True)]
    rates = {f"{name}, images/s": statistics.median(values) for name, values in found.items()}
    spread = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "rounds": rounds}
    case = {"pixels": size, "policy": policy or "none", "workers": workers, "images": images["simo_lightning"]}
    return {**case, **rates, **spread}


def decode(given: argparse.Namespace) -> list[Row]:
    """Images a second and their ratio, on the photographs of --data.data_dir and on generated ones of 12 megapixels."""
    rows, rounds, workers = [], 2 if given.quick else 9, min(16, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as large:
        width, height, count = (400, 300, 16) if given.quick else (4000, 3000, 64)
        make_photographs(Path(large), count, width, height)
        cases = [(f"generated, {width} x {height}", large, 224, 8)]
        if given.data_dir and not given.quick:
            folder = str(find_splits(given.data_dir)["train"])
            cases += [(Path(given.data_dir).name, folder, size, 128) for size in (128, 224)]
        for data, folder, size, batch in cases:
            for policy in (None, "trivial"):
                words: Row = {"size": size, "policy": policy, "workers": workers, "batch": batch, "rounds": rounds}
                rows.append({"data": data, **decode_case(folder, **words)})
    return rows
