"""Small runs without output, and the comparison of their results."""

import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor


def small_trainer(folder: str | Path, **arguments: Any) -> pl.Trainer:
    """A trainer on the CPU without logger, checkpoints and progress bar.

    Args:
        folder: Its ``default_root_dir``.
        arguments: Override its arguments.

    Returns:
        The trainer.
    """
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "num_sanity_val_steps": 0, **quiet}
    return pl.Trainer(default_root_dir=folder, **{**fixed, **arguments})


@contextmanager
def quiet_and_seeded(seed: int = 0) -> Iterator[None]:
    """Seed all generators and silence warnings; restores the generators and the environment afterwards."""
    variables = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  # what is seeded below
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.seed_everything(seed, verbose=False)
            yield
    finally:
        logger.setLevel(level)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        for name, value in variables.items():
            set_variable(name, value)


def set_variable(name: str, value: str | None) -> None:
    """Set an environment variable; None removes it."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first difference between two states, compared bit by bit.

    Args:
        one: Nested mappings and lists of tensors and numbers.
        other: The same.

    Returns:
        Its name and size, and the number of others; None if the states are equal.

    Example:
        >>> differing({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 0.5])})
        'w (by up to 0.5)'
    """
    first, second = dict(_leaves(one)), dict(_leaves(other))
    found = [f"{name} (missing on one side)" for name in sorted(first.keys() ^ second.keys())]
    for name in [name for name in first if name in second]:
        a, b = first[name], second[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
            if not torch.equal(a, b):
                found.append(f"{name} (by up to {float((a.double() - b.double()).abs().max()):.3g})")
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            found.append(f"{name} ({_brief(a)} against {_brief(b)})")
    if not found:
        return None
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"


def _leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from _leaves(value, f"{name}.{index}")
    else:
        yield name, state


def _brief(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
