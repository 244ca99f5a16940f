"""What is drawn of a run's history: frames on disk, strips and animations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from simo_lightning.plotting import (
    Frame,
    class_colors,
    describe_strip,
    load_frames,
    pick_frames,
    project_frames,
    project_wheel,
    save_animation,
    save_frame,
    strip_figure,
)
from tests.test_plotting import data, names


def history(n: int = 6) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Classes that come apart, more so in every frame."""
    last, labels = data()
    first = torch.randn(last.shape, generator=torch.Generator().manual_seed(5))
    return [(f"Epoch {epoch}", torch.lerp(first, last, epoch / (n - 1))) for epoch in range(n)], labels


def cosines(n: int = 6) -> list[tuple[str, Tensor]]:
    ones, eye = torch.ones(4, 4), torch.eye(4)
    return [(f"Epoch {epoch}", torch.lerp(ones, eye, epoch / (n - 1))) for epoch in range(n)]


def test_a_strip_draws_every_frame_by_one_map_on_common_axes():
    frames, labels = history()
    figure = strip_figure(frames, labels, names())
    expected = project_frames([points for _, points in frames])
    assert [axes.get_title() for axes in figure.axes] == [title for title, _ in frames]
    assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in figure.axes}) == 1
    for axes, points in zip(figure.axes, expected, strict=True):
        assert axes.get_xlim()[0] < points[:, 0].min() < points[:, 0].max() < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < points[:, 1].min() < points[:, 1].max() < axes.get_ylim()[1]
        for label, group in enumerate(axes.collections):
            np.testing.assert_allclose(group.get_offsets(), points[labels == label].numpy(), atol=1e-6)
            assert tuple(group.get_facecolor()[0][:3]) == to_rgb(class_colors(4)[label])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names()


def test_points_of_two_dimensions_are_drawn_as_they_are():
    frames, labels = history(2)
    flat = [(title, points[:, :2]) for title, points in frames]
    figure = strip_figure(flat, labels, names())
    for axes, (_, points) in zip(figure.axes, flat, strict=True):
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), points[labels == 0].numpy())


def test_a_strip_of_cosines_shows_them_on_one_scale():
    frames = cosines(4)
    *panels, scale = strip_figure(frames, None, names(), kind="similarity").axes
    assert len(panels) == 4
    for axes, (_, matrix) in zip(panels, frames, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix.numpy())
        assert axes.images[0].get_clim() == (-1, 1)
    assert scale.get_xlabel() == "cosine"


def test_a_strip_is_described_by_its_first_and_last_frame():
    frames, labels = history()
    first, last = (
        float(part) for part in describe_strip(frames, labels, names()).rstrip(".").split("from ")[-1].split(" to ")
    )
    assert first > 10 * last
    text = describe_strip(cosines(), None, names(), kind="similarity")
    assert text == (
        "Cosines between the means of 4 classes, 6 pictures from Epoch 0 to Epoch 5: mean size from 1.00 to 0.00."
    )


@pytest.mark.parametrize("kind", ["points", "similarity"])
def test_an_animation_has_every_frame_once_and_holds_its_ends(tmp_path, kind):
    frames, labels = history(4) if kind == "points" else (cosines(4), None)
    path = save_animation(frames, tmp_path / "run.gif", labels, names(), kind, seconds=0.4, hold=1.2)
    assert path == tmp_path / "run.gif"
    with Image.open(path) as picture:
        assert picture.n_frames == 4
        assert picture.info["loop"] == 0
        times, pictures = [], []
        for index in range(4):
            picture.seek(index)
            times.append(picture.info["duration"])
            pictures.append(np.array(picture.convert("RGB")))
    assert times == [1200, 400, 400, 1200]
    assert all((a != b).any() for a, b in pairwise(pictures))


