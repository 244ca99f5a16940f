"""Writes the embeddings of a prediction to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.evaluation import gather_in_order, step_embeddings
from simo_lightning.checkpoints import TrainingClasses
from simo_lightning.functional.decomposition import orthogonal_shares
from simo_lightning.functional.neighbors import unit_vectors

_ROWS = 2**14  # embeddings whose shares are computed at a time, in float64


class EmbeddingWriter(BasePredictionWriter):
    """Writes ``<run folder>/predictions/embeddings.npz``, in the order of the data set, on any number of processes.

    The file holds ``embeddings`` float32 ``(N, D)``, ``labels`` int64 ``(N,)`` and ``class_names`` of the data. If the
    module knows the means of the C classes that it was trained on (its attribute ``classes``), it also holds
    ``known_classes`` ``(C,)``, their names; ``nearest`` int64 ``(N,)``, the index in them of the class mean with the
    largest cosine, and ``cosine`` float32 ``(N,)``; ``shares`` float32 ``(N, C)`` and ``rest`` float32 ``(N,)``, as
    :func:`~simo_lightning.functional.orthogonal_shares` defines them.

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
        embeddings = embeddings.float()
        arrays: dict[str, Any] = {
            "embeddings": embeddings.numpy(),
            "labels": labels.numpy(),
            "class_names": np.array(names),
        }
        arrays |= _by_classes(embeddings, getattr(pl_module, "classes", None))
        np.savez(path, **arrays)
        rank_zero_info(f"{len(labels)} embeddings written to {path}")


def _by_classes(embeddings: Tensor, classes: TrainingClasses | None) -> dict[str, np.ndarray]:
    """Nearest class mean and shares of each embedding; empty without class means."""
    if not isinstance(classes, TrainingClasses) or classes.means is None or classes.means.isnan().any(dim=1).all():
        return {}
    means = classes.means.cpu()
    cosines = unit_vectors(embeddings) @ unit_vectors(means.nan_to_num(nan=0.0)).mT
    largest = cosines.masked_fill(means.isnan().any(dim=1), -torch.inf).max(dim=1)
    parts = [orthogonal_shares(part, means) for part in embeddings.split(_ROWS)]
    shares, rest = (torch.cat([values.float() for values in each]) for each in zip(*parts, strict=True))
    return {
        "known_classes": np.array(classes.names),
        "nearest": largest.indices.numpy(),
        "cosine": largest.values.numpy(),
        "shares": shares.numpy(),
        "rest": rest.numpy(),
    }
