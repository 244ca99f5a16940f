"""Completion of the command's arguments, by the printed script in a real bash."""

import contextlib
import io
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest

from simo_lightning import ImageEncoder
from simo_lightning.cli import CALLBACKS, main
from simo_lightning.commands import COMMANDS

# Sets what readline sets at the TAB key, calls the function that `complete` names, and prints what it offers.
PRESS_TAB = """
source "$1"; shift
function=$(complete -p simo | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=(simo "$@"); COMP_CWORD=$#
$function simo "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["simo"])
        with pytest.raises(SystemExit, match="0"):
            main(["--print_completion", "bash"])
    path = tmp_path_factory.mktemp("completion") / "simo.bash"
    path.write_text(printed.getvalue())
    return path


def offered(script: Path, *words: str) -> set[str]:
    """What TAB offers after ``simo`` and these words, the last of which is being typed."""
    command = ["bash", "--norc", "-c", PRESS_TAB, "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return set(done.stdout.split())


def test_subcommands(script: Path) -> None:
    assert offered(script, "") == {"fit", "validate", "test", "predict", "plot", *COMMANDS}
    assert offered(script, "pre") == {"predict"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fit --trainer.max_e", {"--trainer.max_epochs"}),
        ("test --data.class_l", {"--data.class_level"}),
        ("fit --model.loss.fo", {"--model.loss.form"}),
        ("fit --model.optimizer.w", {"--model.optimizer.weight_decay"}),
        ("fit --model.lr_scheduler.w", {"--model.lr_scheduler.warmup"}),
        ("fit --model.preprocessing.cr", {"--model.preprocessing.crop_fraction"}),
        ("fit --data.augment.hu", {"--data.augment.hue"}),
        ("plot --max", {"--max_points"}),
        ("fit --max_p", set()),
        ("fit --knn.k", {"--knn.k"}),
        ("fit --trainer.max_epochs 3 --ckpt", {"--ckpt_path"}),
        ("fit --model Sim", {"SimOModule"}),
        ("fit --model.encoder ", {"ImageEncoder"}),
        ("fit --model.loss Simo", set()),
        ("fit --model.loss SimO", {"SimOLoss"}),
        ("fit --model.loss.form ", {"ratio", "log", "softmax"}),
        ("fit --data.augment ", {"auto", "BatchAugment", "PhotoAugment"}),
        ("fit --data.small_classes ", {"repeat", "skip", "error"}),
        ("fit --model.compile ", {"true", "false"}),
        ("fit --probe n", {"null"}),
    ],
)
def test_options_classes_and_choices(words: str, expected: set[str], script: Path) -> None:
    assert offered(script, *words.split(" ")) == expected


def test_paths(script: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.yaml").touch()
    both = {"photos", "photos.yaml"}
    assert offered(script, "fit", "--config", "ph") == offered(script, "fit", "--ckpt_path", "ph") == both
    assert offered(script, "fit", "--config", "photos.yaml", "--data.data_dir", "ph") == {"photos"}


def test_every_argument_of_the_encoder_and_of_the_callbacks_is_offered(script: Path) -> None:
    for option, cls in {"model.encoder": ImageEncoder, **CALLBACKS}.items():
        arguments = {f"--{option}.{name}" for name in cls.__init__.__annotations__.keys() - {"return", "kwargs"}}
        assert arguments <= offered(script, "fit", f"--{option}.")


class NoShtab(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "shtab":
            raise ModuleNotFoundError("No module named 'shtab'", name="shtab")


def test_other_shells_and_a_missing_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--print_completion", "fish"])
    assert "invalid choice: 'fish' (choose from" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "shtab", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoShtab(), *sys.meta_path])
    with pytest.raises(SystemExit, match="1"):
        main(["--print_completion", "zsh"])
    assert "simo: error: shtab is missing: pip install 'simo_lightning[completion]'" in capsys.readouterr().err
