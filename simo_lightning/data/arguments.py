"""What the arguments of a data module must be, apart from what only its data can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unlabelled_images(given: Mapping[str, Any]) -> int:
    """U, the unlabelled images of a training batch on each rank.

    Args:
        given: Arguments of a ``PairDataModule`` by name.

    Returns:
        0 where no label is hidden; P x K where ``unlabelled_per_batch`` is None.
    """
    if given["label_fraction"] == 1:
        return 0
    own: int | None = given["unlabelled_per_batch"]
    return given["classes_per_batch"] * given["samples_per_class"] if own is None else own


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument is out of its range or does not fit another.

    Args:
        given: Arguments of a ``PairDataModule`` by name.
    """
    for name, least in (("views", 1), ("eval_batch_size", 1), ("unlabelled_per_batch", 0)):
        if given[name] is not None and given[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {given[name]}")
    if not 0 <= given["val_fraction"] < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {given['val_fraction']}")
    if not 0 < given["label_fraction"] <= 1:
        raise ValueError(f"label_fraction must lie in (0, 1], got {given['label_fraction']}")
    if unlabelled_images(given) and given["views"] < 2:
        raise ValueError(
            "views must be at least 2 where label_fraction hides labels, as the other views of an unlabelled image are "
            f"all that is similar to it, got {given['views']}; unlabelled_per_batch 0 trains on the labelled part alone"
        )
    if given["seed"] < 0 or given["split_seed"] < 0:
        raise ValueError(f"seed and split_seed must be non-negative, got {given['seed']} and {given['split_seed']}")
    mean, std = given["mean"], given["std"]
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given both or neither, got {mean} and {std}")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")


def check_trainer(trainer: Any) -> None:
    """Raise ValueError if the trainer would take the balanced sampler away.

    Args:
        trainer: A Trainer, or None.
    """
    overfit = getattr(trainer, "overfit_batches", 0)
    if overfit:
        raise ValueError(
            f"overfit_batches must be 0, got {overfit}: Lightning then puts a sequential sampler in place of the "
            "balanced one; use limit_train_batches instead"
        )
