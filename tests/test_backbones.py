"""Trained weights of a backbone against torchvision's and timm's own loading, from real files and caches."""

import io
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import seed_everything
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet

from simo_lightning import ImageEncoder, SimOModule
from simo_lightning.checkpoints import load_encoder
from simo_lightning.class_paths import describe
from simo_lightning.cli import main
from simo_lightning.parser import user_error
from simo_lightning.preprocessing import Preprocessing
from tests.bounds import assert_float32_error
from tests.checkpoint_parts import fit, save

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def images(n: int = 2, channels: int = 3, size: int = 64) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def trained(model: Any) -> Any:
    """A model whose every tensor differs from a new one's, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.02 + 0.05 * torch.rand(value.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def resnet18() -> Any:
    return trained(torchvision.models.resnet18(weights=None))


def features(encoder: ImageEncoder, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.eval().features(batch)


def theirs_without_classifier(model: Any, batch: Tensor) -> Tensor:
    classifier, model.fc = model.fc, nn.Identity()
    with torch.no_grad():
        found: Tensor = model(batch)
    model.fc = classifier
    return found


def write(weights: dict[str, Tensor], path: Path) -> Path:
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


LAYOUTS: dict[str, Any] = {
    "as it is": lambda weights: weights,
    "nested": lambda weights: {"epoch": 3, "optimizer": {"state": {}}, "state_dict": weights},
    "prefix": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "deep prefix": lambda weights: {
        "model": {
            **{f"module.encoder.backbone.{name}": value for name, value in weights.items()},
            "queue": torch.ones(3),
        }
    },
    "other head": lambda weights: {
        **{name: value for name, value in weights.items() if not name.startswith("fc")},
        "fc.0.weight": torch.ones(4, 512),
        "projection_head.weight": torch.ones(2, 4),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_gives_torchvisions_features(layout: str, legacy: bool, resnet18: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](resnet18.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    encoder = ImageEncoder("resnet18", str(path))
    torch.testing.assert_close(
        features(encoder, images()), theirs_without_classifier(resnet18, images()), rtol=0, atol=0
    )
    assert encoder.stem == "imagenet"
    assert encoder.preprocessing == Preprocessing(224, **IMAGENET, crop_fraction=0.875)


def test_a_safetensors_file_and_one_in_half_precision(resnet18: Any, tmp_path: Path) -> None:
    path = write(resnet18.state_dict(), tmp_path / "a.safetensors")
    expected = theirs_without_classifier(resnet18, images())
    torch.testing.assert_close(features(ImageEncoder("resnet18", str(path)), images()), expected, rtol=0, atol=0)
    half = {name: value.half() if value.is_floating_point() else value for name, value in resnet18.state_dict().items()}
    encoder = ImageEncoder("resnet18", str(write(half, tmp_path / "half.pth")))
    assert {each.dtype for each in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.backbone.conv1.weight, half["conv1.weight"].float())


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", "densenet121"])
@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "full name"])
def test_torchvisions_weights_by_name_come_from_its_cache(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if weights != "DEFAULT" and name != "mobilenet_v3_small":
        pytest.skip("one model is enough for each form of the name")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.get_model_weights(name)["DEFAULT" if weights == "full name" else weights]
    path = tmp_path / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(trained(torchvision.models.get_model(name, weights=None)).state_dict(), path)
    theirs = torchvision.models.get_model(name, weights=entry).eval()
    encoder = ImageEncoder(name, str(entry) if weights == "full name" else weights)
    last = [path for path, module in theirs.named_modules() if isinstance(module, nn.Linear)][-1]
    theirs.set_submodule(last, nn.Identity())
    with torch.no_grad():
        expected = theirs(images(1))
    torch.testing.assert_close(features(encoder, images(1)), expected, rtol=0, atol=0)
    transform, preprocessing = entry.transforms(), encoder.preprocessing
    assert preprocessing is not None
    assert (preprocessing.image_size, preprocessing.crop_fraction) == (224, 224 / transform.resize_size[0])
    picture = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    exact = (picture.double() / 255 - torch.tensor(transform.mean).double().view(-1, 1, 1)) / torch.tensor(
        transform.std
    ).double().view(-1, 1, 1)
    assert_float32_error(preprocessing.normalize(picture), exact.float(), exact)


def test_googlenet_needs_no_hidden_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchvision's GoogLeNet changes the normalisation inside its forward; here the preprocessing has it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.GoogLeNet_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(trained(torchvision.models.googlenet(init_weights=False, aux_logits=True)).state_dict(), path)
    theirs = torchvision.models.googlenet(weights=entry).eval()
    theirs.fc = nn.Identity()
    encoder = ImageEncoder("googlenet", "DEFAULT").eval()
    assert encoder.preprocessing is not None
    picture = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    given = torchvision.transforms.functional.normalize(picture.double() / 255, **IMAGENET)
    with torch.no_grad():
        exact = theirs.double()(given)
        ours = encoder.features(encoder.preprocessing.normalize(picture))
        assert_float32_error(ours, theirs.float()(given.float()), exact)


def test_a_grey_model_sums_the_first_convolution(resnet18: Any, tmp_path: Path) -> None:
    path = write(resnet18.state_dict(), tmp_path / "a.pth")
    encoder = ImageEncoder("resnet18", str(path), in_channels=1)
    torch.testing.assert_close(
        features(encoder, images(channels=1)).double(),
        theirs_without_classifier(resnet18, images(channels=1).expand(-1, 3, -1, -1)).double(),
        rtol=1e-4,  # 49 products are added in another order
        atol=0,
    )
    assert encoder.preprocessing is not None
    assert encoder.preprocessing.mean == (pytest.approx(sum(IMAGENET["mean"]) / 3),)


def test_image_size_replaces_that_of_the_weights(resnet18: Any, tmp_path: Path) -> None:
    path = str(write(resnet18.state_dict(), tmp_path / "a.pth"))
    encoder = ImageEncoder("resnet18", path, image_size=64)
    assert encoder.preprocessing == Preprocessing(64, **IMAGENET, crop_fraction=0.875)
    assert encoder.stem == "imagenet"  # as the weights have it
    own = Preprocessing(96, (0.1,) * 3, (0.2,) * 3, resize="pad")
    assert ImageEncoder("resnet18", path, preprocessing=own).preprocessing == own
    with pytest.raises(ValueError, match="image_size must be that of preprocessing, 96, or None, got 64"):
        ImageEncoder("resnet18", path, image_size=64, preprocessing=own)


def test_weights_of_an_own_checkpoint_keep_its_stem(tmp_path: Path) -> None:
    module = SimOModule(ImageEncoder("resnet10", width=0.125, image_size=8, in_channels=1))
    fit(module, tmp_path, max_steps=1, limit_val_batches=0).save_checkpoint(tmp_path / "a.ckpt")
    encoder = ImageEncoder("resnet10", str(tmp_path / "a.ckpt"), width=0.125, in_channels=1)
    assert encoder.stem == "small"
    expected = features(module.encoder, images(channels=1, size=8))
    torch.testing.assert_close(features(encoder, images(channels=1, size=8)), expected, rtol=0, atol=0)


def hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, repository: str) -> Path:
    """A folder of the Hugging Face cache, empty but for this repository; where its file of weights goes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    commit = "0" * 40
    root = folder / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / commit / "model.safetensors"


