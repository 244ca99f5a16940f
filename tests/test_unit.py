import torch
from torch.nn.functional import normalize

from simo_lightning.functional.unit import unit_rows


def rows() -> torch.Tensor:
    drawn = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[3] *= 1e-13  # shorter than what is divided by
    return drawn


def test_value_and_gradient_are_those_of_torch() -> None:
    ours, theirs = rows().requires_grad_(), rows().requires_grad_()
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (unit_rows(ours) * weights).sum().backward()
    (normalize(theirs, dim=1) * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(unit_rows(ours), normalize(theirs, dim=1), rtol=1e-14, atol=0)
    usual = torch.arange(7) != 3
    torch.testing.assert_close(ours.grad[usual], theirs.grad[usual], rtol=1e-12, atol=1e-14)


def test_a_row_of_zeros_gives_zeros_and_a_finite_gradient() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    unit = unit_rows(zeros)
    unit.sum().backward()
    assert zeros.grad is not None
    assert not unit.any()
    assert zeros.grad.isfinite().all()
