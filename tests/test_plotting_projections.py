"""Projections against scikit-learn, closed cases and their invariances."""

import builtins
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from simo_lightning.plotting import project_2d, project_frames, project_wheel
from tests.test_plotting import data


def test_pca_is_scikit_learns_up_to_sign():
    embeddings, _ = data()
    points, theirs = project_2d(embeddings).numpy(), PCA(2).fit_transform(embeddings.numpy())
    for axis in range(2):
        sign = np.sign(points[:, axis] @ theirs[:, axis])
        np.testing.assert_allclose(points[:, axis], sign * theirs[:, axis], atol=1e-4)


def test_pca_keeps_its_sign_when_rows_change_order():
    embeddings, _ = data()
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(project_2d(embeddings[order]), project_2d(embeddings)[order], atol=1e-4, rtol=1e-4)


def test_two_dimensions_are_drawn_as_they_are_and_one_on_a_line():
    embeddings, _ = data(dim=2)
    assert torch.equal(project_2d(embeddings), embeddings)
    line = project_2d(embeddings[:, :1].bfloat16())
    assert line.dtype == torch.float32
    assert (line[:, 1] == 0).all()
    assert project_2d(torch.zeros(0, 5)).shape == (0, 2)
    assert project_2d(torch.ones(1, 5)).tolist() == [[0.0, 0.0]]


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


def test_frames_go_to_the_plane_of_the_last_by_one_map():
    last, _ = data()
    first = torch.randn(last.shape, generator=torch.Generator().manual_seed(3))
    frames = project_frames([first, (first + last) / 2, last])
    torch.testing.assert_close(frames[2], project_2d(last))
    torch.testing.assert_close(frames[1], (frames[0] + frames[2]) / 2, atol=1e-5, rtol=1e-5)  # affine
    theirs = PCA(2).fit(last.numpy()).transform(first.numpy())
    sign = np.sign((PCA(2).fit_transform(last.numpy()) * frames[2].numpy()).sum(axis=0))
    np.testing.assert_allclose(frames[0].numpy(), sign * theirs, atol=1e-4)


def test_distances_in_the_projected_frames_survive_a_rotation_of_space():
    frames = [data()[0].double(), 2 * data()[0].double()]
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)).double())[0]
    for before, after in zip(project_frames(frames), project_frames([frame @ turn for frame in frames]), strict=True):
        torch.testing.assert_close(torch.cdist(after, after), torch.cdist(before, before), atol=1e-6, rtol=1e-6)


def test_the_wheel_is_its_formula():
    embeddings, labels = data(n=20, dim=5)
    means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(4)])
    for point, row in zip(project_wheel(embeddings, means).tolist(), embeddings.tolist(), strict=True):
        expected = [0.0, 0.0]
        for index, mean in enumerate(means.tolist()):
            dot = sum(a * b for a, b in zip(row, mean, strict=True))
            cosine = dot / math.hypot(*row) / math.hypot(*mean)
            expected[0] += cosine * math.sin(2 * math.pi * index / 4)
            expected[1] += cosine * math.cos(2 * math.pi * index / 4)
        assert point == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_on_the_wheel_orthogonal_classes_sit_on_the_circle_and_collapsed_ones_in_the_middle(num_classes):
    orthogonal = 3 * torch.eye(num_classes, dtype=torch.float64)
    points = project_wheel(orthogonal, orthogonal)
    angles = 2 * np.pi * np.arange(num_classes) / num_classes
    np.testing.assert_allclose(points.numpy(), np.stack([np.sin(angles), np.cos(angles)], axis=1), atol=1e-12)
    collapsed = torch.arange(1.0, 1 + num_classes).double().unsqueeze(1) * torch.tensor([[1.0, 2.0]]).double()
    assert project_wheel(collapsed, collapsed).abs().max() < 1e-12


def test_the_wheel_ignores_length_rotation_and_classes_without_rows():
    embeddings, labels = data(n=30, dim=6)
    means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(4)])
    points = project_wheel(embeddings, means)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    torch.testing.assert_close(project_wheel(7 * embeddings @ turn, means @ turn), points, atol=1e-5, rtol=1e-5)
    means[2] = float("nan")
    assert project_wheel(embeddings, means).isfinite().all()
    assert project_wheel(torch.zeros(1, 6), means).tolist() == [[0.0, 0.0]]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="method must be 'pca', 'tsne' or 'umap', got 'mds'"):
        project_2d(torch.zeros(5, 3), "mds")
    with pytest.raises(ValueError, match="embeddings must be finite, got nan or inf in 5 rows"):
        project_2d(torch.zeros(5, 3) / 0)
    with pytest.raises(ValueError, match=r"frames must be one or more .* got shapes \[\(2, 3\), \(4, 3\)\]"):
        project_frames([torch.zeros(4, 3), torch.zeros(2, 3)])
    with pytest.raises(ValueError, match=r"got shapes \[\]"):
        project_frames([])
    with pytest.raises(ValueError, match=r"means must have shape \(C, 3\) to match embeddings, got \(2, 4\)"):
        project_wheel(torch.zeros(5, 3), torch.zeros(2, 4))
