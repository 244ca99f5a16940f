"""Snapshots on disk, small multiples and animations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import (
    Snapshot,
    class_colors,
    describe_sequence,
    load_snapshots,
    pick_snapshots,
    project_sequence,
    save_animation,
    save_snapshot,
    small_multiples_figure,
    star_coordinates,
)
from tests.test_plotting import data, names


def history(n: int = 6) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Classes that separate over training."""
    last, labels = data()
    first = torch.randn(last.shape, generator=torch.Generator().manual_seed(5))
    return [(f"Epoch {epoch}", torch.lerp(first, last, epoch / (n - 1))) for epoch in range(n)], labels


def cosines(n: int = 6) -> list[tuple[str, Tensor]]:
    ones, eye = torch.ones(4, 4), torch.eye(4)
    return [(f"Epoch {epoch}", torch.lerp(ones, eye, epoch / (n - 1))) for epoch in range(n)]


def test_small_multiples_draw_every_epoch_by_one_map_on_common_axes():
    sequence, labels = history()
    figure = small_multiples_figure(sequence, labels, names())
    expected = project_sequence([points for _, points in sequence])
    assert [axes.get_title() for axes in figure.axes] == [title for title, _ in sequence]
    assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in figure.axes}) == 1
    for axes, points in zip(figure.axes, expected, strict=True):
        assert axes.get_xlim()[0] < points[:, 0].min() < points[:, 0].max() < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < points[:, 1].min() < points[:, 1].max() < axes.get_ylim()[1]
        (drawn,) = axes.collections
        np.testing.assert_array_equal(drawn.get_offsets(), points.numpy())
        colors = [to_rgb(class_colors(4)[label]) for label in labels.tolist()]
        np.testing.assert_array_equal(drawn.get_facecolor()[:, :3], colors)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names()


def test_points_of_two_dimensions_are_drawn_as_they_are():
    sequence, labels = history(2)
    flat = [(title, points[:, :2]) for title, points in sequence]
    figure = small_multiples_figure(flat, labels, names())
    for axes, (_, points) in zip(figure.axes, flat, strict=True):
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), points.numpy())


def test_small_multiples_of_cosines_show_them_on_one_scale():
    sequence = cosines(4)
    *panels, scale = small_multiples_figure(sequence, None, names()).axes
    assert len(panels) == 4
    for axes, (_, matrix) in zip(panels, sequence, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix.numpy())
        assert axes.images[0].get_clim() == (-1, 1)
    assert scale.get_xlabel() == "cosine"


def test_a_sequence_is_described_by_its_ends():
    sequence, labels = history()
    text = describe_sequence(sequence, labels, names())
    head = "Map of 80 embeddings of 4 classes, 6 pictures from Epoch 0 to Epoch 5: points with a nearest neighbour of"
    assert text.startswith(head)
    planes = project_sequence([points for _, points in sequence])
    shares = []
    for points in (planes[0], planes[-1]):
        distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
        shares.append(float((labels[distances.argmin(dim=1)] == labels).float().mean()))
    assert text.endswith(f"their own class from {100 * shares[0]:.0f} % to {100 * shares[1]:.0f} %.")
    assert shares[0] < 0.5 < 0.9 < shares[1]
    assert describe_sequence(cosines(), None, names()) == (
        "Cosines between the means of 4 classes, 6 pictures from Epoch 0 to Epoch 5: mean size from 1.00 to 0.00."
    )


@pytest.mark.parametrize("kind", ["points", "similarity"])
def test_an_animation_has_every_picture_once_and_holds_its_ends(tmp_path, kind):
    sequence, labels = history(4) if kind == "points" else (cosines(4), None)
    path = save_animation(sequence, tmp_path / "run.gif", labels, names(), seconds=0.4, hold=1.2)
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


def test_ten_epochs_of_many_points_stay_below_a_megabyte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    sequence = [(f"Epoch {epoch}", torch.randn(300, 2, generator=generator)) for epoch in range(10)]
    path = save_animation(sequence, tmp_path / "run.gif", labels, names(10), seconds=0.5, hold=0.5)
    assert path.stat().st_size < 1_000_000


def snapshot(epoch: int, points: Tensor | None = None) -> Snapshot:
    rows, labels = data(n=8)
    means = torch.stack([torch.full((7,), float("nan")), *rows[:3]]).double()
    return Snapshot(epoch, 10 * epoch, torch.tensor([0, 5, 2, 1]), means, rows if points is None else points, labels)


