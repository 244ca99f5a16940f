"""Writes the embeddings of a prediction to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from simo_lightning.callbacks.evaluation import gather_in_order, step_embeddings


class EmbeddingWriter(BasePredictionWriter):
    """Writes ``<run folder>/predictions/embeddings.npz``, in the order of the data set, on any number of processes.

    The file holds ``embeddings`` float32 ``(N, D)``, ``labels`` int64 ``(N,)`` and ``class_names`` ``(C,)``.

    Raises:
        ValueError: At the end of a prediction, if its steps returned no ``embeddings`` and ``labels`` or it had several
            data loaders.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    @override
    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        returned = [step_embeddings(outputs) for outputs in predictions]
        parts = [each for each in returned if each is not None]
        if not parts or len(parts) < len(returned):
            raise ValueError(
                "EmbeddingWriter requires predict steps that return a dictionary with embeddings and labels, of one "
                f"data loader, got {type(predictions[0]).__name__ if predictions else 'no predictions'}"
            )
        device = trainer.strategy.root_device
        embeddings, labels = (gather_in_order(list(values), device) for values in zip(*parts, strict=True))
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir, "predictions", "embeddings.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        names = getattr(getattr(trainer, "datamodule", None), "class_names", [])
        np.savez(path, embeddings=embeddings.float().numpy(), labels=labels.numpy(), class_names=np.array(names))
        rank_zero_info(f"{len(labels)} embeddings written to {path}")
