"""A fit and a bare loop that take turns in one process, so that whatever else the machine does slows both alike."""

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class BareLoop:
    """Forward, backward and optimizer step with nothing around them; the loss is the sum of squares.

    Args:
        module: Its encoder is copied, its optimizer made anew.
        precision: Of the run: gives the autocast.
    """

    def __init__(self, module: Any, precision: Any) -> None:
        self.encoder: nn.Module = deepcopy(module.encoder).train()
        if module.compile_encoder:
            self.encoder.compile()
        self.optimizer = module.optimizer(self.encoder.parameters())
        self.precision = precision

    def step(self, images: Tensor) -> None:
        """Train on images ``(N, C, H, W)``, float, on the device and in the memory format."""
        with self.precision.forward_context():
            loss = self.encoder(images).float().square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class TakeTurns(pl.Callback):
    """Times blocks of ``steps`` steps, one of the fit, one of the bare loop, and ends the fit after ``repeats`` each.

    The clock of the fit runs from the end of one bare block to the start of the next, so over everything that the
    trainer, the data module and all callbacks do in between. The first block of each warms up and is not counted.

    Args:
        steps: Of a block.
        repeats: Blocks of the fit that count.

    Attributes:
        latest: The one made last, by whatever parser.
        fit: Wall and CPU seconds of each block of the fit, ``(2,)``.
        bare: The same of each block of the bare loop: before the first of the fit, and after each.
        loop: The bare loop.
        images: Of its last block, ``(N, C, H, W)``, float, on the device and in the memory format.
        datamodule: Of the fit.
    """

    latest: "TakeTurns"

    def __init__(self, steps: int, repeats: int) -> None:
        TakeTurns.latest = self
        self.steps, self.repeats = steps, repeats
        self.fit: list[Tensor] = []
        self.bare: list[Tensor] = []
        self.loop: BareLoop | None = None
        self.images = torch.empty(0)
        self.datamodule: Any = None
        self._since = clocks()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Change turns after a block.

        Args:
            trainer: Is told to stop.
            pl_module: Whose encoder the bare loop copies.
            outputs: Unused.
            batch: The bare loop trains on its images.
            batch_idx: Unused.
        """
        if trainer.global_step % self.steps:
            return
        if self.loop is not None:
            self.fit.append(clocks() - self._since)
        self.datamodule = trainer.datamodule  # type: ignore[attr-defined]
        loop = self.loop = self.loop or BareLoop(pl_module, trainer.precision_plugin)
        images = self.images = batch[0].to(memory_format=pl_module.memory_format)  # type: ignore[call-overload]
        if not self.bare:
            seconds(self.steps, lambda: loop.step(images))
        self.bare.append(seconds(self.steps, lambda: loop.step(images)))
        trainer.should_stop = len(self.fit) >= self.repeats
        self._since = clocks()

    @property
    def ratios(self) -> Tensor:
        """Speed of each block of the fit over that of its two neighbours of the bare loop, by both clocks, (B, 2)."""
        bare = torch.stack(self.bare)
        return (bare[:-1] + bare[1:]) / 2 / torch.stack(self.fit)

    def milliseconds(self) -> dict[str, list[float]]:
        """Median wall and CPU time of a step of the fit and of the bare loop."""
        blocks = {"fit": torch.stack(self.fit), "bare": torch.stack(self.bare)}
        return {name: (1e3 / self.steps * times.median(dim=0).values).tolist() for name, times in blocks.items()}


def clocks() -> Tensor:
    """Wall and CPU seconds of this process, once the GPU, if there is one, has done its work, ``(2,)``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def seconds(steps: int, step: Callable[[], Any]) -> Tensor:
    """Wall and CPU seconds of so many steps, ``(2,)``."""
    start = clocks()
    for _ in range(steps):
        step()
    return clocks() - start
