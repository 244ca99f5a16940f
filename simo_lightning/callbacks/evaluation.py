"""The base class of callbacks that evaluate embeddings."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.budget import Plan
from simo_lightning.callbacks.embed import forget_banks
from simo_lightning.distributed import gather_rows, world_size
from simo_lightning.functional.retrieval import average_scores


def step_embeddings(outputs: Any) -> tuple[Tensor, Tensor] | None:
    """Embeddings and labels that a step returned for callbacks.

    Args:
        outputs: Of a training, validation or test step.

    Returns:
        This process's ``embeddings (N, D)``, detached, and ``labels (N,)``; None unless the step returned both.

    Example:
        >>> step_embeddings({"loss": 0.5}) is None
        True
    """
    if isinstance(outputs, dict) and {"embeddings", "labels"} <= outputs.keys():
        return outputs["embeddings"].detach(), outputs["labels"]
    return None


# Key of a checkpoint: the last values, where a validation may pass without new ones.
_VALUES = "last_evaluation"

_WANTED = "a dictionary with embeddings (N, D) and labels (N,)"


def described(outputs: Any) -> str:
    """What a step returned, in a few words for an error message."""
    if isinstance(outputs, dict):
        return f"a dictionary with {', '.join(map(str, outputs)) or 'nothing'}"
    return "nothing" if outputs is None else f"a {type(outputs).__name__}"


def described_images(labels: Tensor) -> str:
    """Number of images and of their classes, in words, from the labels ``(N,)``."""
    return described_numbers(len(labels), len(labels.unique()))


def described_numbers(images: int, classes: int) -> str:
    """Numbers of images and of their classes, in words."""
    return f"{images:,} image{'s' * (images != 1)} of {classes:,} class{'es' * (classes != 1)}"


def class_values(scores: Tensor, labels: Tensor, names: Sequence[str]) -> dict[int, dict[str, float]]:
    """Mean scores of each class, by label and name.

    Args:
        scores: Of the images of all processes, ``(N, S)``; an image whose scores are ``nan`` does not count.
        labels: Any integers, ``(N,)``.
        names: S names.

    Returns:
        For each label, the means by name; ``nan`` if no image counts.

    Example:
        >>> class_values(torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([7, 7, 2]), ["knn"])
        {2: {'knn': 1.0}, 7: {'knn': 0.5}}
    """
    classes, index = labels.unique(return_inverse=True)
    means = average_scores(scores, index, "none", len(classes)).tolist()
    return {label: dict(zip(names, row, strict=True)) for label, row in zip(classes.tolist(), means, strict=True)}


def class_names(trainer: Trainer, num_classes: int) -> list[str]:
    """Names of the classes 0..C-1: those of the data module, and the index of each class that it does not name.

    Args:
        trainer: With or without a data module.
        num_classes: C, the least number of names.

    Returns:
        At least C names.
    """
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None) or []
    return [str(name) for name in names] + [str(label) for label in range(len(names), num_classes)]


def gather_in_order(parts: list[Tensor], device: torch.device) -> Tensor:
    """Values of all processes in the order of the data set, where process r of W evaluates r, r + W, r + 2 W, ...

    Args:
        parts: This process's values, ``(N_i, ...)`` each.
        device: On which the processes communicate.

    Returns:
        ``(sum of N_i over all processes, ...)`` on the CPU.
    """
    values = torch.cat(parts)
    if world_size() == 1:
        return values.cpu()
    index = torch.distributed.get_rank() + world_size() * torch.arange(len(values), device=device)
    return gather_rows(values.to(device))[gather_rows(index).argsort()].cpu()


class EvaluationCallback(Callback):
    """Evaluates the embeddings that validation and test steps return.

    A subclass implements :meth:`reset`, :meth:`update` and :meth:`compute`, as a torchmetrics metric does, and
    :meth:`missing` if it requires more than embeddings. It works with any LightningModule whose validation step returns
    a dictionary with ``embeddings (N, D)`` and ``labels (N,)``, and with any data loader. What is missing is reported
    in one line when the run starts, and a validation step that returns no embeddings after its first batch; for a test
    step this is a warning. Sanity checks are not evaluated, and a fit evaluates every n-th epoch only.
    ``trainer.validate`` and ``trainer.test`` always evaluate.

    Args:
        every_n_epochs: Epochs of training from one evaluation to the next. auto, for a subclass that implements
            :meth:`plan`: as many as keep validation at about 10 % of the time, and also the first and the last epoch.

    Attributes:
        progress_bar: Names of the values that the progress bar shows.
        num_classes: C, for a subclass that has the argument; None: that of the data module, else of the labels seen.
        required: Whether it is an error if something is missing. False for a callback that nobody has asked for, such
            as those of every run of the command: it is then left out, with one line unless the steps return no
            embeddings.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1; and at the start of a run, if something is missing.
    """

    progress_bar: frozenset[str] = frozenset()
    num_classes: int | None = None
    required: bool = True

    def __init__(self, every_n_epochs: int | Literal["auto"] = 1) -> None:
        if every_n_epochs != "auto" and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self.planned: Plan | None = None  # for the fit that runs
        self._values: dict[str, float] = {}  # that were logged last
        self._found_embeddings = False  # in this epoch
        self._told: set[str] = set()  # lines that are written once

    def missing(self, trainer: Trainer) -> list[str]:
        """What the callback requires, beside embeddings, and the run does not have.

        Args:
            trainer: With its module and data module.

        Returns:
            What to pass, one text for each thing; the same on every process.
        """
        return []

    def plan(self, trainer: Trainer, pl_module: LightningModule) -> Plan | None:
        """What the arguments that are auto stand for in the fit that begins. Every process calls it.

        Args:
            trainer: With its loaders.
            pl_module: The module.

        Returns:
            The plan, the same on every process; None if nothing is auto.
        """
        return None

    def reset(self, trainer: Trainer) -> None:
        """Clear the state before an epoch.

        Args:
            trainer: The trainer.
        """
        raise NotImplementedError

    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        """Add a batch.

        Args:
            trainer: The trainer.
            embeddings: This process's ``(N, D)``, detached.
            labels: ``(N,)``.
            batch: As the step received it.
            index: Index of the data loader and of the batch.
        """
        raise NotImplementedError

    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        """Evaluate the epoch. Every process calls it, so collective operations are allowed.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "val" or "test".

        Returns:
            Scalars over all processes by name; empty if there is nothing to log.
        """
        raise NotImplementedError

    def log_values(self, trainer: Trainer, pl_module: LightningModule, stage: str, values: dict[str, Tensor]) -> None:
        """Log values as ``<stage>/<name>``.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "val" or "test".
            values: Scalars, the same on every process.
        """
        for name, value in values.items():
            # every process has the same value; without sync_dist Lightning warns that it might not
            prog_bar = name in self.progress_bar
            pl_module.log(f"{stage}/{name}", value.to(pl_module.device), prog_bar=prog_bar, sync_dist=True)
        if trainer.state.fn == TrainerFn.FITTING:
            self._values = {f"{stage}/{name}": float(value) for name, value in values.items()}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # not as state_dict, with which Lightning allows one callback of a class
        if self.planned is not None and self.planned.every > 1:
            checkpoint.setdefault(_VALUES, {}).update(self._values)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._values = {str(name): float(value) for name, value in checkpoint.get(_VALUES, {}).items()}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.planned = None
        if self.required and trainer.enable_validation:
            self._has_all(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_plan(trainer, pl_module)
        if self.planned is not None and self.planned.every > 1:  # checkpoints see the last values in a resumed run, too
            device = trainer.strategy.root_device
            values = {name: torch.tensor(value, device=device) for name, value in self._values.items()}
            trainer.callback_metrics.update(values)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.required:
            self._has_all(trainer)
        self._make_plan(trainer, pl_module)

    def _make_plan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fits and self.planned is None and trainer.val_dataloaders is not None and not self.missing(trainer):
            self.planned = self.plan(trainer, pl_module)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._found_embeddings = False
        forget_banks(trainer)
        self.reset(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        returned = step_embeddings(outputs)
        if returned is not None:
            self._found_embeddings = True
            if self._has_all(trainer) and self._is_due(trainer):
                self.update(trainer, *returned, batch, (dataloader_idx, batch_idx))
        elif self.required and batch_idx == 0 and not self._found_embeddings:
            self._report_no_embeddings(trainer, pl_module, outputs, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            stage = "test" if trainer.testing else "val"
            self.log_values(trainer, pl_module, stage, self.compute(trainer, pl_module, stage))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forget_banks(trainer)

    on_test_start = on_validation_start
    on_test_end = on_validation_end
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs != "auto":
            return epoch % self.every_n_epochs == 0
        number = epoch // (trainer.check_val_every_n_epoch or 1)  # of this validation
        return self.planned is None or number % self.planned.every == 0 or number == 1 or epoch == trainer.max_epochs

    def _has_all(self, trainer: Trainer) -> bool:
        """Whether nothing is missing; otherwise an error, or one line if the callback is not required."""
        missing = self.missing(trainer)
        if missing and self.required:
            raise ValueError(f"{type(self).__name__} requires {'; and '.join(missing)}")
        if missing:
            self._tell_once(f"{type(self).__name__} is left out: it requires {'; and '.join(missing)}")
        return not missing

    def _report_no_embeddings(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, loader: int) -> None:
        """Raise unless another data loader may still come; a test step without embeddings is one warning."""
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        if loader < len(loaders) - 1:
            return
        step = f"{type(pl_module).__name__}.{'test' if trainer.testing else 'validation'}_step"
        line = f"{type(self).__name__} requires that {step} returns {_WANTED}, got {described(outputs)}"
        if not trainer.testing:
            raise ValueError(line)
        if line not in self._told:
            self._told.add(line)
            rank_zero_warn(line)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            rank_zero_info(line)

    def _known_num_classes(self, trainer: Trainer) -> int | None:
        """C as passed, or that of the data module; None: it is found from the labels."""
        return self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
