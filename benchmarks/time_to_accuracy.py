"""Seconds of training until kNN on the validation split reaches a mark.

    python -m benchmarks.time_to_accuracy [--data.data_dir DIR] [--runs NAME:EPOCHS:RATE ...] [--json FILE]

Each run is a recipe of configs/recipes over their base, with its own length and learning rate: a schedule that ends
sooner gets to a mark sooner, so give each recipe several. The clock runs from the first batch to the end of an epoch
and stands still while kNN (k = 20, cosine, 10,000 training images) is measured after it; so a time is known to an
epoch. Data and compilation before the first batch are not counted. kNN on the test split is measured once, at the end,
among all training images.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from benchmarks.machine import about, write_json
from benchmarks.recipes.evaluate import embed, neighbors
from benchmarks.recipes.plan import BASE, read_recipe, read_setting
from benchmarks.recipes.run import make_parts

MARKS = (0.80, 0.85)
BANK = 10_000  # training images that a validation is compared with
RUNS = [f"{name}:{epochs}:8e-3" for name in ("simo", "supcon", "cross_entropy") for epochs in (8, 16)]


class Run(NamedTuple):
    """One run.

    Attributes:
        recipe: Its name, or a file that ends in ``.yaml``.
        epochs: Its length.
        rate: Learning rate.
    """

    recipe: str
    epochs: int
    rate: float

    @classmethod
    def of(cls, words: str) -> "Run":
        """Read ``NAME:EPOCHS:RATE``."""
        try:
            recipe, epochs, rate = words.rsplit(":", 2)
            return cls(recipe, int(epochs), float(rate))
        except ValueError:
            raise argparse.ArgumentTypeError(f"a run must be NAME:EPOCHS:RATE, got {words!r}") from None


class StopWatch(pl.Callback):
    """Seconds of training and kNN at the end of each epoch.

    Attributes:
        seconds: Of training up to each measurement.
        accuracies: Validation kNN there.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.accuracies: list[float] = []
        self._since, self._trained = 0.0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = now()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock and measure."""
        self._trained += now() - self._since
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.seconds.append(self._trained)
        self.accuracies.append(judge(trainer, pl_module, data, data.val_dataloader(), BANK))
        print(f"  epoch {trainer.current_epoch + 1:>3} {self._trained:8.1f} s  val kNN {self.accuracies[-1]:.4f}")


def now() -> float:
    """Seconds, once the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def judge(trainer: pl.Trainer, module: Any, data: Any, loader: Any, bank: int | None = None) -> float:
    """Accuracy of kNN(20) among so many training images, None for all."""
    training = module.training
    module.eval()
    accuracy = neighbors(
        embed(trainer, module, data, data.bank_dataloader(limit=bank)), embed(trainer, module, data, loader), 20
    )
    module.train(training)
    return accuracy


def train(run: Run, base: Path, overrides: list[str], seed: int, marks: list[float]) -> dict[str, Any]:
    """One run.

    Args:
        run: Recipe, epochs and rate.
        base: Config under the recipe.
        overrides: Words for the config, such as ``--data.data_dir DIR``.
        seed: Of model and data.
        marks: Accuracies to reach.

    Returns:
        Seconds to each mark, None where it was not reached, and the whole course.
    """
    recipe = read_recipe(run.recipe, read_setting(base, None, run.epochs))
    parts = make_parts({"epochs": run.epochs, "config": recipe.config_of(run.rate, seed), "overrides": overrides})
    watch = StopWatch()
    parts.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    parts.trainer.fit(parts.model, datamodule=parts.datamodule)
    parts.datamodule.setup("test")
    course = list(zip(watch.seconds, watch.accuracies, strict=True))
    reached = {f"{mark:.2f}": next((when for when, value in course if value >= mark), None) for mark in marks}
    return {
        **run._asdict(),
        "title": recipe.title,
        "seed": seed,
        "seconds_to": reached,
        "test_knn20": judge(parts.trainer, parts.model, parts.datamodule, parts.datamodule.test_dataloader()),
        "course": course,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The runs as Markdown."""
    marks = list(results[0]["seconds_to"])
    heads = ["loss", "epochs", "rate", *(f"s to val kNN {mark}" for mark in marks), "last val kNN", "test kNN"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for result in results:
        times = [result["seconds_to"][mark] for mark in marks]
        cells = [result["title"], str(result["epochs"]), f"{result['rate']:g}"]
        cells += ["not reached" if seconds is None else f"{seconds:.0f}" for seconds in times]
        cells += [f"{result['course'][-1][1]:.3f}", f"{result['test_knn20']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, print and write after each run."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data.data_dir", dest="data_dir", type=Path, help="CIFAR-10")
    parser.add_argument("--runs", type=Run.of, nargs="+", default=[Run.of(words) for words in RUNS])
    parser.add_argument("--marks", type=float, nargs="+", default=list(MARKS), help="accuracies to reach")
    parser.add_argument("--base", type=Path, default=BASE, help="config under the recipes")
    parser.add_argument("--seed", type=int, default=0, help="of model and data")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options, words = parser.parse_known_args()
    if options.data_dir is not None:
        words += ["--data.data_dir", str(options.data_dir)]
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # our words are not the command line's
    results: list[dict[str, Any]] = []
    start = about()
    for run in options.runs:
        print(f"{run.recipe}, {run.epochs} epochs, rate {run.rate:g}", flush=True)
        results.append(train(run, options.base, words, options.seed, options.marks))
        write_json(options.json, {**start, "runs": results})
    print(table(results))


if __name__ == "__main__":
    main()
