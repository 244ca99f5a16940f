import pytest
from jsonargparse import ArgumentParser

from simo_lightning.data import PairDataModule


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "Digits", "ImageFolder"])
def test_every_argument_is_on_the_command_line(name, capsys):
    parser = ArgumentParser()
    parser.add_subclass_arguments(PairDataModule, "data")
    arguments = ["--data", f"simo_lightning.data.{name}PairDataModule", "--data.samples_per_class", "7"]
    arguments += ["--data.data_dir", "somewhere"] * (name != "Digits")
    build = getattr(parser, "instantiate", parser.instantiate_classes)  # the older name warns in newer versions
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
