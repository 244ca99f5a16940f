"""simo embed on generated images: images a second against bare loops, peak memory, and a second start after a kill."""

import argparse
import csv
import hashlib
import multiprocessing as mp
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import Row, in_process, memory_mib
from benchmarks.timing_decode import make_photographs
from simo_lightning import Embedder, ImageEncoder, Preprocessing, SimOModule
from simo_lightning.checkpoints import TrainingClasses
from simo_lightning.data.loader import keep_batch
from simo_lightning.embed_files import EmbeddedFiles, embed_files

FILES = 64  # generated; the others are hard links to them
BATCH = 64


def make_checkpoint(path: Path, size: int) -> None:
    """A small untrained encoder with ten classes."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(size, mean=(0.5,) * 3, std=(0.25,) * 3)
    module = SimOModule(ImageEncoder("resnet10", width=0.125, image_size=size), preprocessing=preprocessing)
    module.classes = TrainingClasses([f"class {number}" for number in range(10)], torch.randn(10, 16))
    module._step_of_class_means = 0
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def make_links(folder: Path, sources: list[Path], count: int) -> None:
    """A folder tree of ``count`` hard links, 1,000 in a folder."""
    for number in range(count):
        if number % 1000 == 0:
            inside = folder / f"{number // 1000:04}"
            inside.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % len(sources)], inside / f"{number:07}.jpg")


class _Plain(Dataset[Tensor]):
    """Reads files, no more."""

    def __init__(self, paths: list[str], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> Tensor:
        pixels = np.empty((len(indices), 3, *self.preprocessing.size), dtype=np.uint8)
        for place, index in enumerate(indices):
            pixels[place] = self.preprocessing.read(self.paths[index])[0]
        return torch.from_numpy(pixels)


def as_the_command() -> None:
    """Workers are forked; one thread, since two on a busy machine wait for each other."""
    if sys.platform == "linux":
        mp.set_start_method("fork", force=True)
    torch.set_num_threads(1)


def cpu_seconds() -> float:
    """CPU time of this process and of its workers that have ended; other processes of the machine hardly change it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(name: str, images: int, work: Callable[[], Any]) -> Row:
    """Images a second, and microseconds of CPU time per image."""
    start, cpu = time.perf_counter(), cpu_seconds()
    work()
    rate = images / (time.perf_counter() - start)
    return {name: rate, f"{name} CPU us": 1e6 * (cpu_seconds() - cpu) / images}


