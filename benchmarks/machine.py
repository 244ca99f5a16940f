"""What the benchmarks share: on which machine and versions a number was measured, and images when there are none."""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes.run import PACKAGES, commit, hardware
from simo_lightning import PairDataModule
from simo_lightning.data import LabelledImages

ROOT = Path(__file__).resolve().parents[1]
CPU_CONFIG = ROOT / "configs" / "cifar10_cpu.yaml"


class SyntheticPairDataModule(PairDataModule):
    """Noise of CIFAR-10's shape: speed does not depend on what is in the pictures.

    Args:
        images: Of the training split; the test split has a fifth of it.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(self, images: int = 50_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.images = images

    def load(self, split: str) -> LabelledImages | None:
        """Uniform noise, the same for every run."""
        if split == "val":
            return None
        count = self.images if split == "train" else self.images // 5
        generator = torch.Generator().manual_seed(count)
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return LabelledImages(pixels, torch.arange(count) % 10, [str(label) for label in range(10)])


def data_words(folder: Path | None, images: int = 50_000) -> list[str]:
    """Words of the simo command that choose the images.

    Args:
        folder: CIFAR-10's; None: noise of its shape.
        images: Of the noise.

    Returns:
        To be appended to ``simo fit --config ...``.
    """
    if folder is not None:
        return ["--data.data_dir", str(folder)]
    return ["--data", "benchmarks.machine.SyntheticPairDataModule", "--data.images", str(images)]


def about() -> dict[str, Any]:
    """Processor, cores, GPU, threads, load of the last minute, versions, commit and the command's words."""
    words = [word for word in sys.argv[1:] if not word.startswith("/")]  # where data lies is the machine's affair
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the numbers, where a file was asked for.

    Args:
        path: File; None writes nothing.
        result: What the file holds.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
