"""Learning-rate schedules that take their length from the run."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau


def with_schedule(optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None, trainer: pl.Trainer) -> Any:
    """The return value of Lightning's ``configure_optimizers`` for an optimizer and its schedule.

    Args:
        optimizer: The optimizer.
        lr_scheduler: Maps an optimizer to a scheduler, or None. A scheduler with a method ``set_total_steps`` gets the
            number of steps of the run and steps once per batch; others step once per epoch.
        trainer: Gives the length of the run.

    Returns:
        The optimizer, or a dictionary of it and the scheduler.

    Raises:
        ValueError: As :func:`check_finetuning`.
    """
    scheduler: Any = None if lr_scheduler is None else lr_scheduler(optimizer)
    check_finetuning(trainer, scheduler)
    if lr_scheduler is None:
        return optimizer
    if isinstance(getattr(lr_scheduler, "keywords", {}).get("max_lr"), int | float):
        _keep_factors(scheduler)
    config = {"scheduler": scheduler, "interval": "epoch"}
    if hasattr(scheduler, "set_total_steps"):
        scheduler.set_total_steps(trainer.estimated_stepping_batches)
        config["interval"] = "step"
    elif isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = getattr(scheduler, "monitor", "train/loss")
    return {"optimizer": optimizer, "lr_scheduler": config}


def _keep_factors(scheduler: Any) -> None:
    """Give each parameter group its share of the one largest rate of torch's cyclic schedules."""
    groups = scheduler.optimizer.param_groups
    factors = [group.get("lr_factor", 1.0) for group in groups]
    if isinstance(scheduler, OneCycleLR):
        for group, factor in zip(groups, factors, strict=True):
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                group[name] *= factor
    elif isinstance(scheduler, CyclicLR):
        for name in ("base_lrs", "max_lrs"):
            setattr(scheduler, name, [rate * by for rate, by in zip(getattr(scheduler, name), factors, strict=True)])
        for group, factor in zip(groups, factors, strict=True):
            group["lr"] *= factor
    scheduler._last_lr = [group["lr"] for group in groups]


def check_finetuning(trainer: pl.Trainer, scheduler: Any) -> None:
    """Refuse Lightning's finetuning callbacks where they fail or train wrongly.

    Args:
        trainer: Has the callbacks.
        scheduler: The learning-rate scheduler, or None.

    Raises:
        ValueError: If there is such a callback, and several processes or a scheduler that takes no further parameter
            group.
    """
    callback = next((each for each in trainer.callbacks if isinstance(each, BaseFinetuning)), None)  # type: ignore[attr-defined]
    if callback is None:
        return
    name, instead = type(callback).__name__, "use simo_lightning.callbacks.FreezeBackbone"
    if trainer.world_size > 1:
        raise ValueError(
            f"{name} needs a single process, since gradients of what is unfrozen later are not averaged, got "
            f"{trainer.world_size}: {instead}"
        )
    if scheduler is not None and not isinstance(scheduler, OneCycle):
        raise ValueError(
            f"{name} adds a parameter group, which the schedule must allow: OneCycle or none, got "
            f"{type(scheduler).__name__}; or {instead}"
        )


class OneCycle(LambdaLR):
    """Warm-up to the optimizer's own learning rate, then cosine annealing to almost 0, over the whole run.

    torch's OneCycleLR takes the number of steps at construction, which a config file cannot know. This one takes it by
    :meth:`set_total_steps`, which the module calls when the optimizers are configured.

    Parameter groups that are added later, as by Lightning's BackboneFinetuning, keep the rate that they are given.

    Args:
        optimizer: Its learning rate is the peak, for each parameter group its own.
        warmup: Share of the run until the peak, in 0..1.
        start: First learning rate as a share of the peak, >= 0.
        end: Last learning rate as a share of the peak, >= 0.

    Raises:
        ValueError: If warmup is not in 0..1.

    Source:
        Smith & Topin, arXiv 1708.07120, with cosine annealing as in torch; momentum is not changed.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.3, start: float = 0.04, end: float = 1e-4) -> None:
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be in 0..1, got {warmup}")
        self.warmup, self.start, self.end = warmup, start, end
        self.total_steps: int | None = None
        super().__init__(optimizer, self._share)

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the groups of the start by the schedule, and of later ones as they are."""
        rates = super().get_lr()
        return rates + [group["lr"] for group in self.optimizer.param_groups[len(rates) :]]

    def set_total_steps(self, total_steps: int) -> None:
        """Set the length of the run.

        Args:
            total_steps: Optimizer steps of the whole run, >= 1.

        Raises:
            ValueError: If it is less than 1 or infinite.
        """
        if total_steps < 1 or math.isinf(total_steps):
            raise ValueError(
                "OneCycle needs a run of known length, at least one step: set the trainer's max_epochs or max_steps, "
                f"and limit_train_batches above 0, got {total_steps} steps"
            )
        self.total_steps = int(total_steps)

    def _share(self, step: int) -> float:
        """Learning rate at a step as a share of the peak."""
        if self.total_steps is None:  # at construction only the first step's rate is computed
            return self.start
        progress = min(1.0, step / max(1, self.total_steps - 1))
        if progress < self.warmup:
            return self._cosine(self.start, 1.0, progress / self.warmup)
        return self._cosine(1.0, self.end, (progress - self.warmup) / max(1e-12, 1 - self.warmup))

    @staticmethod
    def _cosine(first: float, last: float, progress: float) -> float:
        return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
