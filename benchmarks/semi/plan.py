"""The arms that are compared: one config, with its unlabelled images and without."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.recipes.plan import ROOT, lay_over

CONFIG = ROOT / "configs" / "cifar10_semi.yaml"
# Raise when the evaluation changes what a number means: all runs are then made again.
PROTOCOL = 2
ARMS = ("alone", "alone_augmented", "alone_longer", "views")
TITLES = {
    "alone": "labelled part alone, crop and flip",
    "alone_augmented": "labelled part alone, augmented as below",
    "alone_longer": "labelled part alone, augmented as below, as many images embedded",
    "views": "with unlabelled images, known by their views",
}
# The augmentation of configs/cifar10_cpu.yaml, which trains best where all labels are known.
_WEAK = {"augment": {"class_path": "simo_lightning.data.BatchAugment", "init_args": {"crop_padding": 2}}}

Config = dict[str, Any]


class Run(NamedTuple):
    """One training.

    Attributes:
        arm: One of ``ARMS``.
        fraction: Share of the labels that is known.
        rate: Learning rate.
        seed: Of model and data; which labels are known does not depend on it.
        steps: Optimizer steps.
        images: Images embedded at each step, views counted.
        config: Keys seed_everything, trainer, model and data.
        overrides: Words for the config.
    """

    arm: str
    fraction: float
    rate: float
    seed: int
    steps: int
    images: int
    config: Config
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.arm}-labels{self.fraction:g}-{self.steps}s-lr{self.rate:g}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """Of all that decides the result; where the images lie does not."""
        words = [word for word in self.overrides if "data_dir" not in word]
        return hashlib.blake2b(
            json.dumps([PROTOCOL, self.config, words, self.steps]).encode(), digest_size=8
        ).hexdigest()


def read_config(path: Path) -> Config:
    """The config under all runs.

    Args:
        path: Of the simo command.

    Returns:
        Its keys trainer, model and data.

    Raises:
        ValueError: If there is none, or it does not say how many views and unlabelled images a batch has.
    """
    if not path.is_file():
        raise ValueError(f"no config at {path}")
    config = yaml.safe_load(path.read_text())
    arguments = config.get("data", {}).get("init_args", {})
    for name in ("views", "unlabelled_per_batch", "samples_per_class"):
        if not isinstance(arguments.get(name), int):
            raise ValueError(f"{path.name} must say data.init_args.{name} as a number, got {arguments.get(name)}")
    return {key: config[key] for key in ("trainer", "model", "data") if key in config}


def make_run(
    base: Config, arm: str, fraction: float, rate: float, seed: int, steps: int, overrides: Sequence[str] = ()
) -> Run:
    """One training of an arm.

    Args:
        base: As of :func:`read_config`.
        arm: One of ``ARMS``.
        fraction: Share of the labels that is known, in (0, 1).
        rate: Learning rate.
        seed: Of model and data.
        steps: Optimizer steps; "alone_longer" gets more.
        overrides: Words for the config.

    Returns:
        The run.

    Raises:
        ValueError: If the arm is unknown, the fraction is out of range or there is no step.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    own: Config = {"label_fraction": fraction, "seed": seed}
    given = base["data"]["init_args"]
    if arm != "views":  # as many labelled rows, of different images in place of views
        own |= {"unlabelled_per_batch": 0, "views": 1, "samples_per_class": given["samples_per_class"] * given["views"]}
    if arm == "alone":
        own |= _WEAK
    data = lay_over(base["data"], {"init_args": own})
    model = lay_over(base["model"], {"init_args": {"optimizer": {"init_args": {"lr": rate}}}})
    whole, images = images_per_step(given), images_per_step(data["init_args"])
    steps = round(steps * whole / images) if arm == "alone_longer" else steps
    config = {"seed_everything": seed, "trainer": base.get("trainer", {}), "model": model, "data": data}
    return Run(arm, fraction, rate, seed, steps, images, config, tuple(overrides))


def images_per_step(arguments: Config) -> int:
    """Images that are embedded at each step of a config: (P K + U) V.

    Args:
        arguments: Of its data module.

    Returns:
        Their number.

    Example:
        >>> images_per_step({"samples_per_class": 6, "unlabelled_per_batch": 120, "views": 2})
        360
    """
    labelled = arguments.get("classes_per_batch", 10) * arguments["samples_per_class"]
    return int((labelled + arguments["unlabelled_per_batch"]) * arguments["views"])
