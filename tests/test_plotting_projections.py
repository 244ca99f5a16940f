"""Projections against NumPy in float64, closed cases and their invariances."""

import builtins
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from simo_lightning.plotting import project_2d, project_sequence, star_coordinates
from tests.bounds import assert_float32_error
from tests.test_plotting import data

# In float64 the compared values agree to about 1e-14: the tolerances below leave five digits.
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def plane(rows: np.ndarray) -> np.ndarray:
    """The first two principal directions (D, 2) by numpy, the largest weight of each positive."""
    directions = np.linalg.svd(rows - rows.mean(axis=0))[2][:2]
    return np.stack([vector * np.sign(vector[np.abs(vector).argmax()]) for vector in directions], axis=1)


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)).double())[0]


@pytest.mark.parametrize("n", [5, 80])  # fewer rows than dimensions, and more
def test_pca_is_numpys(n):
    rows = data(n=n)[0].double()
    expected = (rows - rows.mean(dim=0)).numpy() @ plane(rows.numpy())
    np.testing.assert_allclose(project_2d(rows).numpy(), expected, **EXACT)


def test_pca_in_float32_errs_as_little_as_numpys():
    rows = data()[0]
    plain, exact = (
        torch.from_numpy((each - each.mean(axis=0)) @ plane(each)) for each in (rows.numpy(), rows.double().numpy())
    )
    assert_float32_error(project_2d(rows), plain, exact, factor=4)  # the directions are computed in float64


def test_pca_of_many_dimensions_shows_the_largest_variance():
    rows, _ = data(n=600, dim=550, num_classes=5)
    points, rows = project_2d(rows), rows.double()
    largest = torch.linalg.svdvals(rows - rows.mean(dim=0))[:2].square().sum()
    assert points.square().sum() == pytest.approx(largest.item(), rel=1e-3)


def test_pca_keeps_its_sign_when_rows_change_order():
    rows = data()[0].double()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(project_2d(rows[order]), project_2d(rows)[order], **EXACT)


def test_two_dimensions_are_drawn_as_they_are_and_one_on_a_line():
    embeddings, _ = data(dim=2)
    assert torch.equal(project_2d(embeddings), embeddings)
    line = project_2d(embeddings[:, :1].bfloat16())
    assert line.dtype == torch.float32
    assert (line[:, 1] == 0).all()
    assert project_2d(torch.zeros(0, 5)).shape == (0, 2)
    assert project_2d(torch.ones(1, 5)).tolist() == [[0.0, 0.0]]
    assert project_2d(torch.ones(9, 5)).tolist() == [[0.0, 0.0]] * 9  # collapsed


def test_tsne_is_seeded():
    embeddings, _ = data(n=40)
    points = project_2d(embeddings, "tsne")
    assert points.shape == (40, 2)
    assert torch.equal(points, project_2d(embeddings, "tsne"))


def test_tsne_depends_on_its_seed():
    embeddings, _ = data(n=40)
    assert not torch.equal(project_2d(embeddings, "tsne"), project_2d(embeddings, "tsne", seed=1))


@pytest.mark.slow  # umap-learn compiles itself
def test_umap_is_seeded_and_keeps_classes_apart():
    pytest.importorskip("umap")
    embeddings, labels = data(n=60, num_classes=2)
    points = project_2d(5 * embeddings, "umap")
    assert points.shape == (60, 2)
    assert torch.equal(points, project_2d(5 * embeddings, "umap"))
    distances = torch.cdist(points, points) + 1e9 * torch.eye(60)
    assert (labels[distances.argmin(dim=1)] == labels).float().mean() > 0.9
    assert project_2d(embeddings[:3], "umap").shape == (3, 2)


