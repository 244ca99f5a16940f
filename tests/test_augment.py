import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from simo_lightning.data import BatchAugment
from tests.bounds import assert_float32_error


def batch(dtype=torch.uint8, shape=(7, 3, 9, 12), seed=0):
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def draws(count):
    return torch.rand(8, count, generator=generator())


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip_against_a_loop(mode, dtype):
    images = batch(dtype)
    result = BatchAugment(crop_padding=3, padding_mode=mode, flip=0.5)(images, generator())
    top, left, flip = draws(7)[:3]
    flips = 0
    for number, image in enumerate(images):
        mirrored = bool(flip[number] < 0.5)
        flips += mirrored
        padded = reference.pad(image, [3] * 4, padding_mode="reflect" if mode == "reflect" else "constant")
        cropped = reference.crop(padded, int(top[number] * 7), int(left[number] * 7), 9, 12)
        assert torch.equal(result[number], reference.horizontal_flip(cropped) if mirrored else cropped)
    assert 0 < flips < 7
    assert result.dtype == dtype


def test_jitter_against_torchvision():
    images = batch(torch.float64, (6, 3, 5, 5))
    augment = BatchAugment(crop_padding=0, flip=0, brightness=0.5, contrast=0.4, saturation=0.3)
    result = augment(images, generator())
    factors = 1 + torch.tensor([[0.5], [0.4], [0.3]]) * (2 * draws(6)[3:6] - 1)
    for number, image in enumerate(images):
        expected = reference.adjust_brightness(image, factors[0, number].item())
        expected = reference.adjust_contrast(expected, factors[1, number].item())
        expected = reference.adjust_saturation(expected, factors[2, number].item())
        torch.testing.assert_close(
            result[number], expected, atol=2e-4, rtol=0
        )  # of float64: theirs has 0.2989 for 0.299
    rounded = augment((images * 255).round().to(torch.uint8), generator())
    assert (rounded / 255.0 - result).abs().max() < 1.01 / 255


def test_cutout_against_a_loop():
    images = batch(torch.float32, (20, 2, 6, 8))
    result = BatchAugment(crop_padding=0, flip=0, cutout=3)(images, generator())
    row, column = draws(20)[6:]
    for number, image in enumerate(images):
        expected = [image.clone(), image.double()]
        y, x = int(row[number] * 6), int(column[number] * 8)
        for each in expected:
            each[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = each.mean((1, 2))[:, None, None]
        assert_float32_error(result[number], *expected, factor=2)


def test_one_channel_has_no_saturation():
    images = batch(shape=(4, 1, 8, 8))
    assert torch.equal(BatchAugment(crop_padding=0, flip=0, saturation=1.0)(images, generator()), images)
    assert BatchAugment(brightness=0.5, contrast=0.5, cutout=2)(images, generator()).shape == images.shape


def test_nothing_on_is_the_identity_and_the_input_is_kept():
    images = batch()
    assert torch.equal(BatchAugment(crop_padding=0, flip=0)(images, generator()), images)
    before = images.clone()
    BatchAugment(flip=1.0, brightness=1.0, contrast=1.0, saturation=1.0, cutout=4)(images, generator())
    assert torch.equal(images, before)


def test_the_generator_decides():
    augment = BatchAugment(brightness=0.4, cutout=4)
    images = batch()
    assert torch.equal(augment(images, generator(3)), augment(images, generator(3)))
    assert not torch.equal(augment(images, generator(3)), augment(images, generator(4)))


def test_images_of_a_batch_draw_apart():
    images = batch(shape=(1, 3, 16, 16)).repeat(64, 1, 1, 1)
    assert len(BatchAugment()(images, generator()).unique(dim=0)) > 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"crop_padding": -1}, "crop_padding must be at least 0 pixels, got -1"),
        ({"cutout": -2}, "cutout must be at least 0 pixels, got -2"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"contrast": -0.1}, r"contrast must lie in \[0, 1\], got -0.1"),
        ({"padding_mode": "edge"}, "padding_mode must be 'reflect' or 'zeros', got 'edge'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchAugment(**arguments)


def test_errors_of_a_batch():
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, H, W\), got \(3, 9, 12\)"):
        BatchAugment()(batch()[0], generator())
    with pytest.raises(ValueError, match="crop_padding must be less than the image's side to reflect it, got 9"):
        BatchAugment(crop_padding=9)(batch(), generator())
