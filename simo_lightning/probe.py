"""ProbeModule: trains a head on a frozen encoder, to measure what the embedding knows."""

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy

from simo_lightning.checkpoints import CheckpointMixin, load_encoder
from simo_lightning.class_paths import describe
from simo_lightning.schedules import with_schedule

Head = Literal["linear", "mlp"]


class ProbeModule(CheckpointMixin, pl.LightningModule):
    """Trains a linear or MLP head on a frozen encoder with cross-entropy.

    One epoch of the MLP head is the paper's protocol. Logs ``train/loss``, ``val/accuracy`` and ``test/accuracy``.

    Args:
        num_classes: C, >= 2.
        checkpoint: Of a SimOModule whose encoder is probed; or give `encoder`.
        encoder: From images to embeddings; or give `checkpoint`.
        head: "linear", or "mlp": Linear, ReLU, Linear.
        hidden_dim: Width of the MLP, >= 1.
        layer: What is probed: the "embedding", or the backbone's "features" (the encoder's ``features(images)``).
        optimizer: From parameters to an optimizer.
        lr_scheduler: From an optimizer to a scheduler, None for a constant rate; see SimOModule.
        trusted: Import paths of classes, modules or packages whose encoders are built from `checkpoint`, beside those
            of simo_lightning, torch, torchvision, timm and pytorch_metric_learning.

    Raises:
        ValueError: If not exactly one of `checkpoint` and `encoder` is given, or an argument is out of its range.

    Source:
        Linear evaluation as usual; the MLP head trained for one epoch after arXiv 2410.05233, whose width is not
        public.
    """

    path_arguments = ("checkpoint",)  # which no checkpoint may set

    def __init__(
        self,
        num_classes: int,
        checkpoint: str | None = None,
        encoder: nn.Module | None = None,
        head: Head = "linear",
        hidden_dim: int = 256,
        layer: Literal["embedding", "features"] = "embedding",
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        trusted: list[str] | None = None,
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (encoder is None):
            raise ValueError(
                f"exactly one of checkpoint and encoder must be given, got checkpoint={checkpoint!r} and "
                f"{'an' if encoder is not None else 'no'} encoder"
            )
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        if encoder is None:
            encoder = load_encoder(str(checkpoint), map_location="cpu", trusted=trusted or ())
            # The probe's own checkpoints describe the encoder itself: the first file may move.
            self.__dict__["_init_arguments"] |= {"checkpoint": None, "encoder": describe(encoder)}
        if layer == "features" and not hasattr(encoder, "features"):
            raise ValueError(f"layer 'features' needs an encoder with features(images), got {type(encoder).__name__}")
        self.encoder = encoder.requires_grad_(False).eval()
        self.layer, self.optimizer, self.lr_scheduler = layer, optimizer, lr_scheduler
        self.head = _head(head, _input_dim(encoder, layer), hidden_dim, num_classes)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Leave out Lightning's warning that parts are in evaluation mode: the encoder is meant to be.

        Args:
            stage: Unused.
        """
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def train(self, mode: bool = True) -> "ProbeModule":
        """Training mode for the head; the encoder stays in evaluation mode, its running statistics with it.

        Args:
            mode: Whether to train.

        Returns:
            Itself.
        """
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of images.

        Args:
            images: ``(N, C, H, W)``.

        Returns:
            Logits ``(N, num_classes)``.
        """
        images = images.to(self.dtype)
        with torch.no_grad():
            rows = self.encoder(images) if self.layer == "embedding" else self.encoder.features(images)  # type: ignore[operator]
        logits: Tensor = self.head(rows)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch.

        Args:
            batch: Images and labels.
            batch_idx: Number of the batch.

        Returns:
            Scalar.
        """
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images).float(), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right answers.

        Args:
            batch: Images and labels.
            batch_idx: Number of the batch.
        """
        self._judge(batch, "val/accuracy")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """As :meth:`validation_step`.

        Args:
            batch: Images and labels.
            batch_idx: Number of the batch.
        """
        self._judge(batch, "test/accuracy")

    def configure_optimizers(self) -> Any:
        """Optimizer over the head's parameters, and the schedule.

        Returns:
            What Lightning wants.
        """
        return with_schedule(self.optimizer(self.head.parameters()), self.lr_scheduler, self.trainer)

    def _judge(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log(name, self.accuracy, on_epoch=True, prog_bar=True)


def _head(head: Head, input_dim: int, hidden_dim: int, num_classes: int) -> nn.Module:
    if head == "linear":
        return nn.Linear(input_dim, num_classes)
    if head != "mlp":
        raise ValueError(f"head must be 'linear' or 'mlp', got {head!r}")
    if hidden_dim < 1:
        raise ValueError(f"hidden_dim must be >= 1, got {hidden_dim}")
    return nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_classes))


def _input_dim(encoder: nn.Module, layer: str) -> int:
    name = "embedding_dim" if layer == "embedding" else "feature_dim"
    size = getattr(encoder, name, None)
    if not isinstance(size, int):
        raise ValueError(f"encoder must say its size as the attribute {name}, got {type(encoder).__name__} without")
    return size