def test_ten_frames_of_many_points_stay_below_a_megabyte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    frames = [(f"Epoch {epoch}", torch.randn(300, 2, generator=generator)) for epoch in range(10)]
    path = save_animation(frames, tmp_path / "run.gif", labels, names(10), seconds=0.5, hold=0.5)
    assert path.stat().st_size < 1_000_000


def frame(epoch: int, points: Tensor | None = None) -> Frame:
    rows, labels = data(n=8)
    means = torch.stack([torch.full((7,), float("nan")), *rows[:3]]).double()
    return Frame(epoch, 10 * epoch, torch.tensor([0, 5, 2, 1]), means, rows if points is None else points, labels)


def test_a_frame_comes_back_from_disk(tmp_path):
    kept = frame(3)
    path = save_frame(kept, tmp_path / "plots" / "frames")
    assert path == tmp_path / "plots" / "frames" / "epoch=003.npz"
    (found,) = load_frames(path.parent)
    assert (found.epoch, found.step, found.title) == (3, 30, "Epoch 3")
    for name in ("counts", "points", "labels"):
        assert torch.equal(getattr(found, name), getattr(kept, name))
    torch.testing.assert_close(found.means.double(), kept.means, equal_nan=True, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.wheel, project_wheel(found.points, found.means))
    present = found.means[1:].double()
    unit = present / present.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.cosines[1:, 1:], unit @ unit.T)
    assert found.cosines[0].isnan().all()


def test_frames_come_in_the_order_of_training_and_of_the_same_images(tmp_path):
    for epoch in (1000, 20, 3):
        save_frame(frame(epoch), tmp_path)
    assert [each.epoch for each in load_frames(tmp_path)] == [3, 20, 1000]
    save_frame(frame(3, torch.zeros(8, 5)), tmp_path)  # of another model, replaced
    assert [each.epoch for each in load_frames(tmp_path)] == [20, 1000]
    assert load_frames(tmp_path / "none") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=003.npz", "epoch=020.npz", "epoch=1000.npz"]


@pytest.mark.parametrize("content", [b"", b"PK broken", b"text"])
def test_a_file_that_is_no_frame_is_named(tmp_path, content):
    (tmp_path / "epoch=000.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"epoch=000\.npz must be a frame"):
        load_frames(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 99])
def test_picked_frames_are_spread_with_both_ends(count):
    picked = pick_frames(range(count), 6)
    assert (picked[0], picked[-1], len(picked)) == (0, count - 1, min(count, 6))
    gaps = np.diff(picked)
    assert count == 1 or gaps.max() - gaps.min() <= 1


def test_errors_name_the_argument(tmp_path):
    frames, labels = history(2)
    with pytest.raises(ValueError, match="most must be at least 2"):
        pick_frames([1, 2], 1)
    with pytest.raises(ValueError, match="kind must be 'points' or 'similarity', got 'map'"):
        strip_figure(frames, labels, names(), kind="map")
    with pytest.raises(ValueError, match="frames must hold at least one"):
        strip_figure([], labels, names())
    with pytest.raises(ValueError, match="labels must be the classes of the points"):
        strip_figure(frames, None, names())
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1 for 2 class_names, got 0\.\.3"):
        strip_figure(frames, labels, names(2))
    with pytest.raises(ValueError, match="class_names must name 4 classes, got 3 names"):
        strip_figure(cosines(), None, names(3), kind="similarity")
    with pytest.raises(ValueError, match=r"frames must hold cosines of shape \(C, C\), got \(80, 7\)"):
        strip_figure(frames, None, names(), kind="similarity")
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        strip_figure(frames, labels, names(), columns=0)
    with pytest.raises(ValueError, match=r"path must end in \.gif, got 'run\.mp4'"):
        save_animation(frames, tmp_path / "run.mp4", labels, names())
    with pytest.raises(ValueError, match=r"got seconds=2 and hold=1"):
        save_animation(frames, tmp_path / "run.gif", labels, names(), seconds=2, hold=1)
