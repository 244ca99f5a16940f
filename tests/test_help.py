"""The help of the command and its messages about wrong arguments, by the command's own parser."""

from pathlib import Path

import pytest

from simo_lightning import ImageEncoder, SimOLoss
from simo_lightning.cli import main
from simo_lightning.help import own_classes

CONFIG = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
DIGITS = ["fit", "--data", "DigitsPairDataModule", "--model", "SimOModule"]


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "options", "most_lines"),
    [
        (["--model.help"], ["SimOModule ", "ProbeModule ", "--model.encoder ENCODER", "--model.loss LOSS"], 200),
        (["--model.help", "ProbeModule"], ["--model.num_classes", "--model.checkpoint"], 200),
        (["--model.encoder.help", "ImageEncoder"], ["--model.encoder.backbone", "--model.encoder.norm"], 120),
        (["--model.encoder.help=ImageEncoder"], ["--model.encoder.backbone"], 120),
        (["--model.encoder.help"], ["ImageEncoder", "--model.encoder.backbone"], 120),
        (["--model.loss.help", "SimOLoss"], ["--model.loss.level {group,class,centroid,pair}"], 120),
        (["--model.loss.help"], ["SimOLoss ", "SemiSupervisedLoss "], 20),
        (["--model.optimizer.help", "AdamW"], ["--model.optimizer.weight_decay"], 120),
        (["--data.help"], ["ImageFolderPairDataModule ", "CIFAR10PairDataModule "], 25),
        (["--data.help", "ImageFolderPairDataModule"], ["--data.data_dir", "--data.samples_per_class"], 250),
        (["--data", "DigitsPairDataModule", "--data.augment.help", "BatchAugment"], ["--data.augment.flip"], 80),
        (["--config", CONFIG, "--data.help"], ["--data.val_fraction"], 150),
        (["--knn.help"], ["--knn.k K", "--knn.bank_size"], 80),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and str(value[0]).startswith("--") else "",
)
def test_help_shows_what_a_user_sets(
    words: list[str], options: list[str], most_lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(capsys, "fit", *words)
    for option in options:
        assert option in text
    assert "torch.nn.modules" not in text
    assert "known subclasses" not in text
    assert len(text.splitlines()) <= most_lines


def test_classes_are_those_for_the_argument() -> None:
    assert own_classes("model.encoder")["ImageEncoder"] is ImageEncoder
    assert own_classes("model.loss")["SimOLoss"] is SimOLoss
    assert "ImageEncoder" not in own_classes("model.loss")
    assert not {"PairDataModule", "TensorPairDataModule", "SemiSupervisedPairDataModule"} & own_classes("data").keys()
    assert own_classes("trainer.logger") == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.encoder", "ImageEncodr"], "--model.encoder must be a class (ImageEncoder"),
        (["--model.encoder", "ImageEncodr"], "got ImageEncodr, did you mean ImageEncoder?"),
        (
            ["--model.encoder", "ImageEncoder", "--model.encoder.backbon", "resnet18"],
            "--model.encoder.backbon is no argument of ImageEncoder, did you mean --model.encoder.backbone? ",
        ),
        (
            ["--model.encoder", "ImageEncoder", "--model.encoder.width", "wide"],
            "--model.encoder.width must be float, got wide ",
        ),
        (
            ["--model.encoder", "ImageEncoder", "--model.loss", "SimOLoss", "--model.loss.form", "typo"],
            "--model.loss.form must be one of 'ratio', 'log', 'softmax', got typo ",
        ),
        (["--model.encoder", "torch.nn.Identity", "--model.encoder.foo", "3"], "--model.encoder.foo is no argument of"),
        (["--model.loss", "SimOLoss"], "--model.encoder must be given "),
        (["--model.encoder", "ImageEncoder", "--knn.kk", "3"], "--knn.kk is no argument of OnlineKNN, did you mean"),
    ],
)
def test_a_wrong_argument_is_named_with_what_it_must_be(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*DIGITS, *words])
    assert stop.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"simo: error: {message}" in error if message.startswith("--") else message in error
