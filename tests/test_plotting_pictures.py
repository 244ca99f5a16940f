"""Content of spectrum, norms and neighbours; alternative texts; legibility on a phone."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import (
    class_colors,
    class_similarity_figure,
    describe_neighbors,
    describe_norms,
    describe_scatter,
    describe_similarity,
    describe_spectrum,
    neighbors_figure,
    norms_figure,
    scatter_figure,
    small_multiples_figure,
    spectrum_figure,
)
from tests.test_plotting import data, names


def test_the_spectrum_is_numpys_with_rank_and_classes_marked():
    embeddings, labels = data()
    figure = spectrum_figure(class_moments(embeddings, labels, 4))
    curve, rank, classes = figure.axes[0].lines
    singular = np.linalg.svd(embeddings.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(curve.get_ydata(), singular / singular[0], rtol=1e-6)
    assert list(curve.get_xdata()) == list(range(1, 8))
    p = singular / singular.sum()
    effective = np.exp(-(p * np.log(p)).sum())
    assert rank.get_xdata()[0] == pytest.approx(effective, rel=1e-6)
    assert classes.get_xdata()[0] == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"effective rank {effective:.1f}",
        "classes 4",
    ]
    assert f"effective rank {effective:.1f} in 7 dimensions for 4 classes" in describe_spectrum(
        class_moments(embeddings, labels, 4)
    )


def test_the_spectrum_of_collapsed_embeddings_is_one_value():
    rows = torch.arange(1.0, 9.0).unsqueeze(1) * torch.tensor([[1.0, 2.0, 3.0]])
    moments = class_moments(rows, torch.arange(8) % 2, 2)
    assert spectrum_figure(moments).axes[0].lines[0].get_ydata().tolist() == [1.0]
    assert "effective rank 1.0" in describe_spectrum(moments)
    assert "1 value reaches a tenth" in describe_spectrum(moments)


def test_norms_without_second_moments_show_the_spread_over_all_directions():
    embeddings, labels = data()
    moments = class_moments(embeddings, labels, 4, second_budget_mb=0)
    (points,) = norms_figure(moments, names()).axes[1].collections
    expected = [embeddings[labels == label].double().var(dim=0, correction=0).mean().sqrt() for label in range(4)]
    assert points.get_offsets()[:, 0].tolist() == pytest.approx([float(each) for each in expected])
    text = describe_norms(moments, names())
    assert text.endswith(f"; median standard deviation {float(torch.stack(expected).median()):.3g} per direction.")


def test_norms_and_spread_are_those_of_a_loop():
    embeddings, labels = data()
    figure = norms_figure(class_moments(embeddings, labels, 4), names())
    left, right = figure.axes
    along, across = right.collections
    for label in range(4):
        rows = embeddings[labels == label].double().numpy()
        unit = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
        bar = left.patches[label]
        assert bar.get_width() == pytest.approx(np.sqrt((rows**2).sum(axis=1).mean()))
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(label)
        assert bar.get_facecolor()[:3] == to_rgb(class_colors(4)[label])
        assert along.get_offsets()[label].tolist() == pytest.approx([(rows @ unit).std(), label])
        variance = (rows.var(axis=0).sum() - (rows @ unit).var()) / 6
        assert across.get_offsets()[label].tolist() == pytest.approx([np.sqrt(variance), label])
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first class on top
    for axes, lengths in ((left, [bar.get_width() for bar in left.patches]), (right, along.get_offsets()[:, 0])):
        assert axes.get_xlim()[0] == 0
        assert axes.get_xlim()[1] > max(lengths)


def test_norms_are_described_by_their_ends():
    moments = class_moments(torch.tensor([[2.0, 1], [2, -1], [0, 9], [0, 9]]), torch.tensor([0, 0, 2, 2]), 3)
    assert describe_norms(moments, names(3)) == (
        "Norms of 2 classes from 2.24 (class 0) to 9 (class 2); "
        "median standard deviation 0 along the class mean, 0 per direction across it."
    )
    empty = class_moments(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 2)
    assert describe_norms(empty, names(2)) == "Norms per class: there are no embeddings."
    norms_figure(empty, names(2)).draw_without_rendering()


def pictures(channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 4, channels, 6, 6), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1], [2, 0, 0, 2]])


@pytest.mark.parametrize("channels", [1, 3])
def test_neighbours_are_drawn_in_order_and_those_of_other_classes_marked(channels):
    images, labels = pictures(channels)
    figure = neighbors_figure(images, labels, names(3))
    assert len(figure.axes) == 12
    for index, axes in enumerate(figure.axes):
        query, column = divmod(index, 4)
        drawn = np.array(axes.images[0].get_array()).reshape(6, 6, channels)
        np.testing.assert_array_equal(drawn, images[query, column].permute(1, 2, 0).numpy())
        wrong = bool(labels[query, column] != labels[query, 0])
        assert (axes.spines["left"].get_linewidth() > 2) == wrong
        assert axes.get_xlabel().endswith(f"class {int(labels[query, column])}")
        assert axes.get_xlabel().startswith("✗") == wrong
        assert axes.images[0].get_clim() == (0, 255)
    lefts = [axes.get_position().x0 for axes in figure.axes[:4]]
    assert lefts == sorted(lefts)
    assert figure.axes[0].get_position().y0 > figure.axes[4].get_position().y0


def test_neighbours_are_described_by_their_hits():
    assert describe_neighbors(pictures()[1], names(3)) == (
        "3 images with their 3 nearest neighbours each: 6 of 9 neighbours share the class. "
        "Most often wrong: class 0 for class 2."
    )


def test_similarity_is_described_by_its_largest_pair():
    means = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [float("nan")] * 3, [-0.8, 0.0, 0.6]])
    assert describe_similarity(means, names()) == (
        "Cosines between the means of 3 classes: mean size 0.27, largest -0.80 between class 0 and class 3."
    )
    assert describe_similarity(torch.ones(1, 2), names(1)).endswith("means of 1 class: there is no pair.")


def test_a_map_is_described_by_its_nearest_neighbours():
    points = torch.tensor([[0.0, 0], [1, 0], [5, 0], [5.5, 0]])
    text = describe_scatter(points, torch.tensor([0, 0, 1, 0]), names(), "Epoch 3")
    assert text == (
        "Epoch 3: map of 4 embeddings of 2 classes; 50 % of the points have a nearest neighbour of their own class."
    )
    assert describe_scatter(points[:0], torch.zeros(0, dtype=torch.long), names()) == (
        "Map of 0 embeddings of 0 classes."
    )


def all_figures(num_classes: int) -> list[Figure]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3 * num_classes) % num_classes
    rows = torch.randn(3 * num_classes, 12, generator=generator)
    moments = class_moments(rows, labels, num_classes)
    words = [f"{word} {index}" for index, word in enumerate(["automobile", "cat", "hippopotamus", "ship"] * 25)]
    words = words[:num_classes]
    images = torch.zeros(2, 6, 1, 8, 8, dtype=torch.uint8)
    sequence = [(f"Epoch {epoch}", rows) for epoch in range(6)]
    matrices = [(f"Epoch {epoch}", torch.eye(num_classes)) for epoch in range(6)]
    return [
        class_similarity_figure(moments, words),
        scatter_figure(rows[:, :2], labels, words),
        spectrum_figure(moments),
        norms_figure(moments, words),
        neighbors_figure(images, torch.arange(12).view(2, 6) % num_classes, words),
        small_multiples_figure(sequence, labels, words),
        small_multiples_figure(matrices, None, words),
    ]


@pytest.mark.parametrize("num_classes", [10, 100])
def test_a_phone_shows_every_word_and_none_covers_another(num_classes):
    for figure in all_figures(num_classes):
        figure.draw_without_rendering()
        shrunk = 390 / 96 / figure.get_figwidth()  # from inches to a phone of 390 px
        for text in (text for axes in figure.axes for text in words_of(axes)):
            assert text.get_fontsize() * shrunk >= 8, text
            extent = text.get_window_extent()
            assert -1 <= extent.x0 <= extent.x1 <= figure.bbox.x1 + 1, text
            assert -1 <= extent.y0 <= extent.y1 <= figure.bbox.y1 + 1, text
        for axes in figure.axes:
            drawn = words_of(axes)
            for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
                boxes = [tick.get_window_extent() for tick in ticks if tick in drawn]
                assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
        labels = [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.get_xlabel()]
        assert not any(first.overlaps(second) for first, second in combinations(labels, 2))


def words_of(axes: Axes) -> list[Text]:
    """Texts that are drawn: tick labels outside the limits are not."""
    ticks = [
        tick.label1
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
    return [text for text in texts if text.get_text().strip()]


def test_errors_name_the_argument():
    images, labels = pictures()
    moments = class_moments(*data(), 4)
    for draw in (norms_figure, describe_norms, describe_similarity):
        with pytest.raises(ValueError, match="class_names must name 4 classes, got 3 names"):
            draw(moments, names(3))
    with pytest.raises(ValueError, match=r"images must be uint8 of shape .*, got torch.float32 of shape"):
        neighbors_figure(images.float(), labels, names(3))
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 4\) to match images, got \(3, 3\)"):
        neighbors_figure(images, labels[:, 1:], names(3))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1 for 2 class_names, got 0\.\.2"):
        neighbors_figure(images, labels, names(2))
    with pytest.raises(ValueError, match=r"labels must have shape \(Q, 1 \+ K\) with K at least 1, got \(3, 1\)"):
        describe_neighbors(labels[:, :1], names(3))
