"""Checks that several processes compute the gradient of one process."""

import os
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from simo_lightning.module import SimOModule
from simo_lightning.testing.trainers import quiet_and_seeded, set_variable, small_trainer

Batch = tuple[Tensor, Tensor]


class _Share(pl.LightningDataModule):
    """One batch, split into a part for each process."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        share = tuple(part.tensor_split(world)[rank] for part in self.batch)
        return DataLoader([share], batch_size=None)  # type: ignore[arg-type]


class _KeepGradients(Callback):
    """Writes the gradients of the first optimizer step to ``<folder>/<rank>.pt``."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for layer in pl_module.modules():  # these depend on the samples of one process by design
            if isinstance(layer, (_BatchNorm, _DropoutNd)):
                layer.eval()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(gradients, Path(self.folder, f"{trainer.global_rank}.pt"))


def check_gradient_parity(
    loss_or_module: nn.Module,
    batch: Batch | None = None,
    world_size: int = 2,
    precision: Any = "64-true",
    tolerance: float = 1e-9,
) -> None:
    """Check that DDP processes, each with a part of a batch, compute the gradient of one process with the whole batch.

    BatchNorm and dropout are in evaluation mode, because they depend on the samples of one process by design.

    Args:
        loss_or_module: A loss ``(embeddings, labels) -> scalar``, which is put into a SimOModule; or a LightningModule.
            It is not changed. It is sent to the processes, so its class must be in a file and it may hold no lambda.
        batch: Images and labels for ``training_step``, split along the first axis. For a loss: inputs ``(N, D)`` and
            labels ``(N,)``, by default 24 random inputs of four classes, one of which is on a single process.
        world_size: Number of processes.
        precision: Of the trainer; float64 separates a wrong gradient from rounding.
        tolerance: Largest difference allowed, relative to the largest gradient.

    Raises:
        AssertionError: If a gradient differs.
        ValueError: If a module comes without a batch.

    Example:
        >>> from simo_lightning import SimOLoss
        >>> check_gradient_parity(SimOLoss(), world_size=1)  # use 2 or more
    """
    if batch is None:
        if isinstance(loss_or_module, pl.LightningModule):
            raise ValueError("batch must be given to check a LightningModule, got None")
        batch = _random_batch()
    module = loss_or_module
    if not isinstance(module, pl.LightningModule):
        with quiet_and_seeded():
            module = SimOModule(nn.Linear(batch[0].shape[1], 4), loss_or_module)
    expected = _gradients(module, batch, 1, precision)[0]
    for rank, gradients in enumerate(_gradients(module, batch, world_size, precision)):
        _compare(gradients, expected, rank, world_size, tolerance)


def _random_batch() -> Batch:
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2] * 8)
    labels[-3:] = 3
    return inputs, labels


def _gradients(module: pl.LightningModule, batch: Batch, world: int, precision: Any) -> list[dict[str, Tensor]]:
    """Gradients by parameter name at the first optimizer step, of each process."""
    spawned = DDPStrategy(start_method="spawn", process_group_backend="gloo") if world > 1 else "auto"
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    try:
        with tempfile.TemporaryDirectory() as folder, quiet_and_seeded():
            arguments = {"devices": world, "strategy": spawned, "precision": precision, "max_steps": 1}
            trainer = small_trainer(
                folder,
                **arguments,
                callbacks=[_KeepGradients(folder)],
                use_distributed_sampler=False,
                limit_val_batches=0,
            )
            trainer.fit(deepcopy(module), datamodule=_Share(batch))
            return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]
    finally:
        set_variable("OMP_NUM_THREADS", threads)


def _compare(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], rank: int, world: int, tolerance: float
) -> None:
    if gradients.keys() != expected.keys():
        names = ", ".join(sorted(gradients.keys() ^ expected.keys()))
        raise AssertionError(f"different parameters have a gradient on {world} processes and on one: {names}")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = {name: float((gradients[name] - exact).abs().max()) for name, exact in expected.items()}
    name = max(errors, key=lambda key: errors[key])
    if not errors[name] <= tolerance * largest:
        exact, found = expected[name].flatten(), gradients[name].flatten()
        ratio = float(found @ exact / (exact @ exact)) if float(exact @ exact) else float("nan")
        raise AssertionError(
            f"the gradient of {name} on process {rank} of {world} differs from that of one process by "
            f"{errors[name]:.3g} where {tolerance * largest:.3g} is allowed, and is about {ratio:.3g} times as large: "
            "the loss must be computed on the embeddings of all processes, see simo_lightning.distributed.gather_rows"
        )
