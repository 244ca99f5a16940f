from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from simo_lightning import ImageEncoder, SimOLoss, SimOModule
from simo_lightning.data import LabelledImages, TensorPairDataModule
from tests.bounds import UNIT

LABELS = torch.arange(22) % 4


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(22, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def encoder(norm: Any = "group") -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder("resnet10", width=0.125, stem="small", norm=norm, embedding_dim=6)


def module_of(part: nn.Module, size: int | None, dtype: torch.dtype = torch.float64) -> SimOModule:
    module = SimOModule(part, SimOLoss(), micro_batch_size=size).to(dtype)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]  # no trainer here
    return module


def gradients(module: SimOModule, batch: Tensor, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient of each parameter in one training step."""
    loss = module.training_step((batch, LABELS), 0)["loss"]
    (scale * loss).backward()
    return loss.detach(), [parameter.grad / scale for parameter in module.parameters() if parameter.grad is not None]


def error(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> float:
    """Largest error of the loss and of any gradient, relative to the norm of each."""
    pairs = zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 5, 8, 21])
def test_the_gradient_is_that_of_the_whole_batch(size: int, dtype: torch.dtype) -> None:
    """Float64 to 1e-10; float32 errs against float64 at most four times as much as the whole batch in float32 does."""
    exact = gradients(module_of(encoder(), None), images())
    found = gradients(module_of(encoder(), size, dtype), images(dtype))
    plain = gradients(module_of(encoder(), None, dtype), images(dtype))
    assert error(found, exact) <= (1e-10 if dtype == torch.float64 else 4 * max(error(plain, exact), UNIT))


class Counting(nn.Module):
    """Remembers the size of every batch that it embeds, and what dropout did to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Dropout(0.5))
        self.last = nn.Linear(8, 4)
        self.sizes: list[int] = []
        self.drawn: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        rows = self.first(batch)
        self.sizes.append(len(batch))
        self.drawn.append(rows.detach())
        embeddings: Tensor = self.last(rows)
        return embeddings


def test_parts_are_few_and_equal_and_each_is_embedded_twice_with_the_same_draws() -> None:
    torch.manual_seed(0)
    module = module_of(Counting(), 8)
    gradients(module, images())
    assert module.encoder.sizes == [8, 7, 7, 7, 7, 8]  # forward, then backward from the last
    forward, backward = module.encoder.drawn[:3], module.encoder.drawn[:2:-1]
    assert not torch.equal(forward[1], forward[2])
    for first, second in zip(forward, backward, strict=True):
        assert torch.equal(first, second)


def test_dropout_leaves_the_gradient_exact() -> None:
    torch.manual_seed(0)
    module = module_of(Counting(), 8)
    torch.manual_seed(1)
    _, found = gradients(module, images())
    module.zero_grad()
    torch.manual_seed(1)
    embeddings = torch.cat([module.embed(part) for part in images().tensor_split(3)])  # all graphs in memory
    module.loss(embeddings, LABELS).backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in module.parameters()], rtol=1e-12, atol=1e-15)


def test_running_statistics_move_once_per_part() -> None:
    module, expected = module_of(encoder("batch"), 8), module_of(encoder("batch"), None)
    gradients(module, images())
    for part in images().tensor_split(3):
        expected.embed(part)
    for (name, found), wanted in zip(module.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(found, wanted), name
    assert module.encoder.state_dict().keys() == expected.encoder.state_dict().keys()


def test_the_gradient_through_batch_norm_is_that_of_the_parts() -> None:
    module, plain = module_of(encoder("batch"), 8), module_of(encoder("batch"), None)
    _, found = gradients(module, images())
    embeddings = torch.cat([plain.embed(part) for part in images().tensor_split(3)])
    plain.loss(embeddings, LABELS).backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in plain.parameters()], rtol=1e-10, atol=1e-14)


def test_evaluation_embeds_whole_batches() -> None:
    module = module_of(Counting(), 8)
    module.validation_step((images(), LABELS), 0)
    assert module.encoder.sizes == [22]


def test_bf16_autocast_and_a_gradient_scaler_see_one_backward() -> None:
    """Parts err against float64 at most four times as much as the whole batch in bf16 does."""
    exact, errors = gradients(module_of(encoder(), None), images()), []
    for size in (None, 8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(module_of(encoder(), size, torch.float32), images(torch.float32), scale=2.0**12)
        assert all(gradient.isfinite().all() for gradient in found[1])
        errors.append(error(found, exact))
    assert errors[1] <= 4 * errors[0]


def fit(folder: Path, size: int | None, **arguments: Any) -> dict[str, Tensor]:
    """Weights after two epochs under the Trainer."""
    pixels = torch.randint(256, (96, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = TensorPairDataModule(
        LabelledImages(pixels, torch.arange(96) % 4, list("abcd")), classes_per_batch=4, samples_per_class=4,
        val_fraction=0,
    )  # fmt: skip
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    module = SimOModule(encoder(), optimizer=optimizer, micro_batch_size=size)
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 12 // arguments.get("accumulate_grad_batches", 1)
    return module.state_dict()


@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}], ids=["plain", "clipped, accumulated"]
)
def test_training_leads_to_the_same_weights(tmp_path: Path, arguments: dict[str, Any]) -> None:
    whole, parts = (fit(tmp_path, size, precision="64-true", **arguments) for size in (None, 5))
    for name, wanted in whole.items():
        assert (parts[name] - wanted).norm() <= 1e-10 * wanted.norm(), name


def test_a_size_under_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, or None for whole batches, got 0"):
        SimOModule(Counting(), micro_batch_size=0)
