"""A model as a folder and on the Hub: the same model comes back, and nothing of a hostile folder is run."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim import AdamW

from simo_lightning import Embedder, ImageEncoder, OneCycle, Preprocessing, SimOLoss, SimOModule
from simo_lightning.checkpoints import TrainingClasses, load_encoder, load_module
from simo_lightning.cli import main
from simo_lightning.export import exported_metadata
from simo_lightning.sharing import CardFields
from tests.checkpoint_parts import OwnEncoder, fit, save
from tests.digits_run import DIGITS
from tests.hub_server import TOKEN, hub_server

pytest.importorskip("huggingface_hub", reason="needs the extra hub: pip install 'simo_lightning[hub]'")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra hub")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "share.md"
PREPROCESSING = Preprocessing((24, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), resize="pad", background="#102030")
NAMES = ["ant", "bee `x`", "zebu ü"]


def trained() -> SimOModule:
    """A module with class means, whose running statistics are no longer those of the start."""
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", embedding_dim=8)
    with torch.no_grad():
        encoder(torch.rand(8, 3, 16, 16))
    module = SimOModule(encoder, SimOLoss(form="log"), lr_scheduler=OneCycle, preprocessing=PREPROCESSING)
    module.classes = TrainingClasses(NAMES)
    module.set_class_means(torch.nn.functional.normalize(torch.randn(3, 8)))
    return module.eval()


def uint8(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def embedded(module: Any, images: Tensor) -> Tensor:
    found: Tensor = module.embed(images)
    return found


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return trained().save_pretrained(tmp_path / "model")


def test_the_folder_of_a_checkpoint_holds_the_same_model(tmp_path: Path) -> None:
    save(trained(), tmp_path / "a.ckpt")
    module = SimOModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    folder = module.save_pretrained(tmp_path / "new" / "model")
    found, images = SimOModule.from_pretrained(str(folder)), uint8(5, 3, 40, 30)
    assert not found.training
    assert torch.equal(embedded(found, images), embedded(module, images))
    assert found.preprocessing == PREPROCESSING
    assert found.state_dict().keys() == module.state_dict().keys()
    assert found.classes is not None
    assert module.classes is not None
    assert found.classes.names == NAMES
    assert torch.equal(found.classes.means, module.classes.means)  # type: ignore[arg-type]
    assert isinstance(found.loss, SimOLoss)
    assert found.lr_scheduler is OneCycle
    # in place of a checkpoint
    assert torch.equal(torch.from_numpy(Embedder.load(folder)(images)), embedded(module, images))
    assert load_encoder(folder).classes.names == NAMES  # type: ignore[union-attr]
    assert isinstance(load_module(folder), SimOModule)
    # and once more
    again = found.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_files_can_be_read_without_this_package(shared: Path) -> None:
    weights, module = safetensors.load_file(shared / "model.safetensors"), trained()
    assert module.classes is not None
    assert torch.equal(weights.pop("classes.means"), module.classes.means)  # type: ignore[arg-type]
    expected = module.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    config = json.loads((shared / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == NAMES
    assert config["preprocessing"]["image_size"] == [24, 16]
    assert config["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert config["embedding_dim"] == 8
    assert config["class_path"] == "simo_lightning.SimOModule"
    assert (shared / "model.safetensors").stat().st_mode == (shared / "config.json").stat().st_mode


def test_class_means_of_other_weights_are_left_out(tmp_path: Path) -> None:
    module = SimOModule(ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1))
    module.default_callbacks = False
    module.set_class_means(torch.eye(10, 16))
    fit(module, tmp_path, max_steps=1, limit_val_batches=0)
    found = SimOModule.from_pretrained(module.save_pretrained(tmp_path / "model"))
    assert found.classes is not None
    assert found.classes.names == [str(digit) for digit in range(10)]
    assert found.classes.means is None


def run_folder(path: Path) -> Path:
    """A run whose metrics go on after the step of the weights."""
    path.mkdir()
    config = {
        "trainer": {"max_epochs": 3, "logger": {"init_args": {"token": "secret"}}},
        "data": {"class_path": "simo_lightning.ImageFolderPairDataModule", "init_args": {"data_dir": "/home/me/fruit"}},
        "run_dir": "/home/me/runs/7",
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = ["epoch,step,train/loss,val/knn,val/alignment", "0,9,2.0,,", "0,9,,0.25,3.0", "1,19,,0.75,", "2,29,,0.9,1.0"]
    (path / "metrics.csv").write_text("\n".join(rows) + "\n")
    return path


def test_the_card_is_made_from_the_run(tmp_path: Path) -> None:
    module, run = trained(), run_folder(tmp_path / "run")
    module._loaded_step = 20
    fields = CardFields(
        run, "cc-by-nc-4.0", data="Fruit, 12 pictures.", datasets=["me/fruit"], metrics={"test/knn": 0.5}
    )
    folder = module.save_pretrained(tmp_path / "model", fields)
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-nc-4.0"
    assert header["library_name"] == "simo_lightning"
    assert header["datasets"] == ["me/fruit"]
    results = {
        (each["dataset"]["split"], metric["type"]): metric["value"]
        for each in header["model-index"][0]["results"]
        for metric in each["metrics"]
    }
    assert results == {("validation", "knn"): 0.75, ("test", "knn"): 0.5}  # not the 0.9 of later weights
    assert "| val | `alignment` | 3 |" in card
    assert "Fruit, 12 pictures." in card
    assert "max_epochs: 3" in card
    assert "data_dir: fruit" in card
    assert "``bee `x` ``" in card or "`` bee `x` ``" in card
    again = SimOModule.from_pretrained(folder).save_pretrained(tmp_path / "again", CardFields(run))
    assert "| val | `knn` | 0.9 |" in (again / "README.md").read_text(encoding="utf-8")  # the step is not known
    assert "/home/me" not in card
    assert "secret" not in card


def test_the_code_in_the_card_runs(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared.parent)
    blocks = re.findall(r"```python\n(.*?)```", (shared / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), names)
    assert names["embeddings"].shape == (2, 8)
    assert names["vectors"].shape == (1, 8)
    assert names["best"].shape == (1,)


def test_a_card_that_is_there_is_kept_and_the_rest_replaced(shared: Path) -> None:
    (shared / "README.md").write_text("mine")
    (shared / "config.json").write_text("{}")
    trained().save_pretrained(shared)
    assert (shared / "README.md").read_text() == "mine"
    assert SimOModule.from_pretrained(shared).preprocessing == PREPROCESSING
    assert sorted(os.listdir(shared)) == ["README.md", "config.json", "model.safetensors"]


class NotDescribed(nn.Module):
    embedding_dim = 4


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: SimOModule(NotDescribed()), r"encoder of SimOModule must be .*, got a .*NotDescribed: let"),
        (
            lambda: SimOModule(ImageEncoder("resnet10", width=0.125), lr_scheduler=lambda x: x),
            None,  # a function is not needed to embed
        ),
        (
            lambda: SimOModule(ImageEncoder("resnet10", width=0.125), optimizer=partial(AdamW, lr=float("inf"))),
            "optimizer of SimOModule must hold finite numbers.*, got inf",
        ),
    ],
    ids=["encoder", "function", "infinite"],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_and_nothing_lost(
    module: Callable[[], SimOModule], message: str | None, shared: Path
) -> None:
    before = {path.name: path.read_bytes() for path in shared.iterdir()}
    if message is None:
        assert isinstance(SimOModule.from_pretrained(module().save_pretrained(shared)), SimOModule)
        return
    with pytest.raises(ValueError, match=message):
        module().save_pretrained(shared)
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == before


def test_a_class_of_ones_own_is_trusted_by_name(tmp_path: Path) -> None:
    folder = OwnEncoder(gain=2.0).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"'tests\.checkpoint_parts\.OwnEncoder' is no class that is built from a file"
    ):
        SimOModule.from_pretrained(folder)
    assert OwnEncoder.from_pretrained(folder).gain == 2.0
    assert isinstance(SimOModule.from_pretrained(folder, trusted=OwnEncoder), OwnEncoder)
    with pytest.raises(
        ValueError, match=r"must hold a tests\.checkpoint_parts\.OwnEncoder, got a simo_lightning\.SimO"
    ):
        OwnEncoder.from_pretrained(trained().save_pretrained(tmp_path / "other"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"license": "Apache 2.0"}, "license must be abbreviated as on the Hub, .*, got 'Apache 2.0'"),
        ({"license": "mit", "license_link": "X"}, "license_name and license_link are for license 'other', got 'mit'"),
        ({"datasets": "me/fruit"}, "datasets must be a list of names, got the string 'me/fruit'"),
    ],
)  # fmt: skip
def test_wrong_fields_of_the_card_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CardFields(**fields)


def test_hub_round_trip(tmp_path: Path) -> None:
    module, images = trained(), uint8(3, 3, 24, 16)
    save(module, tmp_path / "a.ckpt")
    np.save(tmp_path / "images.npy", images.numpy())
    with hub_server() as server:
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
        words = [str(tmp_path / name) for name in ("a.ckpt", "images.npy", "report")]
        done = subprocess.run(
            [sys.executable, "-m", "tests.hub_round_trip", *words],
            env={**{name: value for name, value in os.environ.items() if "proxy" not in name.lower()}, **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report").read_text())
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "report.npy")), embedded(module, images))
    assert found["same"]
    assert found["classes"] == found["cached"] == NAMES
    assert module.classes is not None
    assert torch.equal(torch.tensor(found["means"]), module.classes.means)  # type: ignore[arg-type]
    assert found["files"] == ["README.md", "config.json", "model.safetensors"]
    asked = server.created["me/model"]
    assert asked.get("private") or asked.get("visibility") == "private"  # the field of older and newer libraries
    uploaded = server.commits[server.heads["me/model"]]
    assert {name: data for name, data in uploaded.items() if name in found["files"]} == {
        name: (tmp_path / "folder" / name).read_bytes() for name in found["files"]
    }
    assert 'SimOModule.from_pretrained("me/model")' in uploaded["README.md"].decode()
    assert "license: cc-by-4.0" in server.commits[server.heads["me/other"]]["README.md"].decode()
    assert found["pushed"] == f"{server.endpoint}/me/other/commit/{server.heads['me/other']}"
    assert f"uploaded    {server.endpoint}/me/model/commit/{server.heads['me/model']}" in done.stdout
    assert re.search(
        "FileNotFoundError: no folder 'me/none', .*: there is no such model, or it is private", found["none"]
    )
    assert re.search("FileNotFoundError: no folder '../me/none', and no name of a model", found["no name"])
    assert re.search("FileNotFoundError: .*: it is not in the cache", found["not cached"])
    assert re.search("OSError: 'me/model' cannot be uploaded to the Hugging Face Hub: .*401", found["refused"])
    assert all(len(text.splitlines()) == 1 for text in found.values() if isinstance(text, str))


CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "config.json cannot be used"),
    "a list": ("[]", "config.json cannot be used: SimOModule.save_pretrained did not write it"),
    "deep": ("[" * 100_000, "config.json cannot be used"),
    "long": (2**26 + 1, "config.json cannot be used: it must have at most 67,108,864 bytes"),
    "bytes": (b"\xff\xfe{", "config.json cannot be used"),
    "later": ({"format": 2}, "its format must be 1, got 2"),
    "arguments": ({"init_args": [1]}, "init_args must hold arguments by name, got list"),
    "class": ({"class_path": "os.system"}, "'os.system' is no class that is built from a file"),
    "no class": ({"class_path": 7}, "'7' is no class that is built from a file"),
    "other class": ({"class_path": "torch.nn.Linear"}, "must be of a module of simo_lightning, got torch.nn.Linear"),
    "encoder": ({"init_args": {"encoder": {"class_path": "os.system"}}}, "'os.system' is no class"),
    "call": (
        {"init_args": {"encoder": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}}},
        "'subprocess.Popen' is no class",
    ),
    "path": (
        {"init_args": {"encoder": {"class_path": "simo_lightning.ImageEncoder", "init_args": {"weights": "../x.pth"}}}},
        "weights of simo_lightning.ImageEncoder is never taken from a file, got '../x.pth'",
    ),
    "large": (
        {"init_args": {"encoder": {"class_path": "torch.nn.Embedding", "init_args": {"num_embeddings": 2**40}}}},
        "cannot be built",
    ),
    "types": (
        {"init_args": {"encoder": {"class_path": "simo_lightning.ImageEncoder", "init_args": {"width": "wide"}}}},
        "cannot be built",
    ),
    "preprocessing": ({"preprocessing": {"image_size": 10**9}}, "image_size must be one or two whole numbers up to"),
    "preprocessing path": ({"preprocessing": "../../x"}, "the preprocessing of checkpoint .* cannot be used"),
    "names": ({"classes": [1, 2, 3]}, "its classes must have names and one mean for each"),
    "more names": ({"classes": ["x"] * 4}, "its classes must have names and one mean for each"),
    "sizes": ({"loss_sizes": {"num_classes": -1, "embedding_dim": "x"}}, "loss_sizes of a checkpoint must hold"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused_in_one_line(name: str, shared: Path) -> None:
    content, message = CONFIGS[name]
    if isinstance(content, dict):
        content = json.dumps({**json.loads((shared / "config.json").read_text()), **content})
    if isinstance(content, int):
        os.truncate(shared / "config.json", content)  # to a file with a hole, which takes no time to write
    else:
        (shared / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(shared, message)


def with_header(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A file of safetensors: the length of the header, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "model.safetensors cannot be read"),
    "long header": (with_header({}, length=2**62), "model.safetensors cannot be read"),
    "cut short": (with_header({"a": tensor([4], 0, 16)}, bytes(8)), "model.safetensors cannot be read"),
    "no JSON": (with_header(b"\x80\x04cos\nsystem\n"), "model.safetensors cannot be read"),
    "pickle": (b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", "model.safetensors cannot be read"),
    "large": (with_header({"a": tensor([2**62], 0, 16)}), "model.safetensors cannot be read"),
    "outside": (with_header({"a": tensor([4], 2**40, 2**40 + 16)}), "model.safetensors cannot be read"),
    "overlap": (with_header({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}), "model.safetensors cannot be read"),
    "negative": (with_header({"a": tensor([-4], 0, 16)}), "model.safetensors cannot be read"),
    "type": (with_header({"a": tensor([4], 0, 16, "PICKLE")}), "model.safetensors cannot be read"),
    "others": (with_header({"../../a": tensor([4], 0, 16)}), "does not fit SimOModule: .* is not in the file"),
    "means": (with_header({"classes.means": tensor([4], 0, 16)}), "its classes must have names and one mean for each"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused_in_one_line(name: str, shared: Path) -> None:
    content, message = WEIGHTS[name]
    (shared / "model.safetensors").write_bytes(content)
    assert_refused(shared, message)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        SimOModule.from_pretrained(folder)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 1000
    assert not Path("ran").exists()


def test_what_is_missing_is_named(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*none'"):
        SimOModule.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        SimOModule.from_pretrained(tmp_path)
    (shared / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of weights at .*model\.safetensors"):
        SimOModule.from_pretrained(shared)


def test_a_folder_is_no_checkpoint_of_a_run(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["test", "--config", DIGITS, "--ckpt_path", str(shared), "--run_dir", "run"])
    error = capsys.readouterr().err.strip()
    assert f"--ckpt_path must be a checkpoint file, got the folder {shared} of a shared model" in error
    assert len(error.splitlines()) == 1


def test_wrong_arguments_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(trained(), tmp_path / "a.ckpt")
    for words, message in (
        (["none/checkpoints/best.ckpt", "--out", "new"], "no checkpoint at none/checkpoints/best.ckpt"),
        (["a.ckpt", "--out", "new", "--license", "CC BY"], "license must be abbreviated as on the Hub"),
        (["a.ckpt", "--out", "new", "--run_dir", "none"], "run_dir must be the folder of a run, got 'none'"),
        (["a.ckpt", "--out", "a.ckpt"], "out must be a folder, got the file a.ckpt"),
        (["a.ckpt"], "the following arguments are required: out"),
    ):
        with pytest.raises(SystemExit):
            main(["share", *words])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("simo share: error: ")
        assert message in error
    assert not Path("new").exists()


WITHOUT = """
import sys
import simo_lightning
from simo_lightning.cli import main
assert "simo_lightning.sharing.hub" not in sys.modules
names = ("huggingface_hub", "safetensors")
for name in [name for name in sys.modules if name.startswith(names)]:  # other libraries may import them
    del sys.modules[name]
