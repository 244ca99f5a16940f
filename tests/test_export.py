import importlib.util
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simo_lightning import ImageEncoder, SimOLoss, SimOModule
from simo_lightning.checkpoints import TrainingClasses, load_encoder
from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.cli import main
from simo_lightning.export import export_checked, export_encoder, exported_metadata
from simo_lightning.extras import missing_extra
from simo_lightning.preprocessing import Preprocessing
from tests.bounds import assert_float32_error
from tests.checkpoint_parts import save

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra export: pip install 'simo_lightning[export]'")
FORMATS = [pytest.param("pt2"), pytest.param("onnx", marks=needs_onnx)]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def trained(**arguments: Any) -> ImageEncoder:
    """An encoder whose running statistics are no longer those of the start."""
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", embedding_dim=8, **arguments)
    with torch.no_grad():
        encoder(torch.rand(8, encoder.in_channels or 3, 16, 16))
    return encoder


def run(path: Path, images: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        embeddings: Tensor = torch.export.load(path).module()(images)
        return embeddings
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["embeddings"], {"images": images.numpy()})[0])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_same_up_to_rounding(found: Tensor, encoder: nn.Module, images: Tensor) -> None:
    """The error of a file's float32 against float64 is at most 16 times that of the encoder's own float32.

    Exporters fold the norms into the convolutions and sum in another order: each of some ten layers rounds differently,
    and each rounding is passed on with a gain of about one.
    """
    with torch.no_grad():
        plain, exact = encoder(images.float()), deepcopy(encoder).double()(images.double())
    assert_float32_error(found, plain, exact, factor=16)


