"""Gives the embeddings to TensorBoard's projector, with class names and thumbnails."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.functional import interpolate, pad
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, class_names
from simo_lightning.distributed import gather_rows, largest_over_ranks, sum_over_ranks, world_size
from simo_lightning.plotting.canvas import printable, share
from simo_lightning.plotting.pixels import are_images, as_pixels

_LARGEST_SPRITE = 8192  # pixels of a side, which is what graphics cards of browsers take


class _Points(NamedTuple):
    """Embeddings ``(n, D)``, labels ``(n,)`` and thumbnails, uint8 ``(n, 3, S, S)``."""

    embeddings: Tensor
    labels: Tensor
    thumbnails: Tensor


class EmbeddingProjector(EvaluationCallback):
    """Write validation embeddings for TensorBoard's projector, with class names and thumbnails.

    ``tensorboard --logdir RUN`` shows them in its tab Projector, in two or three dimensions, by PCA, t-SNE or UMAP.
    After training, the embeddings of the last validation are written once, ``trainer.validate`` and ``trainer.test``
    write theirs; one line says how many and where. The files are ``<step>/val/tensors.tsv``, ``metadata.tsv`` and
    ``sprite.png`` in the folder of the TensorBoardLogger. Without such a logger the callback does nothing.

    The metadata are the name and the index of the class: the projector labels points by any number of names, and
    colours them by at most 50 names or by the index. Images become thumbnails if each batch begins with a tensor
    ``(N, C, H, W)`` of one or three channels; otherwise there is no sprite.

    Args:
        max_points: Largest number of points, over all processes; of more images every n-th is taken, with n the
            smallest power of two that is enough.
        thumbnail: Side of the square thumbnails in pixels. All of them are one picture, the sprite, of at most 8192
            pixels a side.

    Raises:
        ValueError: If a number is below 1, or the sprite would be too large.
    """

    required = False

    def __init__(self, max_points: int = 2000, thumbnail: int = 48) -> None:
        super().__init__()
        for name, value in (("max_points", max_points), ("thumbnail", thumbnail)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        side = math.ceil(math.sqrt(max_points)) * thumbnail
        if side > _LARGEST_SPRITE:
            raise ValueError(
                f"max_points={max_points} thumbnails of {thumbnail} pixels must fit in a square of {_LARGEST_SPRITE} "
                f"pixels, got {side}"
            )
        self.max_points = max_points
        self.thumbnail = thumbnail
        self._parts: list[_Points] = []  # every self._step-th image of this process
        self._step, self._seen, self._has_images = 1, 0, True
        self._last: tuple[_Points, int] | None = None  # points of the last validation in training, and images

    @override
    def reset(self, trainer: Trainer) -> None:
        self._parts, self._step, self._seen, self._has_images = [], 1, 0, True

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        if not _writers(trainer):
            return
        images: Any = batch[0] if isinstance(batch, list | tuple) and batch else None
        self._has_images &= are_images(images, len(labels))
        kept = slice(-self._seen % self._step, None, self._step)
        rows = embeddings[kept].float()
        thumbnails = rows.new_zeros(len(rows), 3, self.thumbnail, self.thumbnail, dtype=torch.uint8)
        if self._has_images and len(rows):
            thumbnails = _square(as_pixels(images[kept], getattr(trainer, "datamodule", None)), self.thumbnail)
        self._parts.append(_Points(rows, labels[kept].long(), thumbnails))
        self._seen += len(labels)
        while sum(len(part.labels) for part in self._parts) > max(1, self.max_points // world_size()):
            self._parts = [_Points(*(torch.cat(part)[::2] for part in zip(*self._parts, strict=True)))]
            self._step *= 2

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        device = trainer.strategy.root_device
        total = int(sum_over_ranks(torch.tensor(self._seen, device=device)))
        if not _writers(trainer) or not total:
            return {}
        dim = largest_over_ranks(self._parts[0].embeddings.shape[1] if self._parts else 0, device)
        without_images = largest_over_ranks(int(not self._has_images), device)
        empty = _Points(
            torch.zeros(0, dim, device=device),
            torch.zeros(0, dtype=torch.long, device=device),
            torch.zeros(0, 3, self.thumbnail, self.thumbnail, dtype=torch.uint8, device=device),
        )
        parts = [torch.cat(part) for part in zip(empty, *self._parts, strict=True)]
        points = _Points(*(gather_rows(part)[: self.max_points].cpu() for part in parts))
        points = points._replace(thumbnails=points.thumbnails[:0]) if without_images else points
        self.reset(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._last = points, total
        else:
            self._write(trainer, stage, points, total)
        return {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:
            self._write(trainer, "val", *self._last)
        self._last = None

    def _write(self, trainer: Trainer, stage: str, points: _Points, total: int) -> None:
        if not trainer.is_global_zero:
            return
        names = class_names(trainer, 0)
        metadata = [
            [printable(names[label]) if 0 <= label < len(names) else str(label), str(label)]
            for label in points.labels.tolist()
        ]
        # the writer multiplies by 255 and cuts the fraction off
        images = (points.thumbnails.float() + 0.5) / 255 if len(points.thumbnails) else None
        step = trainer.global_step
        for logger in _writers(trainer):
            folder = Path(logger.log_dir, f"{step:05d}", stage)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # says that the folder exists, of an earlier evaluation
                    logger.experiment.add_embedding(
                        points.embeddings, metadata, images, step, stage, metadata_header=["class", "index"]
                    )
                rank_zero_info(
                    f"EmbeddingProjector: {share(len(metadata), total)} {'test' if stage == 'test' else 'validation'} "
                    f"embeddings for TensorBoard's projector are in {folder}"
                )
            except OSError as error:
                rank_zero_warn(f"EmbeddingProjector cannot write {folder}: {error.strerror or error}")


def _writers(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _square(images: Tensor, side: int) -> Tensor:
    """Images (n, 1 or 3, H, W) on black squares, uint8 (n, 3, side, side), with the longer side enlarged or reduced."""
    longest = max(images.shape[2:])
    size = [max(1, round(length * side / longest)) for length in images.shape[2:]]
    mode = "nearest" if longest < side else "area"
    scaled = interpolate(images.float(), size=size, mode=mode).round().to(torch.uint8)
    top, left = ((side - length) // 2 for length in size)
    scaled = pad(scaled, (left, side - size[1] - left, top, side - size[0] - top))
    return scaled.expand(-1, 3, -1, -1)
