"""What the callbacks of this package cost of an epoch.

    python -m benchmarks.callbacks [--data.data_dir DIR] [--config FILE] [--json FILE] [words of simo fit]

All in one process. Training: geometry, alarm and probe are on for two steps and off for two, as the probe learns from
every second batch; the difference is the median over such pairs of two. Validation: the same validation without a
callback and with each of them by itself, taking turns. Beside both stands the time inside of the callback's own hooks,
which other work on the machine disturbs less, but which on a GPU leaves out what the GPU does later. "geometry,
training too" is GeometryMonitor(every_n_steps=...), which the command leaves off. Without a folder the images are
noise.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from benchmarks.machine import CPU_CONFIG, about, data_words, write_json
from simo_lightning.callbacks import CollapseAlarm, EmbeddingPlots, GeometryMonitor, OnlineKNN, OnlineProbe

TARGET = ("geometry", "alarm", "probe")
WITHOUT = "none"


def now() -> float:
    """Seconds, once the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Inside(pl.Callback):
    """Hands its hooks on to a callback and adds up the time inside.

    Args:
        callback: That is measured.

    Attributes:
        seconds: So far.
    """

    def __init__(self, callback: pl.Callback) -> None:
        self.callback = callback
        self.seconds = 0.0

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or name in ("on_load_checkpoint", "on_save_checkpoint", "on_exception"):
            return super().__getattribute__(name)
        hook = getattr(self.callback, name)

        def timed(*arguments: Any, **named: Any) -> None:
            start = time.perf_counter()
            hook(*arguments, **named)
            self.seconds += time.perf_counter() - start

        return timed


class TwoOnTwoOff(pl.Callback):
    """Runs callbacks in training for two steps of four, and times all steps.

    Args:
        callbacks: Those measured.
        warmup: Steps before the first that counts, a multiple of 4.

    Attributes:
        steps: Seconds of each step, two without the callbacks, two with, and so on.
        inside: Of each callback, the seconds inside at each step with it.
    """

    def __init__(self, callbacks: dict[str, Inside], warmup: int) -> None:
        self.callbacks, self.warmup = callbacks, warmup
        self.steps: list[float] = []
        self.inside: dict[str, list[float]] = {name: [] for name in callbacks}
        self._since = 0.0

    def on_train_start(self, *arguments: Any) -> None:
        for callback in self.callbacks.values():
            callback.on_train_start(*arguments)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        step = trainer.global_step
        if (step - 1) // 2 % 2:
            for name, callback in self.callbacks.items():
                before = callback.seconds
                callback.on_train_batch_end(trainer, pl_module, *arguments)
                if step > self.warmup:
                    self.inside[name].append(callback.seconds - before)
        end = now()
        if step > self.warmup:
            self.steps.append(end - self._since)
        self._since = end


def make_parts(arguments: argparse.Namespace, folder: str, words: list[str]) -> LightningCLI:
    """Trainer, module and data as ``simo fit`` makes them, without its callbacks."""
    config = yaml.safe_load(arguments.config.read_text())
    config = {key: config[key] for key in ("trainer", "model", "data")}
    own = {"max_epochs": -1, "max_steps": arguments.steps + arguments.warmup, "default_root_dir": folder}
    quiet = {"enable_progress_bar": "false", "enable_model_summary": "false", "enable_checkpointing": "false"}
    file = Path(folder, "config.yaml")
    file.write_text(yaml.safe_dump(config))
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=[
            *("--config", str(file), *data_words(arguments.data_dir), *words),
            *(f"--trainer.{name}={value}" for name, value in {**own, **quiet}.items()),
            *("--trainer.num_sanity_val_steps", "0"),
        ],
    )


def measure_training(parts: LightningCLI, callbacks: dict[str, Inside], warmup: int) -> dict[str, Any]:
    """Milliseconds of a step without the callbacks, what they add, and inside of each."""
    turns = TwoOnTwoOff(callbacks, warmup)
    parts.trainer.callbacks.append(turns)
    parts.trainer.limit_val_batches = 0
    parts.trainer.fit(parts.model, datamodule=parts.datamodule)
    parts.trainer.callbacks.remove(turns)
    parts.trainer.limit_val_batches = 1.0
    twos = [statistics.fmean(two) for two in zip(turns.steps[0::2], turns.steps[1::2], strict=False)]
    off, on = twos[0::2], twos[1::2]
    return {
        "steps": len(turns.steps),
        "step": 1e3 * statistics.median(off),
        "difference": 1e3 * statistics.median(b - a for a, b in zip(off, on, strict=False)),
        "inside": {name: 1e3 * statistics.fmean(times) for name, times in turns.inside.items()},
    }


