"""Figures by what is in them; colours by how far apart they are, also to the colour-blind."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from sklearn.decomposition import PCA
from torch import Tensor

from simo_lightning.functional.geometry import orthogonality
from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import class_colors, class_similarity_figure, project_2d, scatter_figure


def data(n: int = 80, dim: int = 7, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (n,), generator=generator)
    centers = torch.randn(num_classes, dim, generator=generator)
    return centers[labels] + 0.2 * torch.randn(n, dim, generator=generator), labels


def names(num_classes: int = 4) -> list[str]:
    return [f"class {index}" for index in range(num_classes)]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_heat_map_shows_the_cosines_on_a_fixed_scale():
    embeddings, labels = data()
    moments = class_moments(embeddings, labels, 4)
    figure = class_similarity_figure(moments, names())
    image = figure.axes[0].images[0]
    means = moments.means.numpy()
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(image.get_array(), unit @ unit.T, atol=1e-12)
    assert image.get_clim() == (-1, 1)
    assert f"{orthogonality(moments).item():.3f}" in figure.axes[0].get_title()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == names()
    assert texts(figure) == [f"{value:.2f}" for value in (unit @ unit.T).flatten()]


def test_heat_map_from_means_is_that_from_moments():
    moments = class_moments(*data(), 4)
    first, second = class_similarity_figure(moments, names()), class_similarity_figure(moments.means, names())
    assert np.array_equal(first.axes[0].images[0].get_array(), second.axes[0].images[0].get_array())


def test_absent_classes_are_left_out_of_numbers_and_mean():
    means = torch.tensor([[1.0, 0.0], [float("nan")] * 2, [1.0, 1.0]])
    figure = class_similarity_figure(means, names(3))
    assert "(mean |cos| 0.707)" in figure.axes[0].get_title()
    assert len(texts(figure)) == 4


@pytest.mark.parametrize(("num_classes", "numbers", "ticks"), [(12, 144, 12), (13, 0, 13), (50, 0, 50), (120, 0, 40)])
def test_many_classes_do_not_crowd_the_heat_map(num_classes, numbers, ticks):
    means = torch.randn(num_classes, 8, generator=torch.Generator().manual_seed(0))
    figure = class_similarity_figure(means, names(num_classes))
    assert len(texts(figure)) == numbers
    assert len(figure.axes[0].get_xticks()) == ticks


def test_scatter_draws_every_point_in_its_colour_with_the_legend_outside():
    embeddings, labels = data()
    labels[labels == 2] = 3
    figure = scatter_figure(embeddings[:, :2], labels, names(), title="here")
    drawn = {group.get_label(): group for group in figure.axes[0].collections}
    assert list(drawn) == ["class 0", "class 1", "class 3"]
    for name, group in drawn.items():
        label = int(name[-1])
        np.testing.assert_array_equal(group.get_offsets(), embeddings[labels == label, :2].numpy())
        assert tuple(group.get_facecolor()[0][:3]) == to_rgb(class_colors(4)[label])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= figure.axes[0].get_window_extent().x1
    assert figure.axes[0].get_title() == "here"


@pytest.mark.parametrize(("num_classes", "legends"), [(30, 1), (60, 0)])
def test_too_many_classes_have_no_legend(num_classes, legends):
    labels = torch.arange(num_classes)
    figure = scatter_figure(torch.randn(num_classes, 2), labels, names(num_classes))
    assert len(figure.legends) == legends


def test_nothing_to_draw_is_an_empty_picture(tmp_path):
    scatter_figure(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), names()).savefig(tmp_path / "empty.png")
    class_similarity_figure(torch.full((2, 3), float("nan")), names(2)).savefig(tmp_path / "nan.png")


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


def test_a_class_keeps_its_colour_however_many_there_are():
    assert class_colors(3) == class_colors(100)[:3]
    assert len(set(class_colors(100))) == 100


def lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    "seen",
    [
        np.eye(3),
        # Machado et al. 2009, severity 1: protanopia, deuteranopia
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    ],
)
def test_ten_colours_differ_to_every_eye(seen):
    colors = [np.array(to_rgb(color)) for color in class_colors(10)]
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in colors]
    assert min(np.linalg.norm(lab(seen @ a) - lab(seen @ b)) for a, b in combinations(linear, 2)) > 15


def test_drawing_registers_nothing_with_pyplot():
    before = pyplot.get_fignums()
    class_similarity_figure(torch.eye(4), names())
    scatter_figure(torch.zeros(4, 2), torch.arange(4), names())
    assert pyplot.get_fignums() == before


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="class_names must name 4 classes, got 3 names"):
        class_similarity_figure(torch.eye(4), names(3))
    with pytest.raises(ValueError, match=r"points must have shape \(N, 2\), got \(5, 3\)"):
        scatter_figure(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long), names())
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3 for 4 class_names, got 0\.\.4"):
        scatter_figure(torch.zeros(5, 2), torch.arange(5), names())
    with pytest.raises(ValueError, match="method must be 'pca' or 'tsne', got 'umap'"):
        project_2d(torch.zeros(5, 3), "umap")
    with pytest.raises(ValueError, match="embeddings must be finite, got nan or inf in 5 rows"):
        project_2d(torch.zeros(5, 3) / 0)
