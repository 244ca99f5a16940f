import torch
from torch.nn.functional import normalize

from simo_lightning.functional import rows as module
from simo_lightning.functional.rows import unit_rows

INDEX, COUNTS = torch.tensor([0, 1, 0, 2, 1, 0, 0]), torch.tensor([4, 2, 1])


def rows() -> torch.Tensor:
    drawn = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[3] *= 1e-13  # shorter than what is divided by
    return drawn


def test_value_and_gradient_are_those_of_torch(monkeypatch) -> None:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(count, 5, generator=draw, dtype=torch.float64) for count in (7, 3)]
    theirs = rows().requires_grad_()
    unit = normalize(theirs, dim=1)
    means = torch.stack([unit[number == INDEX].mean(dim=0) for number in range(3)])
    ((unit * weights[0]).sum() + (means * weights[1]).sum()).backward()
    assert theirs.grad is not None
    usual = torch.arange(7) != 3
    monkeypatch.setattr(module, "_CHUNK_ROWS", 1)
    for entries in (1, 10, 100):  # chunks of one row, of two, of all
        monkeypatch.setattr(module, "_CHUNK_ENTRIES", entries)
        ours = rows().requires_grad_()
        got = unit_rows(ours, INDEX, COUNTS)
        ((got[0] * weights[0]).sum() + (got[1] * weights[1]).sum()).backward()
        assert ours.grad is not None
        torch.testing.assert_close(got, (unit, means), rtol=1e-14, atol=1e-16)
        torch.testing.assert_close(ours.grad[usual], theirs.grad[usual], rtol=1e-12, atol=1e-14)


def test_a_row_of_zeros_gives_zeros_and_a_finite_gradient() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    unit, means = unit_rows(zeros, torch.tensor([0, 0]), torch.tensor([2]))
    (unit.sum() + means.sum()).backward()
    assert zeros.grad is not None
    assert not unit.any()
    assert zeros.grad.isfinite().all()
