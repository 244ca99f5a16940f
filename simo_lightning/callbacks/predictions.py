"""Writes the embeddings of a prediction to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from simo_lightning.distributed import gather_rows, world_size


class EmbeddingWriter(BasePredictionWriter):
    """Writes ``<run folder>/predictions/embeddings.npz``, in the order of the data set, on any number of processes.

    The file holds ``embeddings`` float32 ``(N, D)``, ``labels`` int64 ``(N,)`` and ``class_names`` ``(C,)``.
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
        rows = {name: torch.cat([output[name] for output in predictions]) for name in ("embeddings", "labels")}
        # Process r holds the images r, r + W, r + 2 W ...
        index = trainer.global_rank + world_size() * torch.arange(len(rows["labels"]), device=rows["labels"].device)
        order = gather_rows(index).argsort()
        rows = {name: gather_rows(value)[order].cpu() for name, value in rows.items()}
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir, "predictions", "embeddings.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        names = getattr(getattr(trainer, "datamodule", None), "class_names", [])
        embeddings, labels = rows["embeddings"].numpy(), rows["labels"].numpy()
        np.savez(path, embeddings=embeddings, labels=labels, class_names=np.array(names))
        rank_zero_info(f"{len(order)} embeddings written to {path}")