def measure_validation(parts: LightningCLI, callbacks: dict[str, Inside], repeats: int) -> dict[str, Any]:
    """Seconds of a validation without a callback, what each adds, and inside of each."""
    walls: dict[str, list[float]] = {name: [] for name in (WITHOUT, *callbacks)}
    inside: dict[str, list[float]] = {name: [] for name in callbacks}
    for repeat in range(repeats + 1):  # the first one warms up
        for name in walls:
            mine = [callbacks[name]] if name in callbacks else []
            parts.trainer.callbacks.extend(mine)
            before, start = sum(callback.seconds for callback in mine), now()
            parts.trainer.validate(parts.model, datamodule=parts.datamodule, verbose=False)
            wall = now() - start
            for callback in mine:
                parts.trainer.callbacks.remove(callback)
                inside[name] += [callback.seconds - before] if repeat else []
            walls[name] += [wall] if repeat else []
    differences = {
        name: statistics.median(b - a for a, b in zip(walls[WITHOUT], walls[name], strict=True)) for name in callbacks
    }
    return {
        "repeats": repeats,
        "seconds": statistics.median(walls[WITHOUT]),
        "difference": differences,
        "inside": {name: statistics.median(times) for name, times in inside.items()},
    }


def shares(training: dict[str, Any], validation: dict[str, Any], steps: int) -> dict[str, Any]:
    """Parts of an epoch of training and one validation without callbacks, in %."""
    epoch = steps * training["step"] / 1e3 + validation["seconds"]
    inside = {
        name: 100 * (steps * training["inside"].get(name, 0) / 1e3 + validation["inside"].get(name, 0)) / epoch
        for name in {**training["inside"], **validation["inside"]}
    }
    together = steps * training["difference"] / 1e3 + sum(validation["difference"][name] for name in TARGET)
    return {
        "steps_of_an_epoch": steps,
        "epoch_seconds": epoch,
        "inside_percent": inside,
        "target_inside_percent": sum(inside[name] for name in TARGET),
        "target_difference_percent": 100 * together / epoch,
    }


def table(training: dict[str, Any], validation: dict[str, Any], epoch: dict[str, Any]) -> list[str]:
    """The numbers as Markdown."""
    lines = ["| callback | inside, a step | inside, a validation | difference, a validation | of an epoch |"]
    lines.append("|---|---|---|---|---|")
    for name, share in epoch["inside_percent"].items():
        step = f"{training['inside'][name]:.3f} ms" if name in training["inside"] else ""
        seconds = [validation[kind].get(name) for kind in ("inside", "difference")]
        shown = ["" if value is None else f"{value:.3f} s" for value in seconds]
        lines.append(f"| {name} | {step} | {shown[0]} | {shown[1]} | {share:.2f} % |")
    return [
        *lines,
        f"without callbacks: step {training['step']:.2f} ms, {epoch['steps_of_an_epoch']} steps an epoch, validation "
        f"{validation['seconds']:.2f} s, epoch {epoch['epoch_seconds']:.1f} s",
        f"{', '.join(TARGET)} together: {epoch['target_inside_percent']:.2f} % of an epoch inside; "
        f"{epoch['target_difference_percent']:.2f} % by difference ({training['difference']:+.3f} ms a step)",
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--config", type=Path, default=CPU_CONFIG, help="config of simo fit")
    parser.add_argument("--data.data_dir", dest="data_dir", type=Path, help="folder of CIFAR-10; else noise")
    parser.add_argument("--steps", type=int, default=400, help="timed steps, half of them with callbacks")
    parser.add_argument("--warmup", type=int, default=20, help="steps before them")
    parser.add_argument("--repeats", type=int, default=3, help="timed validations of each callback")
    parser.add_argument("--every_n_steps", type=int, default=50, help="of the geometry of training batches")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments, words = parser.parse_known_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result = about()
    bank = (yaml.safe_load(arguments.config.read_text()).get("knn") or {}).get("bank_size")
    by_default = {"geometry": GeometryMonitor(), "alarm": CollapseAlarm(), "probe": OnlineProbe()}
    others = {"knn": OnlineKNN(bank_size=bank), "plots": EmbeddingPlots()}
    callbacks = {name: Inside(callback) for name, callback in {**by_default, **others}.items()}
    steps_too = {"geometry, training too": Inside(GeometryMonitor(every_n_steps=arguments.every_n_steps))}
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(arguments, folder, words)
        training = measure_training(parts, {name: callbacks[name] for name in TARGET}, arguments.warmup)
        steps = len(parts.datamodule.train_dataloader())
        validation = measure_validation(parts, callbacks, arguments.repeats)
        again = make_parts(arguments, folder, words)
        training["inside"] |= measure_training(again, steps_too, arguments.warmup)["inside"]
    epoch = shares(training, validation, steps)
    print(*table(training, validation, epoch), sep="\n")
    result |= {"options": {"every_n_steps": arguments.every_n_steps, "bank_size": bank}}
    write_json(arguments.json, {**result, "training": training, "validation": validation, "epoch": epoch})


if __name__ == "__main__":
    main()
