"""Images per second of ``simo fit`` against the bare loop, and against the ordinary way to feed one.

    python -m benchmarks.throughput [--data.data_dir DIR] [--config FILE] [--json FILE] [words of simo fit]

All run in one process, in blocks of some steps that take turns; a ratio is the median over neighbouring blocks.

- simo fit: the command itself with its config, validation left out: batches from memory, augmentation, encoder, loss,
  optimizer and schedule, logging, progress bar and callbacks.
- bare loop: a copy of the encoder, the same precision, threads and optimizer; forward, backward and step on one batch
  that lies on the device, the sum of squares as loss.
- ordinary way: the bare loop's step, fed by a DataLoader that applies torchvision's transforms to PIL images one by
  one (crop, flip, tensor, normalisation), in the main process and by as many workers as there are cores.
- around the encoder: simo fit less the bare loop, in milliseconds a step, with an encoder of one linear layer.

Words that it does not know go to ``simo fit``: ``--trainer.accelerator gpu --model.compile true`` on a GPU, where
``channels_last`` and bfloat16 are the config's already.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import CPU_CONFIG, about, data_words, write_json
from benchmarks.turns import TakeTurns, seconds
from simo_lightning.cli import main as simo


class OneLayer(nn.Module):
    """An encoder that costs next to nothing, so that a step's time is what stands around the encoder.

    Args:
        dim: D.
    """

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of images ``(N, 3, 32, 32)``."""
        embeddings: Tensor = self.linear(images.flatten(1))
        return embeddings


class Pictures(Dataset):
    """PIL images with torchvision's transforms, one at a time.

    Args:
        images: uint8 ``(N, C, H, W)``.
        transform: From a PIL image to a float tensor.
    """

    def __init__(self, images: Tensor, transform: Callable[[Any], Tensor]) -> None:
        to_image = transforms.ToPILImage()
        self.images, self.transform = [to_image(image) for image in images], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def take_turns(options: argparse.Namespace, words: list[str]) -> tuple[TakeTurns, Any]:
    """Run ``simo fit`` and the bare loop by turns; also gives the data module."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        simo([
            *("fit", "--config", str(options.config), *data_words(options.data_dir, options.images)),
            *("--run_dir", folder, "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "1000", *words),
            *("--best.monitor", "train/loss", "--trainer.callbacks+", "benchmarks.turns.TakeTurns"),
            *("--trainer.callbacks.steps", str(options.steps), "--trainer.callbacks.repeats", str(options.repeats)),
        ])  # fmt: skip
    return TakeTurns.latest, TakeTurns.latest.datamodule


def ordinary_ratios(turns: TakeTurns, data: Any, workers: int, repeats: int) -> list[float]:
    """Speed of the bare loop fed the ordinary way over that of the bare loop on one batch, block by block."""
    loop, images = turns.loop, turns.images
    assert loop is not None
    size = len(images)
    # more than are timed: the workers read ahead to the end
    raw = torch.cat([part for part, _ in data.bank_dataloader(limit=(turns.steps + 20) * size)])
    crop = transforms.RandomCrop(images.shape[-1], data.augment.crop_padding, padding_mode="reflect")
    flip, normalize = transforms.RandomHorizontalFlip(), transforms.Normalize(data.mean, data.std)
    pictures = Pictures(raw, transforms.Compose([crop, flip, transforms.ToTensor(), normalize]))

    def feed(batches: Any) -> Callable[[], None]:
        layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
        return lambda: loop.step(next(batches).to(images.device, memory_format=layout or torch.contiguous_format))

    ratios = []
    for _ in range(repeats):
        step = feed(iter(DataLoader(pictures, size, shuffle=True, drop_last=True, num_workers=workers)))
        seconds(3, step)  # until the workers are at work
        fed = seconds(turns.steps, step)
        del step  # ends the workers: they would slow the bare loop
        ratios.append(float(seconds(turns.steps, lambda: loop.step(images))[0] / fed[0]))
    return ratios


def measure(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """All of it."""
    around, _ = take_turns(options, [*words, "--model.encoder", "benchmarks.throughput.OneLayer"])
    turns, data = take_turns(options, words)
    ratios, steps = turns.ratios, turns.milliseconds()
    wall, cpu = ratios.median(dim=0).values.tolist()
    workers = {count: ordinary_ratios(turns, data, count, options.repeats // 2) for count in {0, options.workers}}
    ordinary = {count: statistics.median(found) for count, found in workers.items()}
    return {
        "ratio_to_bare_loop": wall,
        "ratio_to_bare_loop_cpu_time": cpu,
        "ratio_to_ordinary_way": wall / max(ordinary.values()),
        "images_per_second": 1e3 * len(turns.images) / steps["fit"][0],
        "images_per_second_bare": 1e3 * len(turns.images) / steps["bare"][0],
        "ordinary_way_to_bare_loop": {f"{count} workers": ratio for count, ratio in ordinary.items()},
        "milliseconds_around_encoder": {
            clock: fit - bare for clock, fit, bare in zip(("wall", "cpu"), *around.milliseconds().values(), strict=True)
        },
        "milliseconds_of_step": {name: dict(zip(("wall", "cpu"), both, strict=True)) for name, both in steps.items()},
        "ratios": ratios[:, 0].tolist(),
        "batch_size": len(turns.images),
        "device": str(turns.images.device),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=CPU_CONFIG, help="of simo fit")
    parser.add_argument("--data.data_dir", dest="data_dir", type=Path, help="CIFAR-10; default: noise of its shape")
    parser.add_argument("--images", type=int, default=50_000, help="of the noise")
    parser.add_argument("--steps", type=int, default=25, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=12, help="blocks")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the ordinary way")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options, words = parser.parse_known_args()
    result = measure(options, words)
    for name, value in result.items():
        print(f"{name:<30}", value)
    write_json(options.json, {**about(), **result})


if __name__ == "__main__":
    main()
