import io

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from simo_lightning.data import Crop, PhotoAugment
from simo_lightning.data.folder import FolderImages
from simo_lightning.data.labels import Relabelled
from simo_lightning.data.pictures import augment_one
from simo_lightning.data.sources import JoinedImages
from simo_lightning.preprocessing import Decoder, Preprocessing

SMALL = Preprocessing(image_size=(24, 32))


def photo(width=90, height=60, seed=0):
    """Smooth colours, as in a photograph, so that a smaller decoding shows the same."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


class Files:
    """Pictures read from JPEG files, and the sizes at which they were decoded."""

    def __init__(self, folder, *pictures, **options):
        self.paths, self.decoded = [], []
        for number, picture in enumerate(pictures):
            self.paths.append(folder / f"{number}.jpg")
            picture.save(self.paths[-1], quality=95, subsampling=0, **options)

    def picture(self, index, size=None):
        picture = Decoder()(self.paths[index], size)[0]
        self.decoded.append(picture.size)
        return picture


def rounded(crop, whole, decoded):
    """The crop in whole pixels of the smaller decoding, in those of the whole picture."""
    return crop.scaled(whole, decoded).scaled(decoded, whole)


@pytest.mark.parametrize("policy", [None, "trivial", "rand"])
def test_it_equals_the_transforms_of_torchvision_with_the_same_seed(policy):
    augment = PhotoAugment((0.3, 0.9), (0.5, 2.0), 0.4, policy, 0.1, 0.2, 0.3, 0.1, erasing=0.7)
    policies = {None: [], "trivial": [v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)],
                "rand": [v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)]}  # fmt: skip
    crop = v2.RandomResizedCrop((24, 32), (0.3, 0.9), (0.5, 2.0))
    more = [v2.ColorJitter(0.1, 0.2, 0.3, 0.1), v2.PILToTensor(), v2.RandomErasing(0.7, value=[124.0, 116.0, 104.0])]
    by_hand = v2.Compose([crop, v2.RandomHorizontalFlip(0.4), *policies[policy], *more])
    for seed in range(20):
        torch.manual_seed(seed)
        expected = by_hand(photo())
        torch.manual_seed(seed)
        image = augment(photo(), SMALL)
        assert image.dtype == torch.uint8
        assert torch.equal(image, expected)


@pytest.mark.parametrize("width, height", [(400, 300), (300, 400), (1000, 10), (3, 500), (1, 1)])
def test_a_crop_is_that_of_torchvision(width, height):
    """Also where ten draws do not fit into a strip, and the centre is taken."""
    augment, whole = PhotoAugment(scale=(0.08, 1.0)), torch.empty(3, height, width)
    for seed in range(30):
        torch.manual_seed(seed)
        crop = augment.draw_crop(width, height)
        torch.manual_seed(seed)
        assert tuple(crop) == torchvision.transforms.RandomResizedCrop.get_params(whole, [0.08, 1.0], [3 / 4, 4 / 3])


def test_a_large_jpeg_is_decoded_as_small_as_the_crop_allows(tmp_path):
    files, augment = Files(tmp_path, photo(960, 720)), PhotoAugment()
    scales = set()
    for seed in range(40):
        small = augment_one(files, 0, augment, SMALL, [seed])[0]
        torch.manual_seed(seed)
        crop = augment.draw_crop(960, 720)
        scale = 960 // files.decoded[-1][0]
        scales.add(scale)
        assert min(crop.width / 32, crop.height / 24) >= scale
        assert scale == 8 or min(crop.width / 32, crop.height / 24) < 2 * scale
        whole = augment(Image.open(files.paths[0]), SMALL, rounded(crop, (960, 720), files.decoded[-1]))
        assert (small.float() - whole.float()).abs().mean() < 1
    assert scales == {8}
    for size, scale in (((400, 500), 1), ((300, 400), 2), ((150, 200), 4), ((80, 100), 8)):
        augment_one(files, 0, PhotoAugment(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3)), Preprocessing(size), [0])
        assert files.decoded[-1] == (960 // scale, 720 // scale)


def test_views_come_from_one_decoding(tmp_path):
    files, augment = Files(tmp_path, photo(480, 360)), PhotoAugment(policy="trivial")
    model = Preprocessing(128)
    views = augment_one(files, 0, augment, model, [1, 2, 3])
    assert len(files.decoded) == 1
    for seed, view in zip([1, 2, 3], views, strict=True):
        torch.manual_seed(seed)
        expected = augment(Image.open(files.paths[0]), model)  # the crop of no view could be decoded smaller
        assert torch.equal(view, expected)


def test_the_crop_is_one_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    files = Files(tmp_path, photo(960, 480), exif=exif)
    upright = Decoder()(files.paths[0])[0]
    assert upright.size == (480, 960)
    augment = PhotoAugment()
    for seed in range(10):
        turned = augment_one(files, 0, augment, SMALL, [seed])[0]
        torch.manual_seed(seed)
        crop = augment.draw_crop(480, 960)
        expected = augment(upright, SMALL, rounded(crop, (480, 960), (60, 120)))
        assert (turned.float() - expected.float()).abs().mean() < 1
    assert set(files.decoded) == {(60, 120)}


def test_a_crop_in_a_picture_of_another_size():
    assert Crop(100, 200, 300, 400).scaled((1000, 800), (1000, 800)) == Crop(100, 200, 300, 400)
    assert Crop(100, 200, 300, 400).scaled((1000, 800), (500, 200)) == Crop(25, 100, 75, 200)
    assert Crop(1, 1, 1, 1).scaled((8, 8), (1, 1)) == Crop(0, 0, 1, 1)


def test_one_channel():
    model = Preprocessing(16, channels=1)
    augment = PhotoAugment(policy="rand", hue=0.1, erasing=1.0)
    for picture in (photo(), photo().convert("L")):
        image = augment(picture, model)
        assert (image.shape, image.dtype) == ((1, 16, 16), torch.uint8)


def test_everything_off_is_the_picture_resized():
    off = PhotoAugment((1.0, 1.0), (1.0, 1.0), flip=0.0)
    expected = torchvision.transforms.functional.pil_to_tensor(photo(60, 60).resize((20, 20), Image.Resampling.BICUBIC))
    assert torch.equal(off(photo(60, 60), Preprocessing(20, interpolation="bicubic")), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale": (0.0, 1.0)}, r"scale must be two positive numbers in ascending order, at most 1, got \[0.0, 1.0\]"),
        ({"scale": (0.5, 1.5)}, r"scale must be .*, got \[0.5, 1.5\]"),
        ({"scale": [0.5]}, r"scale must be .*, got \[0.5\]"),
        ({"ratio": (2.0, 1.0)}, r"ratio must be two positive numbers in ascending order, got \[2.0, 1.0\]"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"erasing": -0.1}, r"erasing must lie in \[0, 1\], got -0.1"),
        ({"hue": 0.6}, r"hue must lie in \[0, 0.5\], got 0.6"),
        ({"policy": "auto"}, "policy must be 'trivial', 'rand' or None, got 'auto'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        PhotoAugment(**arguments)


def test_a_large_picture_of_another_format_is_decoded_whole():
    buffer = io.BytesIO()
    photo(300, 200).save(buffer, "PNG")
    asked = []
    picture = Decoder()(buffer, lambda width, height: asked.append((width, height)) or (30, 20))[0]
    assert (picture.size, asked) == ((300, 200), [(300, 200)])


def test_a_transform_that_fails_names_the_file(tmp_path):
    def fails(picture):
        raise KeyError("colour")

    names = np.array(["0.png", "1.png"])
    for name in names:
        photo(20, 10).save(tmp_path / name)
    files = FolderImages(tmp_path, names, torch.tensor([0, 1]), ["a", "b"], SMALL)
    joined = JoinedImages([files.subset(torch.tensor([0])), files], ["a", "b"])
    for source, index in ((files, 1), (joined, 2), (Relabelled(files, files.labels, ["a", "b"]), 1)):
        with pytest.raises(RuntimeError, match=r"augment fails failed on '.*1\.png', a picture of 20 x 10: KeyError"):
            augment_one(source, index, fails, SMALL, [0])
