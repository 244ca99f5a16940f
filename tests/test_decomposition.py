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


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_shares_are_those_of_a_loop_in_float64(means):
    unit = np.array([row / np.sqrt(sum(value * value for value in row)) for row in means.numpy()])
    gram = np.array([[sum(a * b for a, b in zip(one, other, strict=True)) for other in unit] for one in unit])
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-10
    root = vectors[:, kept] @ np.diag(values[kept] ** -0.5) @ vectors[:, kept].T  # G^(-1/2) on its range
    directions = root @ unit
    embeddings = rows(20, means.shape[1], seed=2).numpy()
    expected = np.zeros((20, len(means)))
    for index, embedding in enumerate(embeddings):
        length = np.sqrt(sum(value * value for value in embedding))
        for label, direction in enumerate(directions):
            expected[index, label] = (sum(a * b for a, b in zip(embedding, direction, strict=True)) / length) ** 2
    shares, rest = orthogonal_shares(torch.from_numpy(embeddings), means)
    np.testing.assert_allclose(shares.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(rest.numpy(), 1 - expected.sum(axis=1), atol=1e-10)


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_shares_do_not_change_by_a_rotation(means):
    dim = means.shape[1]
    rotation = torch.linalg.qr(rows(dim, dim, seed=3)).Q
    embeddings = rows(20, dim, seed=2)
    plain, rotated = orthogonal_shares(embeddings, means), orthogonal_shares(embeddings @ rotation, means @ rotation)
    torch.testing.assert_close(tuple(rotated), tuple(plain), rtol=0, atol=1e-12)


def test_shares_of_orthogonal_means_are_squared_cosines():
    means = torch.linalg.qr(rows(9, 4)).Q.T * torch.tensor([[0.1], [1.0], [5.0], [20.0]])
    embeddings = rows(30, 9, seed=2)
    cosines = normalize(embeddings, dim=1) @ normalize(means, dim=1).T
    torch.testing.assert_close(orthogonal_shares(embeddings, means).shares, cosines.square(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
def test_shares_differ_from_squared_cosines_by_no_more_than_stated(means):
    basis, unit = orthogonal_basis(means), normalize(means, dim=1)
    distance = (basis.vectors - unit).norm(dim=1)
    embeddings = normalize(torch.cat((rows(200, means.shape[1], seed=2), means, basis.vectors)), dim=1)
    difference = (orthogonal_shares(embeddings, means).shares - (embeddings @ unit.T).square()).abs()
    assert (difference <= distance * (basis.vectors.norm(dim=1) + 1) + 1e-12).all()
    assert difference.square().mean(dim=1).sqrt().max() <= 2 * basis.deviation + 1e-12
    values = torch.linalg.svdvals(unit)[: basis.rank]
    assert basis.deviation.item() == pytest.approx(((1 - values).square().sum() / len(means)).sqrt().item(), abs=1e-12)


def test_a_direction_is_the_mean_less_half_of_the_others_to_first_order():
    errors = []
    for size in (1e-2, 1e-3):
        means = normalize(torch.eye(9).double()[:4] + size * rows(4, 9), dim=1)
        cosines = means @ means.T
        expected = means - 0.5 * (cosines - torch.eye(4)) @ means
        errors.append((orthogonal_basis(means).vectors - expected).norm().item())
    assert errors[1] < 2 * errors[0] / 100  # what is left is of the second order


def test_more_classes_than_dimensions_have_the_least_deviation_as_a_tight_frame():
    angles = torch.arange(12).double() * torch.pi / 12
    frame = torch.stack((angles.cos(), angles.sin()), dim=1)  # 12 means at equal angles in 2 dimensions
    least = 1 - (2 / 12) ** 0.5
    assert orthogonal_basis(frame).deviation.item() == pytest.approx(least, abs=1e-12)
    for seed in range(20):
        assert orthogonal_basis(rows(12, 2, seed)).deviation.item() > least
    lengths = orthogonal_basis(rows(12, 5)).vectors.square().sum(dim=1)
    assert lengths.max() < 1
    assert lengths.mean().item() == pytest.approx(5 / 12)


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
