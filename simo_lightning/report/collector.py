"""Keeps the embeddings, labels and small copies of the images of one pass over a split."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, gather_in_order
from simo_lightning.distributed import gather_rows, rank, world_size
from simo_lightning.plotting.pixels import are_images, as_pixels
from simo_lightning.report.pictures import EmbeddedImages


class EmbeddingCollector(EvaluationCallback):
    """Keeps the embeddings of a validation or test pass, on the CPU, in the order of the data set.

    It accepts any module whose steps return ``embeddings`` and ``labels``. Images are kept if each batch begins with a
    tensor ``(N, C, H, W)`` of one or three channels, as uint8 of at most 64 pixels a side: normalisation is undone by
    the data module's ``mean`` and ``std`` if it has them, else each image is scaled from its minimum to its maximum.

    Args:
        max_images: Images to keep over all processes; of more every n-th is kept. The embeddings of all are kept.

    Attributes:
        result: Embeddings and images of the last pass, on every process; None before it, or if the steps returned no
            embeddings.
    """

    required = False  # write_report names what is missing

    def __init__(self, max_images: int = 20_000) -> None:
        super().__init__()
        self.max_images = max_images
        self.result: EmbeddedImages | None = None
        self._embeddings: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._images: list[Tensor] = []  # every self._step-th image of this process
        self._has_images, self._step, self._seen = True, 1, 0

    @override
    def reset(self, trainer: Trainer) -> None:
        self._embeddings, self._labels, self._images = [], [], []
        self._has_images, self._step, self._seen = True, 1, 0

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        self._embeddings.append(embeddings.to("cpu", torch.promote_types(embeddings.dtype, torch.float32)))
        self._labels.append(labels.cpu())
        images: Any = batch[0] if isinstance(batch, (list, tuple)) and batch else None
        self._has_images &= are_images(images, len(labels))
        if self._has_images:
            kept = images[-self._seen % self._step :: self._step]
            self._images.append(as_pixels(kept, getattr(trainer, "datamodule", None)).cpu())
            while sum(map(len, self._images)) > math.ceil(self.max_images / world_size()):
                self._images, self._step = [torch.cat(self._images)[::2]], 2 * self._step
        self._seen += len(labels)

    @override
    @torch.no_grad()
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        if not self._embeddings:
            return {}
        device = trainer.strategy.root_device
        embeddings, labels = gather_in_order(self._embeddings, device), gather_in_order(self._labels, device)
        images, index = self._gather_images(device) if self._has_images and self._images else (None, None)
        self.reset(trainer)
        self.result = EmbeddedImages(embeddings, labels, images, index)
        return {}

    def _gather_images(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The kept images of all processes and their positions in the split, both in its order."""
        images = torch.cat(self._images)
        # of the data set, process r of W evaluates r, r + W, r + 2 W, ...
        index = rank() + world_size() * self._step * torch.arange(len(images))
        index, images = gather_rows(index.to(device)).cpu(), gather_rows(images.to(device)).cpu()
        order = index.argsort()
        return images[order], index[order]
