"""Log the geometry of the embeddings of validation and test, and of training batches."""

from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.moments import ClassMomentsCallback
from simo_lightning.functional.geometry import computable_metrics, not_computed
from simo_lightning.functional.moments import SECOND_BUDGET_MB, ClassMoments


class GeometryMonitor(ClassMomentsCallback):
    """Log every metric of :data:`~simo_lightning.functional.geometry.GEOMETRY` after each validation and test epoch.

    The names are ``val/class_cosine``, ``test/effective_rank`` and so on. With ``every_n_steps`` also
    ``train/class_cosine`` and so on, of all training batches since the last evaluation, as
    :class:`~simo_lightning.callbacks.moments.ClassMomentsCallback` describes. The values are exact over batches,
    loaders and processes. It works with any module whose validation step returns ``embeddings`` and ``labels``.

    Args:
        num_classes: C; None: ``trainer.datamodule.num_classes``, else one more than the largest label.
        every_n_epochs: Epochs of training from one evaluation of validation to the next.
        every_n_steps: Optimizer steps from one evaluation of training batches to the next; None: none.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``. Where they would be
            larger, the metrics that require them are left out, with one line in the log.

    Attributes:
        moments: Class moments of the last epoch of validation or test, over all processes, on the CPU; None before.

    Raises:
        ValueError: If a number is below 1; and at the start of a run, if its steps return no embeddings.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        second_budget_mb: float = SECOND_BUDGET_MB,
    ) -> None:
        super().__init__(num_classes, every_n_epochs, every_n_steps, second_budget_mb)
        self.moments: ClassMoments | None = None

    @override
    def evaluate(self, trainer: Trainer, stage: str, moments: ClassMoments) -> dict[str, Tensor]:
        if stage != "train":
            self.moments = moments
        line = not_computed(moments, self.second_budget_mb)
        if line:
            self._tell_once(f"GeometryMonitor: {line}")
        return {name: metric(moments) for name, metric in computable_metrics(moments).items()}