def test_a_snapshot_comes_back_from_disk(tmp_path):
    kept = snapshot(3)
    path = save_snapshot(kept, tmp_path / "plots" / "snapshots")
    assert path == tmp_path / "plots" / "snapshots" / "epoch=003.npz"
    (found,) = load_snapshots(path.parent)
    assert (found.epoch, found.step, found.title) == (3, 30, "Epoch 3")
    for name in ("counts", "points", "labels"):
        assert torch.equal(getattr(found, name), getattr(kept, name))
    torch.testing.assert_close(found.means, kept.means.float(), equal_nan=True, atol=0, rtol=0)
    assert torch.equal(found.star_coordinates, star_coordinates(found.points, found.means))
    present = found.means[1:].double()
    unit = present / present.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.cosines[1:, 1:], unit @ unit.T)
    assert found.cosines[0].isnan().all()


def test_a_snapshot_of_many_classes_keeps_the_means_of_some(tmp_path):
    rows, labels = torch.randn(2_002, 3, generator=torch.Generator().manual_seed(0)), torch.arange(2_002) % 1_001
    moments = class_moments(rows, labels, 1_001)
    save_snapshot(Snapshot.of_moments(0, 0, moments, rows[:5], labels[:5]), tmp_path)
    (found,) = load_snapshots(tmp_path)
    assert list(found.classes) == list(range(0, 1_001, 3))
    assert len(found.counts) == 1_001
    assert torch.equal(found.means, moments.means[::3].float())
    names_of = [f"class {index}" for index in found.classes]
    assert len(small_multiples_figure([(found.title, found.cosines)], None, names_of).axes) == 2


def test_snapshots_come_in_the_order_of_training_and_of_the_same_images(tmp_path):
    for epoch in (1000, 20, 3):
        save_snapshot(snapshot(epoch), tmp_path)
    assert [each.epoch for each in load_snapshots(tmp_path)] == [3, 20, 1000]
    save_snapshot(snapshot(3, torch.zeros(8, 5)), tmp_path)  # of another model, replaced
    assert [each.epoch for each in load_snapshots(tmp_path)] == [20, 1000]
    assert load_snapshots(tmp_path / "none") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=003.npz", "epoch=020.npz", "epoch=1000.npz"]


def test_a_file_that_is_no_snapshot_is_named(tmp_path):
    path = save_snapshot(snapshot(0), tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (b"", b"PK broken", b"text", whole[: len(whole) // 2], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"epoch=000\.npz must be a snapshot"):
            load_snapshots(tmp_path)


def test_a_snapshot_with_a_pickle_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    arrays = {name: np.array([Hostile()], dtype=object) for name in ("epoch", "step", "counts", "means", "points")}
    np.savez(tmp_path / "epoch=000.npz", labels=np.array([Hostile()], dtype=object), **arrays)
    with pytest.raises(ValueError, match="must be a snapshot"):
        load_snapshots(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 99])
def test_picked_snapshots_are_spread_with_both_ends(count):
    picked = pick_snapshots(range(count), 6)
    assert (picked[0], picked[-1], len(picked)) == (0, count - 1, min(count, 6))
    gaps = np.diff(picked)
    assert count == 1 or gaps.max() - gaps.min() <= 1


def test_errors_name_the_argument(tmp_path):
    sequence, labels = history(2)
    with pytest.raises(ValueError, match="most must be at least 2"):
        pick_snapshots([1, 2], 1)
    with pytest.raises(ValueError, match="sequence must hold at least one"):
        small_multiples_figure([], labels, names())
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1 for 2 class_names, got 0\.\.3"):
        small_multiples_figure(sequence, labels, names(2))
    with pytest.raises(ValueError, match="class_names must name 4 classes, got 3 names"):
        small_multiples_figure(cosines(), None, names(3))
    with pytest.raises(ValueError, match=r"sequence must hold cosines \(C, C\) if labels is None, got \(80, 7\)"):
        small_multiples_figure(sequence, None, names())
    with pytest.raises(ValueError, match=r"sequence must hold one or more tensors of the same shape"):
        small_multiples_figure([("a", torch.zeros(80, 3)), *sequence], labels, names())
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        small_multiples_figure(sequence, labels, names(), columns=0)
    with pytest.raises(ValueError, match=r"path must end in \.gif, got 'run\.mp4'"):
        save_animation(sequence, tmp_path / "run.mp4", labels, names())
    with pytest.raises(ValueError, match=r"got seconds=2 and hold=1"):
        save_animation(sequence, tmp_path / "run.gif", labels, names(), seconds=2, hold=1)