def test_umap_without_its_extra_names_it(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "umap":
            raise ModuleNotFoundError("No module named 'umap'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"umap is missing: pip install 'simo_lightning\[umap\]'"):
        project_2d(torch.eye(5), "umap")


def test_a_sequence_is_projected_to_the_plane_of_its_last_embeddings_by_one_map():
    last = data()[0].double()
    first = torch.randn(last.shape, generator=torch.Generator().manual_seed(3)).double()
    points = project_sequence([first, (first + last) / 2, last])
    assert torch.equal(points[2], project_2d(last))
    torch.testing.assert_close(points[1], (points[0] + points[2]) / 2, **EXACT)  # affine
    expected = (first - last.mean(dim=0)).numpy() @ plane(last.numpy())
    np.testing.assert_allclose(points[0].numpy(), expected, **EXACT)


def test_distances_in_a_projected_sequence_survive_a_rotation_of_space():
    sequence = [data()[0].double(), 2 * data()[0].double()]
    rotated = [rows @ rotation(7) for rows in sequence]
    for before, after in zip(project_sequence(sequence), project_sequence(rotated), strict=True):
        # cdist takes the root of a difference of squares: half of float64's 16 digits
        torch.testing.assert_close(torch.cdist(after, after), torch.cdist(before, before), atol=1e-6, rtol=1e-6)


def test_star_coordinates_are_their_formula():
    embeddings, labels = (tensor if tensor.dtype == torch.long else tensor.double() for tensor in data(n=20, dim=5))
    means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(4)])
    for point, row in zip(star_coordinates(embeddings, means).tolist(), embeddings.tolist(), strict=True):
        expected = [0.0, 0.0]
        for index, mean in enumerate(means.tolist()):
            dot = sum(a * b for a, b in zip(row, mean, strict=True))
            cosine = dot / math.hypot(*row) / math.hypot(*mean)
            expected[0] += cosine * math.sin(2 * math.pi * index / 4)
            expected[1] += cosine * math.cos(2 * math.pi * index / 4)
        assert point == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_in_star_coordinates_orthogonal_classes_lie_on_the_circle_and_collapsed_ones_at_the_origin(num_classes):
    orthogonal = 3 * torch.eye(num_classes, dtype=torch.float64)
    points = star_coordinates(orthogonal, orthogonal)
    angles = 2 * np.pi * np.arange(num_classes) / num_classes
    np.testing.assert_allclose(points.numpy(), np.stack([np.sin(angles), np.cos(angles)], axis=1), atol=1e-12)
    collapsed = torch.arange(1.0, 1 + num_classes).double().unsqueeze(1) * torch.tensor([[1.0, 2.0]]).double()
    assert star_coordinates(collapsed, collapsed).abs().max() < 1e-12


def test_star_coordinates_ignore_length_rotation_and_classes_without_embeddings():
    embeddings, labels = data(n=30, dim=6)
    embeddings = embeddings.double()
    means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(4)])
    points = star_coordinates(embeddings, means)
    turn = rotation(6)
    torch.testing.assert_close(star_coordinates(7 * embeddings @ turn, means @ turn), points, **EXACT)
    means[2] = float("nan")
    assert star_coordinates(embeddings, means).isfinite().all()
    assert star_coordinates(torch.zeros(1, 6), means).tolist() == [[0.0, 0.0]]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="method must be 'pca', 'tsne' or 'umap', got 'mds'"):
        project_2d(torch.zeros(5, 3), "mds")
    with pytest.raises(ValueError, match="embeddings must be a tensor, got list"):
        project_2d([[0.0, 1.0]])
    with pytest.raises(
        ValueError, match=r"embeddings must be floats of shape \(N, D\), got torch.float32 of shape \(\)"
    ):
        project_2d(torch.tensor(1.0))
    with pytest.raises(ValueError, match="embeddings must be finite, got nan or inf in 5 rows"):
        project_2d(torch.zeros(5, 3) / 0)
    with pytest.raises(ValueError, match=r"sequence must hold one or more .* got shapes \[\(2, 3\), \(4, 3\)\]"):
        project_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    with pytest.raises(ValueError, match=r"got shapes \[\]"):
        project_sequence([])
    with pytest.raises(ValueError, match=r"means must have shape \(C, 3\) to match embeddings, got \(2, 4\)"):
        star_coordinates(torch.zeros(5, 3), torch.zeros(2, 4))
