import pytest
import torch
from torch import Tensor

from simo_lightning.functional import simo_loss
from tests import reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("similar", [True, False])
@pytest.mark.parametrize(("rows", "dim"), [(2, 3), (7, 3), (3, 7)])
@pytest.mark.parametrize("leaning", [0.0, 0.4, 1.0])
def test_equals_eq1_by_loops_with_gradient(similar: bool, rows: int, dim: int, leaning: float) -> None:
    embeddings = draw(rows, dim).requires_grad_()
    value = simo_loss(embeddings, similar, eps=0.1, orthogonality_leaning=leaning)
    expected = reference.eq1(embeddings, similar, eps=0.1, leaning=leaning)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    mine, theirs = (torch.autograd.grad(loss, embeddings)[0] for loss in (value, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_many_groups_at_once_are_each_on_its_own() -> None:
    groups = draw(2, 3, 5, 4)
    values = simo_loss(groups, similar=True)
    assert values.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(values[i, j], simo_loss(groups[i, j], similar=True), rtol=1e-12, atol=0)


def test_gradcheck() -> None:
    for similar in (True, False):
        assert torch.autograd.gradcheck(lambda rows: simo_loss(rows, similar), (draw(5, 3).requires_grad_(),))  # noqa: B023


def semimetric(a: Tensor, b: Tensor) -> Tensor:
    return simo_loss(torch.stack([a, b]), similar=True, eps=1e-6)


def test_the_similar_loss_of_two_points_is_a_semimetric() -> None:
    for seed in range(20):
        a, b = draw(2, 4, seed=seed)
        assert semimetric(a, b) > 0
        torch.testing.assert_close(semimetric(a, b), semimetric(b, a), rtol=1e-12, atol=0)
        assert semimetric(a, a) == 0


def test_the_triangle_inequality_does_not_hold() -> None:
    a, b = torch.eye(2, dtype=torch.float64)
    middle = (a + b) / 2
    assert semimetric(a, b) > 1000 * (semimetric(a, middle) + semimetric(middle, b))  # orthogonal: o = 0


def test_orthogonal_rows_have_no_dissimilar_loss_and_identical_rows_the_largest() -> None:
    assert simo_loss(3 * torch.eye(4), similar=False) == 0
    rows = torch.nn.functional.normalize(draw(4, 4), dim=1)
    collapsed = rows[:1].expand(4, 4)
    assert simo_loss(collapsed, similar=False, eps=0.01) == pytest.approx(100)
    assert simo_loss(rows, similar=False, eps=0.01) < 100


def test_scaling_the_rows_changes_nothing_in_the_dissimilar_ratio_but_its_square() -> None:
    rows = draw(5, 3)
    large, small = (simo_loss(scale * rows, similar=False, eps=1e-12) for scale in (10, 1))
    torch.testing.assert_close(large, 100 * small, rtol=1e-9, atol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"embeddings must have shape \(..., N, D\) with N >= 2, got \(1, 3\)"):
        simo_loss(torch.ones(1, 3), similar=True)