class Missing:
    def find_spec(self, name, *_):
        if name.startswith(names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for words in (["share", "a.ckpt", "--out", "new"], ["export", "model", "a.pt2"]):
    try:
        main(words)
    except SystemExit as error:
        print(error.code)
"""


def test_without_the_extra_the_package_is_imported_and_the_error_says_what_to_install(
    shared: Path, tmp_path: Path
) -> None:
    save(trained(), tmp_path / "a.ckpt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["1", "1"], done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line.partition(" (")[0] for line in lines if line.startswith("simo")] == [
        "simo share: error: huggingface_hub is missing: pip install 'simo_lightning[hub]'",
        "simo export: error: safetensors is missing: pip install 'simo_lightning[hub]'",
    ]
    assert not (tmp_path / "new").exists()


def test_the_page_in_the_documentation_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands but the uploads, on a model of the page's name, and its code but the downloads."""
    run = tmp_path / "runs" / "photos" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    save(trained(), run / "checkpoints" / "best.ckpt")
    page = PAGE.read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^    simo (.*)", page, flags=re.MULTILINE)]
    commands = [words for words in commands if "--push" not in words]
    assert [words[0] for words in commands] == ["share", "export", "export"]
    for words in commands:
        main(words)
    assert "largest difference from the model" in capsys.readouterr().out
    blocks = [each for each in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if '"NAME/' not in each]
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), PAGE.name, "exec"), names)
    assert exported_metadata("fruit.onnx")["class_names"] == exported_metadata("fruit.pt2")["class_names"] == NAMES
