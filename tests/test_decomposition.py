"""The orthogonal decomposition against its algebra in float64 and against SciPy's polar decomposition."""

import numpy as np
import pytest
import torch
from scipy.linalg import polar
from torch import Tensor
from torch.nn.functional import normalize

from simo_lightning.functional import orthogonal_basis, orthogonal_shares
from simo_lightning.functional.unknown import span_energy


def rows(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dependent(classes: int, dim: int, rank: int) -> Tensor:
    return rows(classes, rank) @ rows(rank, dim, seed=1)


MEANS = {
    "fewer classes": rows(4, 9),
    "as many": rows(6, 6),
    "more classes": rows(12, 5),
    "dependent": dependent(5, 9, rank=3),
    "more and dependent": dependent(12, 9, rank=4),
    "a copy": torch.cat((rows(3, 9), 2 * rows(3, 9)[:1])),
    "one class": rows(1, 9),
}


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_shares_and_rest_are_non_negative_and_sum_to_one(means):
    embeddings = 7 * rows(50, means.shape[1], seed=2)
    shares, rest = orthogonal_shares(embeddings, means)
    assert shares.shape == (50, len(means))
    assert shares.dtype == torch.float64
    assert shares.min() >= 0
    assert rest.min() >= 0
    torch.testing.assert_close(shares.sum(dim=1) + rest, torch.ones(50).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_the_rest_is_the_least_squares_residual_on_the_class_means(means):
    embeddings = normalize(rows(50, means.shape[1], seed=2), dim=1)
    fitted = np.linalg.lstsq(means.numpy().T, embeddings.numpy().T, rcond=1e-10)[0]
    residual = np.square(embeddings.numpy().T - means.numpy().T @ fitted).sum(axis=0)
    np.testing.assert_allclose(orthogonal_shares(embeddings, means).rest.numpy(), residual, atol=1e-13)
    np.testing.assert_allclose(span_energy(embeddings, means).numpy(), 1 - residual, atol=1e-13)
    assert orthogonal_basis(means).rank == np.linalg.matrix_rank(means.numpy(), tol=1e-10)


def test_the_basis_is_the_polar_factor_and_orthonormal():
    means = rows(4, 9)
    basis = orthogonal_basis(means)
    directions = normalize(means, dim=1)
    np.testing.assert_allclose(basis.vectors.numpy(), polar(directions.numpy())[0], atol=1e-13)
    torch.testing.assert_close(basis.vectors @ basis.vectors.T, torch.eye(4).double(), rtol=0, atol=1e-13)
    expected = (directions - basis.vectors).norm(dim=1).square().mean().sqrt()
    assert basis.deviation.item() == pytest.approx(expected.item(), rel=1e-12)


def test_no_other_orthonormal_rows_are_nearer():
    means = normalize(rows(4, 9), dim=1)
    nearest = (orthogonal_basis(means).vectors - means).square().sum()
    for seed in range(20):
        other = torch.linalg.qr(means.T + 0.3 * rows(9, 4, seed))[0].T
        signs = (other * means).sum(dim=1).sign().unsqueeze(1)
        assert (signs * other - means).square().sum() > nearest


def test_the_order_of_the_classes_does_not_matter():
    means, embeddings, order = rows(5, 9), rows(20, 9, seed=2), torch.tensor([3, 0, 4, 2, 1])
    shares, permuted = orthogonal_shares(embeddings, means).shares, orthogonal_shares(embeddings, means[order]).shares
    torch.testing.assert_close(permuted, shares[:, order], rtol=0, atol=1e-13)


def test_orthogonal_means_are_their_own_basis_whatever_their_lengths():
    means = torch.diag(torch.tensor([1e-30, 2.0, 1e30]))[:2].double()
    basis = orthogonal_basis(means)
    assert basis.deviation == 0
    assert basis.vectors.tolist() == [[1, 0, 0], [0, 1, 0]]
    shares, rest = orthogonal_shares(torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]), means)
    assert shares.tolist() == [[pytest.approx(0.36), 0], [0, 0]]
    assert rest.tolist() == [pytest.approx(0.64), 1]


def test_copies_of_a_mean_share_its_energy():
    means = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    shares, rest = orthogonal_shares(means, means)
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]).double())
    torch.testing.assert_close(rest, torch.zeros(3).double())


def test_classes_without_a_mean_have_no_share():
    means = torch.cat((rows(2, 5), torch.full((1, 5), torch.nan), torch.zeros(1, 5)))
    embeddings = rows(10, 5, seed=2)
    shares, rest = orthogonal_shares(embeddings, means)
    assert (shares[:, 2:] == 0).all()
    torch.testing.assert_close((shares[:, :2], rest), tuple(orthogonal_shares(embeddings, means[:2])))
    assert orthogonal_basis(means).deviation == orthogonal_basis(means[:2]).deviation
    nothing = orthogonal_shares(embeddings, means[2:])
    assert (nothing.rest == 1).all()
    assert orthogonal_basis(means[2:]).rank == 0
    assert orthogonal_basis(means[2:]).deviation.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_means": torch.ones(2, 3)}, r"\(N, D\) and \(C, D\), got \(4, 5\) and \(2, 3\)"),
        ({"class_means": torch.full((2, 5), torch.inf)}, "class_means must be finite or nan, got inf in 2 of 2 means"),
        ({"embeddings": torch.full((4, 5), torch.nan)}, "embeddings must be finite, got nan or inf in 4 of 4"),
        ({"class_means": torch.ones(5)}, "class_means must be floats of shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"embeddings": torch.ones(4, 5), "class_means": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=message):
        orthogonal_shares(**{**arguments, **change})
