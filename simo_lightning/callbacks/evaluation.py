"""The base class of callbacks that evaluate embeddings."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from simo_lightning.distributed import gather_rows, world_size


def step_embeddings(outputs: Any) -> tuple[Tensor, Tensor] | None:
    """Embeddings and labels that a step returned for callbacks.

    Args:
        outputs: Of a training, validation or test step.

    Returns:
        This process's ``embeddings (N, D)``, detached, and ``labels (N,)``; None where the step returned none.

    Example:
        >>> step_embeddings({"loss": 0.5}) is None
        True
    """
    if isinstance(outputs, dict) and "embeddings" in outputs:
        return outputs["embeddings"].detach(), outputs["labels"]
    return None


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

    A subclass implements :meth:`reset`, :meth:`update` and :meth:`compute`, as a torchmetrics metric does. A module
    whose steps return no dictionary with ``embeddings`` and ``labels`` is not evaluated. Sanity checks are not
    evaluated either, and a fit evaluates every n-th epoch only. ``trainer.validate`` and ``trainer.test`` always
    evaluate.

    Args:
        every_n_epochs: Epochs of training from one evaluation to the next.

    Attributes:
        progress_bar: Names of the values that the progress bar shows.
        num_classes: C, for a subclass that requires it; None: ``trainer.datamodule.num_classes``.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1.
    """

    progress_bar: frozenset[str] = frozenset()
    num_classes: int | None = None

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs

    def check(self, trainer: Trainer) -> None:
        """Raise if the module or the data module lacks what the callback requires; called in the sanity check too.

        Args:
            trainer: With its module and data module.
        """

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

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
            self.check(trainer)
            if self._is_due(trainer):
                self.update(trainer, *returned, batch, (dataloader_idx, batch_idx))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            stage = "test" if trainer.testing else "val"
            self.log_values(trainer, pl_module, stage, self.compute(trainer, pl_module, stage))

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _known_num_classes(self, trainer: Trainer) -> int:
        """C as passed, or that of the data module."""
        num_classes: int | None = self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if num_classes is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} requires the number of classes: pass {name}(num_classes=...) or a data module with the "
                "attribute num_classes, got neither"
            )
        return num_classes
