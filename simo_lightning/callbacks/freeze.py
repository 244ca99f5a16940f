"""FreezeBackbone: trains the projector alone in the first epochs."""

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override


class FreezeBackbone(pl.Callback):
    """Keeps the backbone of an encoder fixed in the first epochs, or in all.

    While it is fixed, the backbone is in evaluation mode: BatchNorm normalises by its running statistics and does not
    update them. The optimizer holds the backbone's parameters from the start, so parameter groups and schedules are as
    without this callback, and a resumed run is the same. In one process no gradient of the backbone is computed; with
    several, where DDP expects all gradients, they are computed and discarded.

    Args:
        epochs: Number of first epochs in which the backbone is fixed, >= 0; None: all.

    Raises:
        ValueError: If ``epochs`` is negative; at the start of a fit, if the module has no backbone, or nothing else to
            train.

    Example:
        >>> callback = FreezeBackbone(epochs=5)
    """

    def __init__(self, epochs: int | None = None) -> None:
        if epochs is not None and epochs < 0:
            raise ValueError(f"epochs must be at least 0, or None for the whole run, got {epochs}")
        self.epochs = epochs
        self._trainable: list[nn.Parameter] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        backbone = _backbone(pl_module)
        self._trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        own = set(self._trainable)
        if not any(parameter.requires_grad and parameter not in own for parameter in pl_module.parameters()):
            raise ValueError("FreezeBackbone needs parameters outside of the backbone to train, such as a projector")

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        frozen = self._is_frozen(trainer)
        _backbone(pl_module).train(not frozen)
        if trainer.world_size == 1:
            for parameter in self._trainable:
                parameter.requires_grad_(not frozen)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._is_frozen(trainer):
            for parameter in self._trainable:
                parameter.grad = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._trainable = []

    def _is_frozen(self, trainer: pl.Trainer) -> bool:
        return self.epochs is None or trainer.current_epoch < self.epochs


def _backbone(module: pl.LightningModule) -> nn.Module:
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"FreezeBackbone needs a module with a backbone, got {type(module).__name__} without it")
    return backbone
