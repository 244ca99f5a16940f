"""SimOModule: trains an encoder with a contrastive loss."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from simo_lightning.checkpoints import SelfContained
from simo_lightning.distributed import gather_rows
from simo_lightning.losses import SimOLoss
from simo_lightning.schedules import with_schedule

Batch = tuple[Tensor, Tensor]


class SimOModule(SelfContained, pl.LightningModule):  # type: ignore[misc]  # its load_from_checkpoint takes less
    """Trains an encoder so that embeddings of one class align and those of different classes are orthogonal.

    Everything is injected, so a subclass overrides one method and a config swaps one part. Validation and test return
    ``{"embeddings": (N, D), "labels": (N,)}``: the callbacks judge them.

    Args:
        encoder: From images ``(N, C, H, W)`` to embeddings ``(N, D)``.
        loss: ``(embeddings, labels) -> scalar``; SimOLoss by default, or any other, such as those of
            pytorch-metric-learning. Where it has ``terms(embeddings, labels)``, its parts are logged by name.
        optimizer: From parameters to an optimizer.
        lr_scheduler: From an optimizer to a scheduler, None for a constant rate. One with a method ``stretch``, such
            as OneCycle, is told the length of the run and moves at every step; others move at every epoch.
        channels_last: Keep images and convolutions in the memory layout (N, H, W, C), which most hardware runs faster;
            the result is the same up to rounding.
        micro_batch_size: Images that are embedded at a time in training; None for all at once. The loss stays that of
            the whole batch over all processes, and the gradient is exact, but only so many images' activations are in
            memory: each micro-batch is embedded again on the way back, which costs one more forward pass. A process's
            batch is cut into as few and as equal parts as may be. BatchNorm takes its statistics from each part, so
            that they are noisier than of the whole batch, and its running ones move once per part; choose norm "layer"
            or "group" where the result must not depend on the size. Dropout draws the same both times.
        compile: Compile the encoder by ``torch.compile`` when a fit starts: the first steps take long, the others are
            faster on a GPU. Needs a C++ compiler, on a GPU Triton.

    Raises:
        ValueError: If ``micro_batch_size`` is under 1.

    Example:
        >>> from simo_lightning.encoders import ImageEncoder
        >>> module = SimOModule(ImageEncoder("resnet10", width=0.125), SimOLoss(form="log"))
        >>> module.embed(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        encoder: nn.Module,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        channels_last: bool = False,
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, or None for whole batches, got {micro_batch_size}")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = encoder.to(memory_format=self.memory_format)
        self.loss = SimOLoss() if loss is None else loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.micro_batch_size = micro_batch_size
        self.compile_encoder = compile

    def setup(self, stage: str) -> None:
        """Compile the encoder, if asked to; its weights keep their names.

        Args:
            stage: Only "fit" compiles: what validates or plots a checkpoint needs no compiler.
        """
        if self.compile_encoder and stage == "fit":
            self.encoder.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images: ``(N, C, H, W)``, as the data module normalises them.

        Returns:
            ``(N, D)``.
        """
        embeddings: Tensor = self.encoder(images.to(self.dtype, memory_format=self.memory_format))
        return embeddings

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings in float32 or better, as validation, kNN and the plots see them.

        Args:
            images: ``(N, C, H, W)``.

        Returns:
            ``(N, D)``.
        """
        embeddings = self(images)
        return embeddings if embeddings.dtype == torch.float64 else embeddings.float()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss of the global batch: the rows of all processes together.

        Args:
            batch: This process's images ``(N, C, H, W)`` and labels ``(N,)``.
            batch_idx: Number of the batch.

        Returns:
            ``loss``; and this process's ``embeddings`` and ``labels`` for callbacks, detached.

        Raises:
            ValueError: If the loss or an embedding is nan or infinite; the message names the step.
        """
        images, labels = batch
        embeddings = self._embed_in_parts(images)
        terms = self.loss_terms(gather_rows(embeddings), gather_rows(labels))
        first, *others = terms.values()
        loss = sum(others, first)
        if not loss.isfinite():
            raise ValueError(f"train/loss must be finite, got {float(loss.detach())} at step {self.global_step}")
        if self._is_reported(batch_idx):
            self.log("train/loss", loss, prog_bar=True)
            if len(terms) > 1:
                self.log_dict({f"train/loss_{name}": term for name, term in terms.items()})
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels}

    def _is_reported(self, batch_idx: int) -> bool:
        """Whether anybody looks at this step's loss: a logger, the progress bar, or who monitors the epoch's last.

        A call of ``log`` costs 0.4 ms, and a step of a small encoder 50.
        """
        trainer: Any = self._trainer
        if trainer is None:  # a loop of one's own
            return False
        every, step = trainer.log_every_n_steps, self.global_step + 1
        return batch_idx % 10 == 9 or trainer.is_last_batch or bool(every and step % every == 0)

    def _embed_in_parts(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of a training batch, by micro-batches that each forget their activations."""
        if self.micro_batch_size is None or len(images) <= self.micro_batch_size:
            return self.embed(images)
        parts = images.tensor_split(-(-len(images) // self.micro_batch_size))
        passes = partial(_two_passes, self)
        # The recomputation runs inside autograd, part by part, so DDP, GradScaler and accumulation see one backward.
        return torch.cat([checkpoint(self.embed, part, use_reentrant=False, context_fn=passes) for part in parts])

    def loss_terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Parts of the loss by name, outside any autocast; what is minimised is their sum.

        Args:
            embeddings: Of the global batch, ``(N, D)``.
            labels: ``(N,)``.

        Returns:
            Scalars.

        Raises:
            ValueError: As the loss does, with the step.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            try:
                if callable(getattr(self.loss, "terms", None)):
                    terms: dict[str, Tensor] = self.loss.terms(embeddings, labels)  # type: ignore[operator]
                    return terms
                return {"loss": self.loss(embeddings, labels)}
            except ValueError as error:
                raise ValueError(f"at step {self.global_step}: {error}") from error

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings and labels for the callbacks.

        Args:
            batch: Images ``(N, C, H, W)`` and labels ``(N,)``.
            batch_idx: Number of the batch.

        Returns:
            ``embeddings (N, D)`` and ``labels (N,)``.
        """
        images, labels = batch
        return {"embeddings": self.embed(images), "labels": labels}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`.

        Args:
            batch: Images and labels.
            batch_idx: Number of the batch.

        Returns:
            ``embeddings`` and ``labels``.
        """
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`.

        Args:
            batch: Images and labels.
            batch_idx: Number of the batch.

        Returns:
            ``embeddings`` and ``labels``.
        """
        return self.validation_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout and the like a function of (seed, epoch, batch, rank), so that a resumed run draws the same.

        Args:
            batch: Unused.
            batch_idx: Number of the batch.
        """
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by seed_everything and so by the command line
        if seed is not None:
            key = (int(seed), self.current_epoch, batch_idx, self.global_rank)
            mixed = int(np.random.SeedSequence(key).generate_state(1)[0])
            # torch.manual_seed would ask all kinds of devices, 0.3 ms
            torch.default_generator.manual_seed(mixed)
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(mixed)

    def configure_optimizers(self) -> Any:
        """Optimizer over the encoder's and the loss's parameters, and the schedule.

        Returns:
            What Lightning wants.
        """
        optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        return with_schedule(optimizer, self.lr_scheduler, self.trainer)


def _two_passes(module: nn.Module) -> tuple[Any, Any]:
    """Contexts of a part's two forward passes: the second sees the buffers that the first saw, and leaves no trace.

    So running statistics move once per part and whatever else a forward pass keeps in a buffer is the same in both.
    """
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    return _remember(module, buffers), _revisit(buffers)


@contextmanager
def _remember(module: nn.Module, buffers: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    for part in module.modules():
        buffers += [(part, name, buffer.clone()) for name, buffer in part.named_buffers(recurse=False)]
    yield


@contextmanager
def _revisit(buffers: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    current = [getattr(part, name) for part, name, _ in buffers]
    try:
        for part, name, former in buffers:
            setattr(part, name, former)
        yield
    finally:
        for (part, name, _), buffer in zip(buffers, current, strict=True):
            setattr(part, name, buffer)
