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
from simo_lightning.checkpoints import load_encoder
from simo_lightning.export import export_encoder
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
