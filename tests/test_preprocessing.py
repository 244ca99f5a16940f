"""What a module does with images, and what its checkpoints know of them."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simo_lightning import ImageEncoder, ProbeModule, SimOModule
from simo_lightning.checkpoints import adopt_preprocessing, load_encoder, load_module, load_preprocessing
from simo_lightning.preprocessing import Preprocessing, encoder_input
from tests.bounds import assert_float32_error
from tests.checkpoint_parts import Flat, OwnEncoder, save

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
KNOWN = Preprocessing((6, 8), MEAN, STD)
GREY = Preprocessing(8, (0.3,), (0.2,), channels=1)


def uint8(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 4))


def module(**arguments: Any) -> SimOModule:
    return SimOModule(encoder(), **arguments).eval()


def test_uint8_images_of_the_size_are_normalised() -> None:
    images, model = uint8(5, 3, 6, 8), module(preprocessing=KNOWN)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    exact = (images.double() / 255 - mean) / std
    wanted = [model.encoder.to(dtype)(exact.to(dtype)) for dtype in (torch.float64, torch.float32)]
    assert_float32_error(model.embed(images), wanted[1], wanted[0], factor=8)
    assert torch.equal(model(KNOWN.normalize(images)), model(images))


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_images_of_another_size_are_resized_by_the_rule_of_the_model(resize: Any) -> None:
    preprocessing = replace(KNOWN, resize=resize)
    model, images = module(preprocessing=preprocessing), uint8(2, 3, 13, 9)
    assert torch.equal(model.embed(images), model.embed(preprocessing.normalize(preprocessing.fit(images))))
    assert model.embed(images).shape == (2, 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (uint8(2, 1, 6, 8), r"images must have shape \(N, 3, H, W\), got \(2, 1, 6, 8\)"),
        (torch.zeros(2, 1, 6, 8), r"images must have shape \(N, 3, H, W\), got \(2, 1, 6, 8\)"),
        (torch.zeros(3, 6, 8), r"images must have shape \(N, 3, H, W\), got \(3, 6, 8\)"),
        (torch.zeros(2, 3, 6, 8, dtype=torch.int64), "images must be uint8 in 0..255 .*, got torch.int64"),
        (uint8(2, 3, 6, 8).float(), r"normalised, to about -2\.5\.\.2\.5, got 0\.\.254: pass raw images as uint8"),
    ],
)  # fmt: skip
def test_images_that_are_not_the_models_are_one_clear_error(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(preprocessing=KNOWN).embed(images)


def test_noise_of_five_sigma_and_batches_of_none_are_in_range() -> None:
    assert encoder_input(torch.full((1, 3, 6, 8), 5.0), KNOWN, check_range=True).max() == 5
    assert len(encoder_input(torch.zeros(0, 3, 6, 8), KNOWN, check_range=True)) == 0


def test_a_module_that_does_not_know_its_images_takes_floats_alone() -> None:
    images = torch.rand(2, 3, 6, 8)
    for preprocessing in (None, Preprocessing((6, 8))):
        model = module(preprocessing=preprocessing)
        assert torch.equal(model.embed(images), model.encoder(images))
        with pytest.raises(
            ValueError, match=r"takes no uint8 images: pass preprocessing=Preprocessing\(image_size, mean"
        ):
            model.embed(uint8(2, 3, 6, 8))


def test_an_encoder_with_pretrained_weights_brings_its_own() -> None:
    model = module()
    model.encoder.preprocessing = KNOWN  # type: ignore[assignment]
    images = uint8(2, 3, 6, 8)
    assert torch.equal(model.embed(images), model.encoder(KNOWN(images)))
    model.preprocessing = replace(KNOWN, mean=(0.0, 0.0, 0.0))  # of the module, which goes first
    assert not torch.equal(model.embed(images), model.encoder(KNOWN(images)))


def test_every_way_to_open_a_checkpoint_knows_its_preprocessing(tmp_path: Path) -> None:
    path = save(
        SimOModule(ImageEncoder("resnet10", width=0.125, in_channels=1), preprocessing=GREY), tmp_path / "a.ckpt"
    )
    stored = torch.load(path, weights_only=True)["simo_module"]["init_args"]["preprocessing"]
    assert stored["class_path"] == "simo_lightning.Preprocessing"
    assert (stored["init_args"]["image_size"], stored["init_args"]["mean"]) == (8, (0.3,))
    images = uint8(3, 1, 12, 12)
    again = [SimOModule.load_from_checkpoint(path).eval(), load_module(path).eval()]
    assert [each.preprocessing for each in again] == [GREY, GREY]
    alone: Any = load_encoder(path).eval()
    assert alone.preprocessing == load_preprocessing(path) == GREY
    assert torch.equal(again[0].embed(images), alone(alone.preprocessing(images)))
    assert (
        SimOModule.load_from_checkpoint(path, preprocessing=replace(GREY, image_size=9)).preprocessing.image_size == 9
    )
    assert SimOModule(load_encoder(path)).embed(images).shape == (3, 16)


def test_a_preprocessing_that_came_later_is_stored_too(tmp_path: Path) -> None:
    model = OwnEncoder(gain=2.0)  # a subclass whose __init__ has no such argument
    model.preprocessing = GREY
    path = save(model, tmp_path / "a.ckpt")
    for again in (OwnEncoder.load_from_checkpoint(path), load_module(path, trusted=OwnEncoder)):
        assert (again.gain, again.preprocessing) == (2.0, GREY)
    encoder: Any = load_encoder(path, trusted=OwnEncoder)
    assert encoder.preprocessing == GREY


def test_a_probe_sees_images_as_its_checkpoint_does(tmp_path: Path) -> None:
    path = save(SimOModule(Flat(), preprocessing=GREY), tmp_path / "a.ckpt")
    probe = ProbeModule(10, str(path), trusted=["tests"]).eval()
    assert probe.preprocessing == GREY
    images = uint8(3, 1, 10, 10)
    assert torch.equal(probe(images), probe.head(probe.encoder(GREY(images))))
    again = ProbeModule.load_from_checkpoint(save(probe, tmp_path / "b.ckpt"), trusted=Flat)
    assert again.preprocessing == GREY
    same = ProbeModule(10, str(path), trusted=["tests"], preprocessing=replace(GREY, mean=None, std=None))
    assert same.preprocessing == GREY
    with pytest.raises(
        ValueError, match=r"image_size of preprocessing must be that of checkpoint \S+a\.ckpt, 8, got 9"
    ):
        ProbeModule(10, str(path), trusted=["tests"], preprocessing=replace(GREY, image_size=9))


def without_preprocessing(path: Path) -> Path:
    """The checkpoint as an older version wrote it."""
    return edited(path, None)


def edited(path: Path, description: Any) -> Path:
    content = torch.load(path, weights_only=True)
    content["simo_module"]["init_args"]["preprocessing"] = description
    if description is None:
        del content["simo_module"]["init_args"]["preprocessing"]
    torch.save(content, path)
    return path


def test_a_checkpoint_of_an_older_version_says_what_to_pass(tmp_path: Path) -> None:
    path = without_preprocessing(save(SimOModule(Flat(), preprocessing=GREY), tmp_path / "a.ckpt"))
    old = SimOModule.load_from_checkpoint(path, trusted=Flat)
    assert old.preprocessing is load_preprocessing(path) is None
    with pytest.raises(ValueError, match=r"does not know the mean and std.* to it or to load_from_checkpoint"):
        old.embed(uint8(1, 1, 8, 8))
    assert SimOModule.load_from_checkpoint(path, trusted=Flat, preprocessing=GREY).preprocessing == GREY


CLASS = "simo_lightning.Preprocessing"


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}, f"must be a {CLASS}"),
        ({"class_path": "os.system", "init_args": {"command": "true"}}, f"must be a {CLASS}"),
        (["crop"], f"must be a {CLASS}"),
        ({"class_path": CLASS, "init_args": {"image_size": 10**9}}, "up to 65,535 pixels, got 1000000000"),
        ({"class_path": CLASS, "init_args": {"image_size": 8.5}}, "cannot be used"),
        ({"class_path": CLASS, "init_args": {"image_size": "8"}}, "one or two whole numbers"),
        ({"class_path": CLASS, "init_args": {"mean": (0.1,) * 3, "std": (0.0,) * 3}}, "std must be positive"),
        ({"class_path": CLASS, "init_args": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        ({"class_path": CLASS}, "init_args"),
    ],
)  # fmt: skip
def test_a_file_with_another_preprocessing_is_refused_in_one_line(
    description: Any, message: str, tmp_path: Path
) -> None:
    path = edited(save(SimOModule(Flat(), preprocessing=GREY), tmp_path / "a.ckpt"), description)
    for opened in (
        lambda: SimOModule.load_from_checkpoint(path, trusted=Flat),
        lambda: load_encoder(path, trusted=Flat),
        lambda: load_preprocessing(path),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            opened()
        assert str(raised.value).startswith(f"the preprocessing of checkpoint {path} cannot be used: ")
        assert "\n" not in str(raised.value)


def test_files_of_other_kinds_have_no_preprocessing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_preprocessing(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert load_preprocessing(tmp_path / "foreign.ckpt") is None
    torch.save({"state_dict": {}, "other": Path}, tmp_path / "objects.ckpt")  # which the trainer may be told to trust
    assert load_preprocessing(tmp_path / "objects.ckpt") is None
    whole = save(SimOModule(Flat(), preprocessing=GREY), tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:4000])
    with pytest.raises(ValueError, match="cut short"):
        load_preprocessing(tmp_path / "cut.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_preprocessing(tmp_path / "pickle.ckpt")


def test_a_sharded_checkpoint_is_read_without_its_shards(tmp_path: Path) -> None:
    content = torch.load(save(SimOModule(Flat(), preprocessing=GREY), tmp_path / "a.ckpt"), weights_only=True)
    (tmp_path / "sharded.ckpt").mkdir()
    torch.save({"simo_module": content["simo_module"]}, tmp_path / "sharded.ckpt" / "meta.pt")
    assert load_preprocessing(tmp_path / "sharded.ckpt") == GREY


def test_a_module_adopts_the_preprocessing_of_a_file_unless_it_was_passed_another_one(tmp_path: Path) -> None:
    path = save(SimOModule(Flat(), preprocessing=GREY), tmp_path / "a.ckpt")
    for given in (None, GREY, Preprocessing(8, channels=1)):
        model = SimOModule(Flat(), preprocessing=given)
        adopt_preprocessing(model, path)
        assert model.preprocessing == GREY
    model = SimOModule(Flat(), preprocessing=replace(GREY, std=(0.5,)))
    with pytest.raises(
        ValueError, match=r"std of the preprocessing of SimOModule must be that .*a\.ckpt, \[0\.2\], got \[0\.5\]"
    ):
        adopt_preprocessing(model, path)
    adopt_preprocessing(nn.Linear(1, 1), path)  # which has none


def test_differences_are_of_what_both_know() -> None:
    assert KNOWN.differences({}) == []
    assert KNOWN.differences({"image_size": [6, 9], "mean": list(MEAN), "std": None}) == ["image_size"]
    assert KNOWN.differences({"image_size": (6, 8), "channels": 1, "background": "black"}) == ["channels", "background"]
    assert Preprocessing(8).differences({"image_size": (8, 8), "mean": MEAN, "std": STD}) == []


def test_images_in_memory_may_have_any_number_of_channels() -> None:
    preprocessing = Preprocessing(8, channels=4, resize="pad", background="black")
    images = torch.full((1, 4, 4, 8), 9, dtype=torch.uint8)
    fitted = preprocessing.fit(images)
    assert (fitted[:, :, 2:6] == 9).all()
    assert (fitted[:, :, [0, 1, 6, 7]] == 0).all()
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\) to read image files, got 4"):
        preprocessing.square(None)  # type: ignore[arg-type]
