"""Log the geometry of the embeddings of validation and test, and of training batches."""

from lightning.pytorch import LightningModule, Trainer

from simo_lightning.callbacks.moments import MomentsWatcher
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import ClassMoments


class GeometryMonitor(MomentsWatcher):
    """Log every function of ``functional.geometry`` at the end of each validation and test epoch.

    The names are ``val/class_cosine``, ``test/effective_rank`` and so on; with ``every_n_steps`` also
    ``train/class_cosine`` and so on, of all training batches since the last time: embeddings as the loss saw them, of
    augmented images, in training mode, by the weights of those steps. The class moments of all embeddings that the
    steps return as ``outputs["embeddings"]`` with ``outputs["labels"]`` are summed, over batches, loaders and
    processes, so the numbers are exact; a module whose steps return no embeddings is left alone.

    Args:
        num_classes: C; None: ``trainer.datamodule.num_classes``.
        every_n_epochs: Epochs of training from one measurement of validation to the next.
        every_n_steps: Steps of the optimizer from one measurement of training batches to the next; None for none.

    Attributes:
        moments: Class moments of the last epoch of validation or test, over all processes, on the CPU; None before.

    Raises:
        ValueError: If a number is below 1; and when the first embeddings come, if the number of classes is not known.
    """

    def __init__(
        self, num_classes: int | None = None, every_n_epochs: int = 1, every_n_steps: int | None = None
    ) -> None:
        super().__init__(num_classes, every_n_epochs, every_n_steps)
        self.moments: ClassMoments | None = None

    def judge(self, trainer: Trainer, pl_module: LightningModule, stage: str, moments: ClassMoments) -> None:
        """Log under ``train/``, ``val/`` or ``test/``.

        Args:
            trainer: Has the loggers.
            pl_module: Logs.
            stage: "train", "val" or "test".
            moments: Of all processes.
        """
        if stage != "train":
            self.moments = moments
        self.record(trainer, pl_module, stage, {name: function(moments) for name, function in GEOMETRY.items()})