@pytest.mark.parametrize(("ending", "norm"), [("pt2", "layer"), pytest.param("onnx", "batch", marks=needs_onnx)])
def test_the_file_embeds_as_the_encoder_does_at_any_batch_size(ending: str, norm: Any, tmp_path: Path) -> None:
    encoder = trained(norm=norm)
    was_training = encoder.training
    path = export_encoder(encoder, tmp_path / "new" / f"encoder.{ending}", image_size=16)
    assert encoder.training == was_training
    encoder.eval()
    for size in (1, 2, 7):
        images = random(size, 3, 16, 16)
        assert_same_up_to_rounding(run(path, images), encoder, images)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_checkpoint_with_its_normalisation_takes_raw_images(ending: str, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    module = SimOModule(trained(), SimOLoss())
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    path = export_encoder(tmp_path / "a.ckpt", tmp_path / f"e.{ending}", image_size=(16, 24), mean=MEAN, std=STD)
    images = torch.randint(256, (3, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    assert_same_up_to_rounding(run(path, images), module.encoder.eval(), (images.double() / 255 - mean) / std)


@pytest.mark.parametrize("ending", FORMATS)
def test_the_file_of_a_model_that_knows_its_images_embeds_uint8_as_the_model_does(ending: str, tmp_path: Path) -> None:
    module = SimOModule(trained(), preprocessing=Preprocessing((16, 24), MEAN, STD)).eval()
    images = torch.randint(256, (5, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, exact = module.embed(images), deepcopy(module).double().embed(images)
    assert plain.dtype == torch.float32
    saved = save(module, tmp_path / "a.ckpt")
    sources = [saved] if ending == "onnx" else [saved, module, load_encoder(saved)]
    for number, source in enumerate(sources):
        path = export_encoder(source, tmp_path / f"{number}.{ending}")
        assert_float32_error(run(path, images), plain, exact, factor=16)


def test_what_the_preprocessing_leaves_open_is_passed(tmp_path: Path) -> None:
    module = SimOModule(trained(), preprocessing=Preprocessing(16)).eval()
    images = random(3, 3, 16, 16)
    assert_same_up_to_rounding(run(export_encoder(module, tmp_path / "a.pt2"), images), module.encoder, images)
    path = export_encoder(module, tmp_path / "b.pt2", image_size=(16, 16), mean=MEAN, std=STD, in_channels=3)
    raw = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known = Preprocessing(16, tuple(MEAN), tuple(STD)).normalize(raw)
    assert_same_up_to_rounding(run(path, raw), module.encoder, known)


def named() -> SimOModule:
    """A module with classes, for images that are not square."""
    module = SimOModule(trained(), preprocessing=Preprocessing((16, 24), MEAN, STD, resize="pad")).eval()
    module.classes = TrainingClasses(["ant", "bee"])
    return module


@pytest.mark.parametrize("ending", FORMATS)
def test_the_command_writes_the_same_vectors_and_what_the_model_knows(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, path = named(), tmp_path / f"e.{ending}"
    main(["export", str(save(module, tmp_path / "a.ckpt")), str(path)])
    for size in (1, 5):
        images = torch.randint(256, (size, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            assert float((run(path, images) - module.embed(images)).abs().max()) <= 1e-4
    found = exported_metadata(path)
    assert found["class_names"] == ["ant", "bee"]
    assert found["embedding_dim"] == 8
    assert Preprocessing(**found["preprocessing"]) == module.preprocessing
    printed = capsys.readouterr().out
    assert "uint8 images of 16 x 24 pixels" in printed
    assert float(printed.partition("difference from the model ")[2].partition(",")[0]) <= 1e-4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.ckpt", path.name]


class ExportsWrongly(InitArgumentsMixin, nn.Module):
    """An encoder whose exported graph adds a thousandth."""

    in_channels = 3

    def forward(self, images: Tensor) -> Tensor:
        found = images.mean(dim=(2, 3))
        return found + 1e-3 if torch.compiler.is_exporting() else found


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_with_other_vectors_is_refused_and_the_old_one_kept(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"e.{ending}"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"differ from the model's by at most 0\.0001, got 0\.001: no file is written"):
        export_checked(ExportsWrongly(), path, image_size=8, mean=MEAN, std=STD)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert export_checked(ExportsWrongly(), path, tolerance=1e-2, image_size=8)[1] == pytest.approx(1e-3, rel=0.01)


def test_wrong_arguments_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(named(), tmp_path / "a.ckpt")
    for words, message in (
        (["a.ckpt", "e.bin"], "path must end in .onnx or .pt2, got e.bin"),
        (["a.ckpt", "e.pt2", "--tolerance", "0"], "tolerance must be positive, got 0.0"),
        (
            ["a.ckpt", "e.pt2", "--image_size", "[1,2,3]"],
            "image_size must be a side, or height and width, got [1, 2, 3]",
        ),
        (["none.ckpt", "e.pt2"], "no checkpoint at none.ckpt"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *words])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"simo export: error: {message}")
    assert not list(tmp_path.glob("e.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"image_size": 32},
            r"image_size of the exported file must be that of the model's preprocessing, 16, got 32: leave it out",
        ),
        (
            {"mean": STD, "std": STD},
            r"mean of the exported file must be .*, \[0\.5, 0\.4, 0\.3\], got \[0\.2, ",
        ),
        ({"in_channels": 1}, "channels of the exported file must be that of the model's preprocessing, 3, got 1"),
    ],
)
def test_arguments_that_contradict_the_model_are_refused(arguments: dict[str, Any], message: str) -> None:
    module = SimOModule(trained(), preprocessing=Preprocessing(16, MEAN, STD))
    with pytest.raises(ValueError, match=message):
        export_encoder(module, "encoder.pt2", **arguments)


def test_the_file_does_not_need_this_package(tmp_path: Path) -> None:
    encoder = trained(in_channels=1)
    path = export_encoder(encoder, tmp_path / "e.pt2", image_size=8)
    np.save(tmp_path / "images.npy", random(3, 1, 8, 8).numpy())
    script = (
        "import sys, numpy, torch; sys.modules['simo_lightning'] = None\n"
        f"images = torch.from_numpy(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        f"numpy.save({str(tmp_path / 'out.npy')!r}, torch.export.load({str(path)!r}).module()(images).detach().numpy())"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert_same_up_to_rounding(found, encoder.eval(), random(3, 1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "encoder.bin"}, r"format must be 'torch' or 'onnx', or the path end in \.pt2 or \.onnx"),
        ({"format": "jit"}, "format must be 'torch' or 'onnx'"),
        ({"mean": MEAN}, "mean and std must be given both or neither"),
        ({"mean": MEAN, "std": [0.0, 1.0, 1.0]}, "std be positive"),
        ({"in_channels": 1}, r"images must have shape \(N, 3, H, W\), got \(2, 1, 16, 16\)"),
        ({"image_size": None}, "image_size must be given for an encoder whose preprocessing is not known, got None"),
        ({"source": 3}, "source must be a checkpoint, a module or an encoder, got int"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_encoder(**{"source": trained(), "path": "encoder.pt2", "image_size": 16, **arguments})


def test_a_missing_checkpoint_or_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        export_encoder(tmp_path / "none.ckpt", tmp_path / "e.pt2", image_size=16)


@pytest.mark.skipif(HAS_ONNX, reason="the extra export is installed")
def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install 'simo_lightning\[export\]'"):
        export_encoder(nn.Flatten(), tmp_path / "e.onnx", image_size=16)


def test_only_modules_of_an_extra_name_it() -> None:
    assert (
        missing_extra("No module named 'onnxscript'") == "onnxscript is missing: pip install 'simo_lightning[export]'"
    )
    assert missing_extra("No module named 'numpy'") is None
    assert missing_extra("Expected an int") is None
