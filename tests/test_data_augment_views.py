"""Zoom and grey, the augmentations for views of unlabelled images."""

import numpy as np
import pytest
import torch
from PIL import Image

from simo_lightning.data import BatchAugment


def generator():
    return torch.Generator().manual_seed(0)


def ramps(count=400, size=16):
    """Value = column in one channel and row in the other, so that a pixel tells where it comes from."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([columns, rows]).float().div(size - 1).repeat(count, 1, 1, 1)


def test_zoom_shows_rectangles_in_the_given_range_of_area_and_ratio():
    size, zoom = 16, 0.25
    images = BatchAugment(crop_padding=0, flip=0, zoom=zoom)(ramps(size=size), generator())
    # spacing of neighbouring pixels away from the border, in pixels of the image: the side as a share of the whole
    width = (images[:, 0, 8, 9] - images[:, 0, 8, 6]) / 3 * (size - 1)
    height = (images[:, 1, 9, 8] - images[:, 1, 6, 8]) / 3 * (size - 1)
    area, ratio = width * height, width / height
    assert (area.min(), area.max()) == (pytest.approx(zoom, abs=0.05), pytest.approx(1, abs=0.05))
    assert (ratio.min() > 3 / 4 - 0.02, ratio.max() < 4 / 3 + 0.02) == (True, True)
    assert area[width.maximum(height) < 0.95].mean() == pytest.approx((zoom + 0.9) / 2, abs=0.08)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images[:, 0].mean() == pytest.approx(0.5, abs=0.03)  # anywhere in the image
    assert images[:, 0].mean((1, 2)).std() > 0.05


def test_one_zoom_against_pillow():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    augment = BatchAugment(crop_padding=0, flip=0, zoom=0.3)
    ours = augment(torch.from_numpy(image).permute(2, 0, 1)[None], generator())[0].permute(1, 2, 0).numpy()
    torch.rand(8, 1, generator=(same := generator()))
    draws = torch.rand(5, 1, generator=same)[:, 0].tolist()
    area, ratio = 0.3 + 0.7 * draws[0], (4 / 3) ** (2 * draws[1] - 1)
    width, height = min(1, (area * ratio) ** 0.5) * 32, min(1, (area / ratio) ** 0.5) * 32
    left, top = draws[2] * (32 - width), draws[3] * (32 - height)
    box = (left, top, left + width, top + height)
    theirs = np.asarray(
        Image.fromarray(image).transform((32, 32), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    )
    inner = np.abs(ours.astype(int) - theirs.astype(int))[1:-1, 1:-1]
    assert inner.max() <= 2  # they round otherwise


def test_grey_takes_the_colours_of_some_images():
    images = torch.randint(256, (500, 3, 4, 4), dtype=torch.uint8, generator=generator())
    out = BatchAugment(crop_padding=0, flip=0, grey=0.3)(images, generator())
    grey = (out == out[:, :1]).flatten(1).all(1)
    assert 0.25 < grey.float().mean() < 0.35
    assert torch.equal(out[~grey], images[~grey])
    expected = (images[grey].double() * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(1).round()
    assert (out[grey][:, 0].double() - expected).abs().max() <= 1
    assert torch.equal(BatchAugment(crop_padding=0, flip=0, grey=1.0)(images[:, :1], generator()), images[:, :1])


def test_grey_does_not_change_the_other_draws():
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator())
    plain = BatchAugment(crop_padding=2, cutout=3, brightness=0.4)
    more = BatchAugment(crop_padding=2, cutout=3, brightness=0.4, grey=1e-9)
    assert torch.equal(plain(images, generator()), more(images, generator()))


@pytest.mark.parametrize("arguments", [{"zoom": 0.0}, {"zoom": 1.1}, {"grey": -0.1}, {"grey": 2.0}])
def test_errors(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{name} must lie in .*got {value}"):
        BatchAugment(**arguments)
