"""Content of the figures; distances between colours, also with colour blindness."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from torch import Tensor

from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import (
    class_colors,
    class_cosines,
    class_markers,
    class_similarity_figure,
    describe_scatter,
    describe_similarity,
    norms_figure,
    scatter_figure,
)


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
    np.testing.assert_allclose(image.get_array(), unit @ unit.T, atol=1e-12)  # both in float64
    assert image.get_clim() == (-1, 1)
    mean = np.abs(unit @ unit.T)[np.triu_indices(4, 1)].mean()
    assert figure.axes[0].get_title() == f"Cosine between class means (mean |cos| {mean:.3f})"
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == names()
    assert [float(text) for text in texts(figure)] == [round(value, 2) for value in (unit @ unit.T).flatten().tolist()]


def test_heat_map_from_means_is_that_from_moments():
    moments = class_moments(*data(), 4)
    first, second = class_similarity_figure(moments, names()), class_similarity_figure(moments.means, names())
    assert np.array_equal(first.axes[0].images[0].get_array(), second.axes[0].images[0].get_array())


def test_absent_classes_are_left_out_of_numbers_and_mean():
    means = torch.tensor([[1.0, 0.0], [float("nan")] * 2, [1.0, 1.0]])
    figure = class_similarity_figure(means, names(3))
    assert "(mean |cos| 0.707)" in figure.axes[0].get_title()
    assert len(texts(figure)) == 4


@pytest.mark.parametrize(("num_classes", "numbers", "ticks"), [(10, 100, 10), (11, 0, 11), (25, 0, 25), (100, 0, 25)])
def test_many_classes_do_not_crowd_the_heat_map(num_classes, numbers, ticks):
    means = torch.randn(num_classes, 8, generator=torch.Generator().manual_seed(0))
    figure = class_similarity_figure(means, names(num_classes))
    assert len(texts(figure)) == numbers
    assert len(figure.axes[0].get_xticks()) == ticks


def test_numbers_are_dark_on_light_cells_and_light_on_dark():
    means = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.2, 1.0]])
    figure = class_similarity_figure(means, names(3))
    assert [text.get_color() for text in figure.axes[0].texts][:3] == ["white", "white", "black"]


def test_scatter_draws_every_point_in_its_colour_with_the_legend_outside():
    embeddings, labels = data()
    labels[labels == 2] = 3
    figure = scatter_figure(embeddings[:, :2], labels, names(), title="here")
    (drawn,) = figure.axes[0].collections
    np.testing.assert_array_equal(drawn.get_offsets(), embeddings[:, :2].numpy())
    colors = [to_rgb(class_colors(4)[label]) for label in labels.tolist()]
    np.testing.assert_array_equal(drawn.get_facecolor()[:, :3], colors)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["class 0", "class 1", "class 3"]
    shown = [handle.get_markerfacecolor() for handle in legend.legend_handles]
    assert shown == [class_colors(4)[label] for label in (0, 1, 3)]
    assert legend.get_window_extent().y1 <= figure.axes[0].get_window_extent().y0
    assert figure.axes[0].get_title() == "here"


def test_classes_beyond_the_tenth_have_another_marker():
    labels = torch.arange(25)
    figure = scatter_figure(torch.randn(25, 2, generator=torch.Generator().manual_seed(0)), labels, names(25))
    assert [len(group.get_offsets()) for group in figure.axes[0].collections] == [10, 10, 5]
    markers = [handle.get_marker() for handle in figure.legends[0].legend_handles]
    assert markers == class_markers(25)


@pytest.mark.parametrize(("num_classes", "legends"), [(30, 1), (60, 0)])
def test_names_of_many_classes_are_drawn_at_their_points_without_overlap(num_classes, legends):
    labels = torch.arange(num_classes)
    points = torch.randn(num_classes, 2, generator=torch.Generator().manual_seed(0))
    figure = scatter_figure(points, labels, names(num_classes))
    assert len(figure.legends) == legends
    if not legends:
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        assert 10 <= len(boxes) <= 50
        assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
        for text in figure.axes[0].texts:
            assert text.xy == pytest.approx(points[int(text.get_text().split()[1])].tolist())


def test_ten_thousand_classes_are_shown_in_part_with_their_number(tmp_path):
    count = 10_000
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(2 * count, 4, generator=generator), torch.arange(2 * count) % count
    moments = class_moments(rows, labels, count)
    similarity = class_similarity_figure(moments, names(count))
    image = similarity.axes[0].images[0].get_array()
    assert image.shape == (500, 500)
    np.testing.assert_allclose(image, class_cosines(moments.means[::20]))
    assert similarity.axes[0].get_title().endswith("\n500 of 10,000 classes")
    assert describe_similarity(moments, names(count)).startswith("Cosines between the means of 500 of 10,000 classes:")
    ticks = [tick.get_text() for tick in similarity.axes[0].get_yticklabels()]
    assert ticks == [f"class {400 * index}" for index in range(25)]
    norms = norms_figure(moments, names(count))
    assert len(norms.axes[0].patches) == 500
    assert norms.axes[0].get_ylabel() == "500 of 10,000 classes"
    assert norms.axes[0].patches[7].get_facecolor()[:3] == to_rgb(class_colors(count)[140])
    scatter = scatter_figure(rows[:, :2], labels, names(count))
    assert len(scatter.axes[0].collections) == 10  # one for each marker
    assert len(scatter.axes[0].texts) < 50
    for name, figure in (("similarity", similarity), ("norms", norms), ("scatter", scatter)):
        figure.savefig(tmp_path / f"{name}.png")


def test_a_million_points_are_drawn_in_part_with_their_number():
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(1_000_000, 2, generator=generator), torch.arange(1_000_000) % 3
    drawn = []
    for title, expected in ((None, "20,000 of 1,000,000 embeddings"), ("here", "here\n20,000 of 1,000,000 points")):
        figure = scatter_figure(points, labels, names(3), title)
        assert figure.axes[0].get_title() == expected
        drawn.append(np.asarray(figure.axes[0].collections[0].get_offsets()))
    assert drawn[0].shape == (20_000, 2)
    assert np.array_equal(*drawn)
    known = {tuple(point) for point in points.numpy().tolist()}
    assert all(tuple(point) in known for point in drawn[0].tolist())
    assert describe_scatter(points, labels, names(3)).startswith("Map of 20,000 of 1,000,000 embeddings of 3 classes;")


def test_nothing_to_draw_is_an_empty_picture(tmp_path):
    scatter_figure(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), names()).savefig(tmp_path / "empty.png")
    class_similarity_figure(torch.full((2, 3), float("nan")), names(2)).savefig(tmp_path / "nan.png")


def test_a_class_keeps_its_colour_however_many_there_are():
    assert class_colors(3) == class_colors(100)[:3]
    assert len(set(class_colors(100))) == 100
    assert class_markers(3) == class_markers(100)[:3]
    assert len(set(class_markers(100))) == 10
    assert len(set(zip(class_colors(100), class_markers(100), strict=True))) == 100


def lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distances(colors: list[str], seen: np.ndarray) -> list[float]:
    """CIELAB distances of all pairs, as an eye sees them."""
    rgb = [np.array(to_rgb(color)) for color in colors]
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in rgb]
    return [float(np.linalg.norm(lab(seen @ a) - lab(seen @ b))) for a, b in combinations(linear, 2)]


def test_later_colours_differ_within_each_marker():
    colors = class_colors(100)
    assert min(min(distances(colors[start : start + 10], np.eye(3))) for start in range(10, 100, 10)) > 8


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
    assert min(distances(class_colors(10), seen)) > 15


def test_drawing_registers_nothing_with_pyplot():
    before = pyplot.get_fignums()
    class_similarity_figure(torch.eye(4), names())
    scatter_figure(torch.zeros(4, 2), torch.arange(4), names())
    assert pyplot.get_fignums() == before


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="class_names must name 4 classes, got 3 names"):
        class_similarity_figure(torch.eye(4), names(3))
    with pytest.raises(ValueError, match=r"means must have shape \(C, D\), got \(4,\)"):
        class_similarity_figure(torch.ones(4), names())
    with pytest.raises(ValueError, match="means must be a tensor, got ndarray"):
        class_similarity_figure(np.eye(4), names())
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        scatter_figure(torch.zeros(2, 2), [0, 1], names())
    with pytest.raises(ValueError, match=r"class_names must be a sequence of strings, got \[0, 1\]"):
        class_similarity_figure(torch.eye(2), [0, 1])
    with pytest.raises(ValueError, match="class_names must be a sequence of strings, got 'ab'"):
        scatter_figure(torch.zeros(2, 2), torch.arange(2), "ab")
    with pytest.raises(ValueError, match="points must be finite, got nan or inf in 1 of them"):
        scatter_figure(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.arange(2), names())
    with pytest.raises(ValueError, match=r"points must have shape \(N, 2\), got \(5, 3\)"):
        scatter_figure(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long), names())
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3 for 4 class_names, got 0\.\.4"):
        scatter_figure(torch.zeros(5, 2), torch.arange(5), names())
