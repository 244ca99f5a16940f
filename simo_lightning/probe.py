"""ProbeModule: trains a classifier on a frozen encoder."""

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy

from simo_lightning.checkpoints import CheckpointMixin, known_preprocessing, load_encoder
from simo_lightning.class_paths import describe
from simo_lightning.preprocessing import Preprocessing, encoder_input
from simo_lightning.schedules import with_schedule

Head = Literal["linear", "mlp"]


class ProbeModule(CheckpointMixin, pl.LightningModule):
    """Trains a linear or MLP head on a frozen encoder with cross-entropy.

    The paper trains the MLP head for one epoch. Logs ``train/loss``, ``val/accuracy`` and ``test/accuracy``.

    Args:
        num_classes: C, >= 2.
        checkpoint: Checkpoint of a SimOModule, whose encoder is used. Either this or `encoder`.
        encoder: Maps images to embeddings. Either this or `checkpoint`.
        head: "linear", or "mlp": Linear, ReLU, Linear.
        hidden_dim: Width of the MLP, >= 1.
        layer: Input of the head: the "embedding", or the backbone's "features" (the encoder's ``features(images)``).
        optimizer: Maps parameters to an optimizer.
        lr_scheduler: Maps an optimizer to a scheduler; None for a constant rate. See SimOModule.
        trusted: Import paths of classes, modules or packages that may be built from `checkpoint`, in addition to those
            of simo_lightning, torch, torchvision, timm and pytorch_metric_learning.
        preprocessing: As for SimOModule. With `checkpoint` it is that of the checkpoint, if that has one.

    Raises:
        ValueError: If not exactly one of `checkpoint` and `encoder` is given, an argument is out of its range, or
            another `preprocessing` than that of the checkpoint is given.

    Source:
        Linear evaluation is the usual protocol. An MLP head trained for one epoch follows arXiv 2410.05233, which does
        not state its width.
    """

    path_arguments = ("checkpoint", "trusted")  # never taken from a checkpoint

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
        preprocessing: Preprocessing | None = None,
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
            stored = self.__dict__.get("_init_arguments", {})
            if "checkpoint" in stored:  # describe the encoder itself, since the file may move
                stored |= {"checkpoint": None, "encoder": describe(encoder), "trusted": None}
            of_checkpoint: Any = getattr(encoder, "preprocessing", None)
            if isinstance(of_checkpoint, Preprocessing):
                given = {} if preprocessing is None else vars(preprocessing)
                of_checkpoint.check_arguments(given, "preprocessing", f"checkpoint {checkpoint}")
                preprocessing = of_checkpoint
        if layer == "features" and not hasattr(encoder, "features"):
            raise ValueError(f"layer 'features' needs an encoder with features(images), got {type(encoder).__name__}")
        self.encoder = encoder.requires_grad_(False).eval()
        self.layer, self.optimizer, self.lr_scheduler = layer, optimizer, lr_scheduler
        self.head = _head(head, _input_dim(encoder, layer), hidden_dim, num_classes)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.preprocessing = preprocessing

    def setup(self, stage: str) -> None:
        """Silence Lightning's warning about modules in evaluation mode, which the encoder is by design."""
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def train(self, mode: bool = True) -> "ProbeModule":
        """Set the `mode` of the head; the encoder stays in evaluation mode, so its running statistics do not change."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, C, H, W)``: uint8 of any size, or normalised floats."""
        images = encoder_input(images, known_preprocessing(self), check_range=not self.training).to(self.dtype)
        with torch.no_grad():
            inputs = self.encoder(images) if self.layer == "embedding" else self.encoder.features(images)  # type: ignore[operator]
        logits: Tensor = self.head(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images).float(), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update ``val/accuracy``."""
        self._log_accuracy(batch, "val/accuracy")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update ``test/accuracy``."""
        self._log_accuracy(batch, "test/accuracy")

    def configure_optimizers(self) -> Any:
        """Optimizer of the head's parameters, and its schedule."""
        return with_schedule(self.optimizer(self.head.parameters()), self.lr_scheduler, self.trainer)

    def _log_accuracy(self, batch: tuple[Tensor, Tensor], name: str) -> None:
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
        raise ValueError(f"encoder must have an integer attribute {name}, got {type(encoder).__name__} without it")
    return size
