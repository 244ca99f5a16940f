"""How often and on how many images a callback evaluates, so that validation takes a small share of an epoch.

The choice follows from numbers of images, classes and weights alone, never from measured time, so it is the same on all
processes and in a resumed run. Costs are counted in passes: one image through the encoder, without gradient, which is
taken to need one multiplication per weight, 16 per weight of a convolution, and at least a million with reading the
image. Training costs one pass an image and two more for the gradient of the weights that are trained. Augmentation,
several views, the optimizer and larger feature maps are left out, which make the real share smaller.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from simo_lightning.distributed import sum_over_ranks

SHARE = 0.08  # of an epoch of training that validation may take, so that with further callbacks it is a tenth
_LEAST_SHARE = 0.04  # that an evaluation gets even if the validation images alone take more than the rest
_LEAST_MULTIPLICATIONS = 1e6  # for an image
_POSITIONS = 16  # of an image at which a weight of a convolution is used


class Plan(NamedTuple):
    """What a callback evaluates.

    Attributes:
        images: Largest number of images; None: all.
        every: Validations from one evaluation to the next.
    """

    images: int | None
    every: int


class Sizes(NamedTuple):
    """Numbers of a fit over all processes.

    Attributes:
        trained: Images of an epoch of training.
        validated: Images of one validation.
        multiplications: Of one image in the encoder.
        passes: Of one image in training, 1 to 3.
        epochs: From one validation to the next; below 1 with several in an epoch.
    """

    trained: int
    validated: int
    multiplications: float
    passes: float
    epochs: float

    def budget(self) -> float:
        """Passes that one validation may cost beyond those of its own images."""
        trained = self.trained * self.passes * self.epochs
        return max(SHARE * trained - self.validated, _LEAST_SHARE * trained)


def choose(budget: float, cost: float, fixed: float, total: int, least: int, sizes: bool, interval: bool) -> Plan:
    """The number of images and the interval.

    As many images as the budget allows at every validation, at least ``least``; where these cost more, the interval
    grows.

    Args:
        budget: Passes that a validation may cost.
        cost: Passes of each image.
        fixed: Passes of an evaluation in any case.
        total: Images that there are.
        least: Images below which a value means little.
        sizes: Whether the number of images is free; otherwise it is ``total``.
        interval: Whether the interval is free; otherwise it is 1, and ``budget`` that of one evaluation.

    Returns:
        The plan; its images are None where all are used.

    Example:
        >>> choose(1000, cost=1, fixed=0, total=5000, least=500, sizes=True, interval=True)
        Plan(images=1000, every=1)
        >>> choose(1000, cost=1, fixed=0, total=5000, least=3000, sizes=True, interval=True)
        Plan(images=3000, every=3)
        >>> choose(1000, cost=1, fixed=0, total=5000, least=500, sizes=False, interval=True)
        Plan(images=None, every=5)
    """
    images = min(total, max(least, int((budget - fixed) / cost))) if sizes else total
    every = max(1, math.ceil((fixed + cost * images) / budget)) if interval and budget > 0 else 1
    return Plan(images if images < total else None, every)


def fit_sizes(trainer: Trainer, pl_module: LightningModule, trained: int | None) -> Sizes | None:
    """Numbers of the fit that runs; None if a loader does not know its size. Every process calls it.

    Args:
        trainer: In a fit, with its loaders.
        pl_module: Trained.
        trained: Images of the training set, which one epoch visits; None: unknown.

    Returns:
        The sizes.
    """
    validated = images_of(trainer, trainer.val_dataloaders, trainer.num_val_batches)
    if trained is None or validated is None or not math.isfinite(trainer.num_training_batches):
        return None
    batches = getattr(trainer.train_dataloader, "__len__", lambda: 0)() or trainer.num_training_batches
    within = trainer.num_training_batches // trainer.val_check_batch if trainer.val_check_batch else 1
    weights = [each for each in pl_module.parameters() if not nn.parameter.is_lazy(each)]
    count = sum(each.numel() for each in weights)
    filters = sum(each.numel() for each in weights if each.ndim >= 4)
    learned = sum(each.numel() for each in weights if each.requires_grad) / max(count, 1)
    return Sizes(
        trained=round(trained * min(1.0, trainer.num_training_batches / batches)),
        validated=validated,
        multiplications=max(float(count + (_POSITIONS - 1) * filters), _LEAST_MULTIPLICATIONS),
        passes=1 + 2 * learned,
        epochs=(trainer.check_val_every_n_epoch or 1) / max(1, int(within)),
    )


def images_of(trainer: Trainer, loaders: Any, batches: list[int | float] | None = None) -> int | None:
    """Images of data loaders over all processes, None if one does not know. Every process calls it.

    Args:
        trainer: With the processes.
        loaders: One loader or several, this process's shares.
        batches: Batches of each that are used; None: all.

    Returns:
        Their number.
    """
    several = loaders if isinstance(loaders, list | tuple) else [loaders]
    limits = batches if batches and len(batches) == len(several) else [math.inf] * len(several)
    own = [_images(each, limit) for each, limit in zip(several, limits, strict=True)]
    values = [sum(each for each in own if each is not None), sum(each is None for each in own)]
    count, unknown = sum_over_ranks(torch.tensor(values, device=trainer.strategy.root_device)).tolist()
    return None if unknown else int(count)


def _images(loader: Iterable[Any], batches: float) -> int | None:
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if sampler is None or not hasattr(sampler, "__len__"):
        return None
    return min(len(sampler), int(batches * size)) if size and math.isfinite(batches) else len(sampler)


def embedding_dim(pl_module: LightningModule) -> int:
    """D of the module or of its encoder, if it says so, else 128."""
    parts: list[Any] = [pl_module, getattr(pl_module, "encoder", None)]
    return next((int(dim) for dim in (getattr(part, "embedding_dim", None) for part in parts) if dim), 128)


def length(loader: Any) -> int | None:
    """Images of a data loader that all processes share, None if it does not know."""
    return _images(loader, math.inf)
