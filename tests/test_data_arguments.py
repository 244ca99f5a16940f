import json

import pytest
import torchvision
from jsonargparse import ArgumentParser

from simo_lightning.data import BatchAugment, PairDataModule, PhotoAugment


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "Digits", "ImageFolder"])
def test_every_argument_is_on_the_command_line(name, capsys):
    parser = ArgumentParser()
    parser.add_subclass_arguments(PairDataModule, "data")
    arguments = ["--data", f"simo_lightning.data.{name}PairDataModule", "--data.samples_per_class", "7"]
    arguments += ["--data.data_dir", "somewhere"] * (name != "Digits")
    build = getattr(parser, "instantiate", parser.instantiate_classes)  # the older name warns in newer versions
    auto = name == "ImageFolder"  # the class is named, where the default leaves it open
    arguments += ["--data.augment", "simo_lightning.data.BatchAugment"] * auto
    config = parser.parse_args([*arguments, "--data.augment.flip", "0.25"])
    data = build(config).data
    assert (data.samples_per_class, data.augment.flip) == (7, 0.25)
    assert data.augment.crop_padding == (1 if name == "Digits" else 4)
    again = build(parser.parse_string(parser.dump(config))).data
    assert again.augment == data.augment
    assert build(parser.parse_args([*arguments, "--data.augment", "null"])).data.augment is None
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--data.sample_per_class", "7"])
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help=simo_lightning.data.{name}PairDataModule"])
    shown = capsys.readouterr().out
    assert "--data.split_seed" in shown
    assert "Share of each training class held out" in " ".join(shown.split())


COMPOSE = {
    "class_path": "torchvision.transforms.v2.Compose",
    "init_args": {
        "transforms": [
            {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.25}},
            {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": 32}},
        ]
    },
}
PHOTO = ["simo_lightning.data.PhotoAugment", "--data.augment.policy", "trivial", "--data.augment.scale", "[0.5, 1]"]


@pytest.mark.parametrize("name", ["CIFAR10", "ImageFolder"])  # whose defaults are BatchAugment and auto
def test_augment_by_class_path(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PairDataModule, "data")
    build = getattr(parser, "instantiate", parser.instantiate_classes)

    def augment_of(*words):
        arguments = ["--data", f"simo_lightning.data.{name}PairDataModule", "--data.data_dir", "somewhere"]
        config = parser.parse_args([*arguments, "--data.augment", *words])
        found = build(config).data.augment
        again = build(parser.parse_string(parser.dump(config, skip_none=False))).data.augment
        assert repr(again) == repr(found)
        return found

    assert augment_of(*PHOTO) == PhotoAugment(policy="trivial", scale=(0.5, 1.0))
    assert augment_of("simo_lightning.data.BatchAugment", "--data.augment.cutout", "8") == BatchAugment(cutout=8)
    assert augment_of("auto") == "auto"
    assert augment_of("null") is None
    flip, crop = augment_of(json.dumps(COMPOSE)).transforms
    assert (flip.p, crop.size) == (0.25, (32, 32))
    assert augment_of("torchvision.transforms.v2.RandomHorizontalFlip", "--data.augment.p", "0.1").p == 0.1
    assert augment_of("torchvision.transforms.v2.functional.hflip") is torchvision.transforms.v2.functional.hflip
    with pytest.raises(Exception, match="augment"):
        augment_of("5")