def floor_case(checkpoint: str, sources: list[str], images: int, workers: int) -> Row:
    """The encoder alone on tensors in memory, reading alone, and a loop of both that keeps no result."""
    as_the_command()
    embedder = Embedder.load(checkpoint, device="cpu")
    paths = [sources[number % len(sources)] for number in range(images)]
    loader = DataLoader(_Plain(paths, embedder.preprocessing), BATCH, num_workers=workers, collate_fn=keep_batch)
    pixels = next(iter(DataLoader(_Plain(paths[:BATCH], embedder.preprocessing), BATCH, collate_fn=keep_batch)))
    inputs = embedder.preprocessing(pixels)

    @torch.inference_mode()
    def encode() -> None:
        for _ in range(images // BATCH):
            embedder.encoder(inputs)

    def read() -> Iterator[Tensor]:
        yield from loader

    def loop() -> None:
        for batch in read():
            embedder.embed(batch)

    encode()
    works = {"encode": encode, "decode": lambda: [len(batch) for batch in read()], "loop": loop}
    return {key: value for name, work in works.items() for key, value in timed(name, images, work).items()}


def embed_case(checkpoint: str, images: str, count: int, out: str, workers: int) -> Row:
    """The whole of ``embed_files``, with the peak memory of its process and of its largest worker."""
    as_the_command()
    before = memory_mib("VmRSS")
    done: list[EmbeddedFiles] = []
    work = timed(
        "embed",
        count,
        lambda: done.append(
            embed_files(checkpoint, [images], out, batch_size=BATCH, num_workers=workers, device="cpu")
        ),
    )
    assert done[0].images == count
    return {
        "images": count,
        **work,
        "before_mib": before,
        "peak_mib": memory_mib(),
        "worker_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def killed(checkpoint: Path, images: Path, out: Path, workers: int, after: int) -> Row:
    """Kill the command when some parts are written, start it again; whether the file is the same as of one start."""
    words = [sys.executable, "-c", "from simo_lightning.cli import main; main()", "embed", str(checkpoint), str(images)]
    options = ["--batch_size", str(BATCH), "--num_workers", str(workers), "--device", "cpu", "--no_progress"]
    whole, continued = out / "whole.parquet", out / "continued.parquet"
    subprocess.run([*words, "--out", str(whole), *options], check=True, capture_output=True)
    process = subprocess.Popen([*words, "--out", str(continued), *options], stdout=subprocess.DEVNULL)
    parts = continued.with_name("continued.parquet.parts")
    while len(list(parts.glob("part-*.npz"))) < after:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = len(list(parts.glob("part-*.npz")))
    done = subprocess.run([*words, "--out", str(continued), *options], check=True, capture_output=True, text=True)
    same = len({hashlib.sha256(file.read_bytes()).hexdigest() for file in (whole, continued)}) == 1
    return {"parts_at_kill": found, "same_bytes": same, "second_start": done.stdout.strip().rpartition("(")[2][:-1]}


def _middle(name: str, one: float, other: float) -> float:
    """Mean of two times, or of two rates by their times."""
    return (one + other) / 2 if name.endswith("us") else 2 / (1 / one + 1 / other)


def embed(given: argparse.Namespace) -> list[Row]:
    """A tenth of the images, all, a killed command, and a table of a million rows that name 64 small files."""
    count, floor_images, listed = (2_000, 640, 4_000) if given.quick else (100_000, 12_800, 1_000_000)
    workers = min(16, os.cpu_count() or 1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, side in ((32, 128), (8, 8)):
            make_checkpoint(folder / f"{size}.ckpt", size)
            make_photographs(folder / f"source{side}", FILES, side, side)
        sources = sorted((folder / "source128").glob("*/*.jpg"))
        for images in (count // 10, count):
            make_links(folder / f"{images}", sources, images)
            case: Row = {"pixels": 32, "files": "hard links", "workers": workers}
            words: Row = {"checkpoint": str(folder / "32.ckpt"), "workers": workers}
            bare: Row = {**words, "sources": [str(path) for path in sources], "images": floor_images}
            before = in_process(floor_case, **bare) if images == count else {}
            found = in_process(
                embed_case,
                **words,
                images=str(folder / f"{images}"),
                count=images,
                out=str(folder / f"{images}.parquet"),
            )
            after = in_process(floor_case, **bare) if images == count else {}
            # the machine may be shared: the mean of before and after
            floor = {name: _middle(name, before[name], after[name]) for name in before}
            if floor:
                floor["apart"] = 1 / (1 / floor["encode"] + 1 / floor["decode"])
                floor |= {f"embed / {name}": found["embed"] / floor[name] for name in ("apart", "loop")}
                floor["CPU: loop / embed"] = floor["loop CPU us"] / found["embed CPU us"]
            rows.append({**case, **found, **floor})
            print(rows[-1], flush=True)
        rows[-1] |= killed(folder / "32.ckpt", folder / f"{count}", folder, workers, after=count // 2048)
        print(rows[-1], flush=True)
        small = sorted((folder / "source8").glob("*/*.jpg"))
        with (folder / "list.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path"])
            writer.writerows([str(small[number % FILES])] for number in range(listed))
        found = in_process(
            embed_case, checkpoint=str(folder / "8.ckpt"), images=str(folder / "list.csv"), count=listed,
            out=str(folder / "list.parquet"), workers=workers,
        )  # fmt: skip
        rows.append({"pixels": 8, "files": "rows of a table", "workers": workers, **found})
        print(rows[-1], flush=True)
    return rows
