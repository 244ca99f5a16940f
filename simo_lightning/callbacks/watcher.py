"""What the callbacks that judge embeddings have in common: where Lightning hands them over."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


def embedded_rows(outputs: Any) -> tuple[Tensor, Tensor] | None:
    """What a step returned for callbacks.

    Args:
        outputs: Of a training, validation or test step.

    Returns:
        This process's ``embeddings (N, D)``, detached, and ``labels (N,)``; None where the step returned none.

    Example:
        >>> embedded_rows({"loss": 0.5}) is None
        True
    """
    if isinstance(outputs, dict) and "embeddings" in outputs:
        return outputs["embeddings"].detach(), outputs["labels"]
    return None


class EmbeddingWatcher(Callback):
    """Hands the embeddings that validation and test steps return to three methods.

    A subclass fills in :meth:`begin`, :meth:`collect` and :meth:`finish`. A module whose steps return no dictionary
    with ``embeddings`` and ``labels`` is left alone, and so are epochs that are not due: the sanity check, and while
    fitting all but every n-th epoch. Validation and test by themselves are always due.

    Args:
        every_n_epochs: Epochs of training from one measurement to the next.

    Raises:
        ValueError: If it is below 1.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs

    def begin(self) -> None:
        """Forget the last epoch."""
        raise NotImplementedError

    def check(self, trainer: Trainer) -> None:
        """Raise if the trainer's parts lack what the callback needs; called in the sanity check too.

        Args:
            trainer: With its module and data module.
        """

    def collect(self, trainer: Trainer, embeddings: Tensor, labels: Tensor) -> None:
        """Take a batch.

        Args:
            trainer: The trainer.
            embeddings: This process's ``(N, D)``, detached.
            labels: ``(N,)``.
        """
        raise NotImplementedError

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Judge the epoch; collectives are allowed: every process comes here.

        Args:
            trainer: The trainer.
            pl_module: Logs.
            stage: "val" or "test".
        """
        raise NotImplementedError

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.begin()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self.begin()

    def on_validation_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        self._take(trainer, outputs)

    def on_test_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        self._take(trainer, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._is_due(trainer):
            self.finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._is_due(trainer):
            self.finish(trainer, pl_module, "test")

    def _take(self, trainer: Trainer, outputs: Any) -> None:
        rows = embedded_rows(outputs)
        if rows is not None:
            self.check(trainer)
            if self._is_due(trainer):
                self.collect(trainer, *rows)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0