@pytest.mark.parametrize("weights", ["pretrained", "r160_in1k"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_timms_weights_come_from_the_hub_cache(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = trained(timm.create_model(name))
    write(theirs.state_dict(), hub_cache(monkeypatch, tmp_path, f"timm/{name}.r160_in1k"))
    encoder = ImageEncoder(f"timm/{name}", weights)
    theirs.reset_classifier(0)
    with torch.no_grad():
        expected = theirs(images(size=160))
    torch.testing.assert_close(features(encoder, images(size=160)), expected, rtol=0, atol=0)
    config = timm.data.resolve_model_data_config(theirs)
    assert encoder.preprocessing == Preprocessing(
        160, config["mean"], config["std"], crop_fraction=config["crop_pct"], interpolation=config["interpolation"]
    )
    assert encoder.feature_dim == expected.shape[1]


def test_timms_vit_takes_another_image_size_and_grey_images(tmp_path: Path) -> None:
    path = write(trained(timm.create_model("test_vit")).state_dict(), tmp_path / "a.safetensors")
    overlay = {"file": str(path)}
    theirs = timm.create_model("test_vit", True, pretrained_cfg_overlay=overlay, img_size=96, num_classes=0).eval()
    encoder = ImageEncoder("timm/test_vit", str(path), image_size=96)
    with torch.no_grad():
        expected = theirs(images(size=96))
    torch.testing.assert_close(features(encoder, images(size=96)), expected, rtol=0, atol=0)
    assert encoder.preprocessing is not None
    assert encoder.preprocessing.size == encoder.min_size == (96, 96)
    grey = ImageEncoder("timm/test_vit", str(path), in_channels=1)
    assert features(grey, images(channels=1, size=160)).shape == (2, 64)


def test_a_vit_without_weights_states_its_size() -> None:
    assert ImageEncoder("timm/test_vit").preprocessing == Preprocessing((160, 160))
    assert ImageEncoder("timm/test_resnet").preprocessing is None


@pytest.mark.filterwarnings("ignore:the encoder's stem 'imagenet' suits")  # digits have 8 px
@pytest.mark.parametrize("name", ["resnet18", "timm/test_vit"])
def test_a_checkpoint_needs_neither_the_file_nor_the_network(name: str, tmp_path: Path) -> None:
    model = torchvision.models.resnet18() if name == "resnet18" else timm.create_model("test_vit")
    path = write(trained(model).state_dict(), tmp_path / "a.safetensors")
    seed_everything(0)
    size = 64 if name == "resnet18" else 32
    module = SimOModule(ImageEncoder(name, str(path), image_size=size, in_channels=1))
    if name == "resnet18":
        fit(module, tmp_path, max_steps=1, limit_val_batches=0).save_checkpoint(tmp_path / "a.ckpt")
    else:
        save(module, tmp_path / "a.ckpt")
    path.unlink()
    loaded = SimOModule.load_from_checkpoint(tmp_path / "a.ckpt")
    for encoder in (loaded.encoder, load_encoder(tmp_path / "a.ckpt")):
        assert encoder.preprocessing == module.encoder.preprocessing  # type: ignore[union-attr]
        assert encoder.preprocessing.mean is not None  # type: ignore[union-attr]
        batch = images(channels=1, size=size)
        assert torch.equal(features(encoder, batch), features(module.encoder, batch))  # type: ignore[arg-type]
    assert describe(module.encoder)["init_args"]["weights"] is None


class Pretrained(ImageEncoder):
    """An encoder whose weights are not an argument."""

    def __init__(self, embedding_dim: int = 4) -> None:
        super().__init__("resnet18", os.environ["WEIGHTS"], embedding_dim=embedding_dim)


def test_a_subclass_that_names_its_weights_is_loaded_without_them(
    resnet18: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(resnet18.state_dict(), tmp_path / "a.pth")
    monkeypatch.setenv("WEIGHTS", str(path))
    module = SimOModule(Pretrained())
    save(module, tmp_path / "a.ckpt")
    path.unlink()
    loaded = SimOModule.load_from_checkpoint(tmp_path / "a.ckpt", trusted=Pretrained)
    assert torch.equal(loaded.encoder.backbone.conv1.weight, resnet18.conv1.weight)  # type: ignore[union-attr]
    assert loaded.encoder.preprocessing == module.encoder.preprocessing


def described(module: SimOModule) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    return {"simo_module": checkpoint["simo_module"]}


def test_a_checkpoint_that_names_weights_is_refused(tmp_path: Path) -> None:
    module = SimOModule(ImageEncoder("resnet10", width=0.125))
    stored = described(module)
    stored["simo_module"]["init_args"]["encoder"]["init_args"]["weights"] = "DEFAULT"
    torch.save({"state_dict": module.state_dict(), **stored}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"weights of simo_lightning\.ImageEncoder is never taken from a file"):
        SimOModule.load_from_checkpoint(tmp_path / "a.ckpt")
    teacher = {"class_path": "timm.task.distillation.DistillationTeacher", "init_args": {"pretrained_path": "x.pth"}}
    stored["simo_module"]["init_args"]["encoder"] = teacher
    torch.save({"state_dict": module.state_dict(), **stored}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="is no class that is built from a file"):
        SimOModule.load_from_checkpoint(tmp_path / "b.ckpt")


class Touches:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_weights_runs_no_code(legacy: bool, resnet18: Any) -> None:
    content = {**resnet18.state_dict(), "fc.note": Touches()}
    torch.save(content, "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"weights a\.pth cannot be read: ") as raised:
        ImageEncoder("resnet18", "a.pth")
    assert len(str(raised.value).splitlines()) == 1
    assert not Path("ran").exists()
    torch.load("a.pth", weights_only=False)  # the file is as hostile as the test says
    assert Path("ran").exists()


def test_damaged_files_are_one_line(resnet18: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(resnet18.state_dict(), buffer)
    whole = write(resnet18.state_dict(), tmp_path / "whole.safetensors").read_bytes()
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R."
    cases = {"cut.pth": buffer.getvalue()[:-500], "cut.safetensors": whole[:-100], "empty.pth": b"", "bomb.pth": bomb}
    for name, content in cases.items():
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=f"weights {name} cannot be read: ") as raised:
            ImageEncoder("resnet18", name)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match=r"no file of weights at none\.pth"):
        ImageEncoder("resnet18", "none.pth")


def test_weights_that_do_not_fit_are_counted_and_named(resnet18: Any, tmp_path: Path) -> None:
    deeper = resnet._resnet(resnet.BasicBlock, [2, 2, 3, 2], None, True).state_dict()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (deeper, {}, r"has 120 tensors: 12 not in the backbone \(layer3.2.conv1.weight, "),
        (resnet18.state_dict(), {"width": 0.5}, r"120 tensors: 100 of another shape \(conv1.weight \(64, 3, 7, 7\) in"),
        (resnet18.state_dict(), {"stem": "small"}, r"1 of another shape \(conv1.weight"),
        (resnet18.state_dict(), {"norm": "group"}, r"has 60 tensors: 60 not in the backbone \(bn1.running_mean, "),
        ({"a.b": torch.ones(2)}, {}, r"none of its 120 tensors is in the file, which holds a\.b|\[\]"),
        ({"step": 3}, {}, "which holds no tensors"),
        (
            {name: each for name, each in resnet18.state_dict().items() if "layer1.0" not in name},
            {},
            r"10 missing \(layer1.0.conv1.weight, ",
        ),
    ]
    for number, (content, options, message) in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            ImageEncoder("resnet18", str(path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet10", "weights": "DEFAULT"}, "weights of resnet10 must be a file .* got 'DEFAULT'"),
        (
            {"weights": "IMAGENET1K_V2"},
            "weights of resnet18 must be DEFAULT, IMAGENET1K_V1 or a file .* got 'IMAGENET1K",
        ),
        ({"weights": "ResNet50_Weights.DEFAULT"}, "weights of resnet18 must be DEFAULT, IMAGENET1K_V1 or a file"),
        ({"weights": "DEFAULT", "width": 0.5}, "need width 1 and stem 'imagenet', got width=0.5"),
        ({"weights": "DEFAULT", "stem": "small"}, "need width 1 and stem 'imagenet', got width=1.0 and stem='small'"),
        ({"weights": "DEFAULT", "norm": "layer"}, "norm must be None or 'batch' with weights 'DEFAULT', got 'layer'"),
        ({"weights": "DEFAULT", "in_channels": 4}, "in_channels must be 1 or 3 with weights, got 4"),
        ({"backbone": nn.Flatten(), "weights": "DEFAULT"}, "weights are only for a backbone given by name"),
        ({"backbone": "timm/resnet11t"}, "must be a model of timm, got 'timm/resnet11t'; do you mean timm/resnet1"),
        ({"backbone": "timm/test_vit", "weights": "a9"}, "must be pretrained, r160_in1k or a file, got 'a9'"),
        ({"backbone": "timm/resnet10t", "width": 0.5}, "width must be left at 1.0 for backbone 'timm/resnet10t'"),
        ({"backbone": "timm/resnet10t", "stem": "small"}, "stem must be left at None for backbone 'timm/resnet10t'"),
        ({"backbone": "timm/resnet10t", "norm": "batch"}, "norm must be left at None for backbone 'timm/resnet10t'"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**options)


@pytest.mark.parametrize(
    ("size", "stem"), [(None, "imagenet"), (65, "imagenet"), (224, "imagenet"), (64, "small"), (8, "small")]
)
def test_stem_follows_the_image_size(size: int | None, stem: str) -> None:
    encoder = ImageEncoder("resnet10", width=0.125, image_size=size)
    assert encoder.stem == stem
    assert encoder.preprocessing == (None if size is None else Preprocessing(size))
    assert describe(encoder)["init_args"]["stem"] == stem  # a later default cannot change a stored model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["timm/test_vit", "resnet10"])
def test_lora_trains_adapters_alone_and_its_checkpoint_is_complete(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": 16} if name == "timm/test_vit" else {"width": 0.125}
    plain = trained(ImageEncoder(name, in_channels=1, **options).backbone).state_dict()
    path = write(plain, tmp_path / "a.safetensors")
    module = SimOModule(ImageEncoder(name, str(path), in_channels=1, lora={"r": 4, "lora_alpha": 8}, **options))
    batch = images(channels=1, size=16)
    before = features(module.encoder, batch)  # type: ignore[arg-type]
    untouched = features(ImageEncoder(name, str(path), in_channels=1, **options), batch)
    torch.testing.assert_close(before, untouched, rtol=0, atol=0)  # the adapters start at 0
    learns = {name for name, parameter in module.encoder.backbone.named_parameters() if parameter.requires_grad}
    assert learns
    assert all(".lora_" in name for name in learns)
    optimizer = torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=1.0)
    module.encoder(batch).square().sum().backward()
    optimizer.step()
    after = features(module.encoder, batch)  # type: ignore[arg-type]
    assert not torch.equal(before, after)
    save(module, tmp_path / "a.ckpt")
    path.unlink()
    loaded = SimOModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(features(loaded.encoder, batch), after)  # type: ignore[arg-type]


def test_lora_takes_no_argument_that_reads_or_imports() -> None:
    with pytest.raises(ValueError, match=r"lora takes r, lora_alpha, .* got megatron_core"):
        ImageEncoder("resnet10", width=0.125, lora={"r": 2, "megatron_core": "os"})
    with pytest.raises(ValueError, match="lora does not fit the backbone: "):
        ImageEncoder("resnet10", width=0.125, lora={"r": 2, "target_modules": ["nothing"]})


class Missing:
    """Finds no module of one package, as if it were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [
        ("timm", "timm", {"backbone": "timm/test_vit"}),
        ("safetensors", "hub", {"weights": "a.safetensors"}),
        ("peft", "lora", {"backbone": "resnet10", "lora": {"r": 2}}),
    ],
)
def test_a_missing_extra_is_one_line(
    package: str, extra: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.safetensors").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError) as raised:
        ImageEncoder(**options)
    assert str(raised.value) == f"{package} is missing: pip install 'simo_lightning[{extra}]'"
    assert user_error(raised.value) == str(raised.value)


@pytest.fixture
def silent_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A proxy that takes connections and never answers, and empty caches."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            "resnet18",
            "put https://download.pytorch.org/models/resnet18-f37072fd.pth at {torch}/hub/checkpoints/resnet18",
        ),
        ("timm/test_vit", "get https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors and pass"),
    ],
)
def test_without_network_one_line_says_soon_which_file_to_put_where(
    backbone: str,
    message: str,
    silent_network: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    words = [
        "--model",
        "simo_lightning.SimOModule",
        "--model.encoder",
        "simo_lightning.ImageEncoder",
        "--model.encoder.backbone",
        backbone,
    ]
    words += ["--model.encoder.weights", "DEFAULT", "--data", "simo_lightning.DigitsPairDataModule"]
    monkeypatch.setattr(sys, "argv", ["simo", "fit", *words, "--run_dir", "run"])
    start = time.monotonic()
    with pytest.raises(SystemExit):
        main()
    assert time.monotonic() - start < 15  # 3 s on an idle machine; the libraries alone wait for half a minute or more
    error = capsys.readouterr().err.strip()
    assert error.startswith("simo: error: weights ")
    assert message.format(torch=tmp_path / "torch") in error
    assert len(error.splitlines()) == 1
    assert not Path("run").exists()
