import pytest
import torch
from torch import Tensor, nn

from simo_lightning import SimOLoss
from tests.bounds import UNIT, assert_stable

FORMS = [("group", "ratio"), ("group", "log"), ("class", "ratio"), ("class", "log")]
FORMS += [(level, form) for level in ("centroid", "pair") for form in ("ratio", "log", "softmax")]
LABELS = torch.tensor([0, 1, 2, 3] * 6)
NORMS = [1e-4, 1e-2, 1.0, 1e2, 1e4]


def rows(norm: float, dtype: torch.dtype) -> Tensor:
    """Embeddings of length `norm`, rounded to a half-precision type."""
    draws = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (norm * nn.functional.normalize(draws, dim=1)).to(dtype)


def value_and_gradient(loss: SimOLoss, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, LABELS)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def make(level: str, form: str, normalize: bool, norm: float) -> SimOLoss:
    """eps in the units of what it is added to: of a squared distance, where the embeddings are used as they are."""
    return SimOLoss(level, form, normalize=normalize, mean_weight=0.5, eps=0.01 if normalize else 0.01 * norm**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as given"])
@pytest.mark.parametrize(("level", "form"), FORMS)
def test_half_precision_of_any_norm_is_finite_and_exact(
    level: str, form: str, normalize: bool, dtype: torch.dtype
) -> None:
    for norm in NORMS:
        loss, embeddings = make(level, form, normalize, norm), rows(norm, dtype)
        wanted = value_and_gradient(loss, embeddings.double())[1]
        value, gradient = value_and_gradient(loss, embeddings.float())
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert_stable(value, lambda rows: value_and_gradient(loss, rows)[0], embeddings)  # noqa: B023
        assert_stable(gradient, lambda rows: value_and_gradient(loss, rows)[1], embeddings)  # noqa: B023
        rounded = value_and_gradient(loss, embeddings)[1]
        if wanted.abs().max() < torch.finfo(dtype).max:  # fp16 has no number over 65504: a GradScaler's business
            assert rounded.dtype == dtype
            assert rounded.isfinite().all()
            room = torch.finfo(dtype).eps * wanted.norm() + torch.finfo(dtype).smallest_normal * wanted.numel()
            assert (rounded.double() - wanted).norm() <= room, norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("level", "form"), FORMS)
def test_autocast_changes_nothing(level: str, form: str, dtype: torch.dtype) -> None:
    loss, embeddings = SimOLoss(level, form), rows(1.0, dtype)
    expected = value_and_gradient(loss, embeddings)
    leaf = embeddings.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(leaf, LABELS)
    (gradient,) = torch.autograd.grad(value, leaf)  # outside, where Lightning and PyTorch have it
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize(("level", "form"), FORMS)
def test_a_gradient_scaler_scales_and_steps(level: str, form: str) -> None:
    """The scaled fp16 step is the plain one, and an overflow is a step left out, not a nan in the weights."""
    weights, loss = [], SimOLoss(level, form)
    for enabled in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(8, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
        for scale in (1.0, float("inf")) if enabled else (1.0,):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                value = loss(layer(rows(1.0, torch.float32)), LABELS)
            scaler.scale(value).backward()
            if scale != 1.0:
                layer.weight.grad *= scale
            scaler.step(optimizer)
            scaler.update()
        weights.append(layer.weight.detach())
    assert weights[0].isfinite().all()
    # A power of two scales exactly, but for products under fp16's smallest number, of which a weight sums one per row.
    lost = 0.1 * len(LABELS) * torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    torch.testing.assert_close(*weights, rtol=2 * UNIT, atol=2 * lost)
