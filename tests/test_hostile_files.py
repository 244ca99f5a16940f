"""Checkpoints of unknown origin: opening one runs nothing that it holds, and takes little memory."""

import io
import os
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simo_lightning import ImageEncoder, OneCycle, ProbeModule, SimOModule
from simo_lightning.checkpoints import load_encoder, load_module, read_checkpoint
from simo_lightning.cli import main
from simo_lightning.export import export_encoder
from tests.checkpoint_parts import fit, save
from tests.rank_processes import start_ranks

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
OPENERS: dict[str, Callable[[Path], Any]] = {
    "read_checkpoint": read_checkpoint,
    "load_from_checkpoint": SimOModule.load_from_checkpoint,
    "load_module": load_module,
    "load_encoder": load_encoder,
    "export": lambda path: export_encoder(path, "encoder.pt2", 8),
    "probe": lambda path: ProbeModule(10, str(path)),
}


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class TouchingTensor(torch.Tensor):
    """A tensor that creates the file "ran" when it is unpickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return os.system, ("touch ran",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a checkpoint as a fit writes it."""
    folder = tmp_path_factory.mktemp("sound")
    module = SimOModule(ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1), lr_scheduler=OneCycle)
    fit(module, folder, max_steps=1).save_checkpoint(folder / "a.ckpt")
    checkpoint: dict[str, Any] = torch.load(folder / "a.ckpt", weights_only=True)
    return checkpoint


def assert_refused(path: Path, match: str, openers: Any = OPENERS) -> None:
    for name in openers:
        with pytest.raises(ValueError, match=match) as raised:
            OPENERS[name](path)
        assert len(str(raised.value).splitlines()) == 1, name
        assert len(str(raised.value)) < 1000, name


def test_a_pickle_in_any_entry_runs_nothing(sound: dict[str, Any], tmp_path: Path) -> None:
    path, marker = tmp_path / "a.ckpt", tmp_path / "ran"
    for key in [*sound, "new entry"]:
        torch.save({**sound, key: Touches(marker)}, path)
        assert_refused(path, r"a\.ckpt cannot be read: it holds \w+\.system; only tensors", ["read_checkpoint"])
    nested = {**sound, "simo_module": {**sound["simo_module"], "init_args": {"encoder": Touches(marker)}}}
    torch.save(nested, path)
    assert_refused(path, r"it holds \w+\.system; only tensors")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is as hostile as the test says
    assert marker.exists()


def test_a_pickle_inside_a_tensor_is_no_code(sound: dict[str, Any], tmp_path: Path) -> None:
    """The form of version 0.1, with arguments that run a command; and of the same bytes in today's form."""
    marker, buffer = tmp_path / "ran", io.BytesIO()
    torch.save(Touches(marker), buffer, _use_new_zipfile_serialization=False)
    packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    old = {"class": "simo_lightning.module:SimOModule", "arguments": {"encoder": packed}}
    torch.save({**sound, "simo_module": old}, tmp_path / "old.ckpt")
    assert_refused(tmp_path / "old.ckpt", r"old\.ckpt is of simo_lightning 0\.1, which stored", [*OPENERS][1:])
    new = {"class_path": "simo_lightning.SimOModule", "init_args": {"encoder": packed}}
    torch.save({**sound, "simo_module": new}, tmp_path / "new.ckpt")
    assert_refused(tmp_path / "new.ckpt", ".", ["load_encoder", "export", "probe"])
    (tmp_path / "plain.ckpt").write_bytes(buffer.getvalue())
    assert_refused(tmp_path / "plain.ckpt", r"plain\.ckpt cannot be read: it is cut short, or not a checkpoint")
    assert not marker.exists()


def test_a_tensor_subclass_runs_nothing(sound: dict[str, Any]) -> None:
    weights = {name: weight.as_subclass(TouchingTensor) for name, weight in sound["state_dict"].items()}
    torch.save({**sound, "state_dict": weights}, "a.ckpt")
    assert_refused(Path("a.ckpt"), r"it holds \w+\.system; only tensors")
    assert not Path("ran").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "compressed.ckpt")
    rewritten(Path("compressed.ckpt"), Path("plain.ckpt"))
    monkeypatch.setattr(torch.jit, "load", None)
    assert_refused(Path("compressed.ckpt"), r"its entry '.*' is compressed")
    assert_refused(Path("plain.ckpt"), "TorchScript archive")


def test_a_file_is_only_what_its_table_of_contents_lists(sound: dict[str, Any]) -> None:
    """torch.load reads a pickle at the start of a file, zipfile the archive behind it."""
    torch.save(sound, "archive.ckpt")
    torch.save(sound, "pickle.ckpt", _use_new_zipfile_serialization=False)
    Path("both.ckpt").write_bytes(Path("pickle.ckpt").read_bytes() + Path("archive.ckpt").read_bytes())
    assert_refused(Path("both.ckpt"), "not a checkpoint .the archive does not start at its first byte")


def test_weights_without_data_are_refused(sound: dict[str, Any]) -> None:
    weights = {name: weight.to("meta") for name, weight in sound["state_dict"].items()}
    torch.save({**sound, "state_dict": weights}, "a.ckpt")
    assert_refused(Path("a.ckpt"), r"a tensor of shape \(.*\) has no data")


FUNCTIONS = [
    {"class_path": "os.system", "init_args": {"command": "touch ran"}},
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}},
    {"class_path": "builtins.eval", "init_args": {"source": "open('ran', 'w')"}},
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "run", "source": "local"}},
    {"class_path": "torch.nn.modules.module.torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "run"}},
    {"class_path": "torch.nn.functional.importlib.import_module", "init_args": {"name": "hubconf"}},
    {"class_path": "torch.jit.ScriptModule"},
    {"class_path": "torch.nn.modules.module.torch.jit.ScriptModule"},
    {"class_path": "torch.nn.Linear.__init__"},
    {"class_path": "torch.nn.__builtins__.eval"},
    {"class_path": "torch.nn.init.ones_"},
    {"class_path": "simo_lightning.class_paths.importlib.import_module", "init_args": {"name": "hubconf"}},
    {"class_path": "simo_lightning.class_paths.ModuleType", "init_args": {"name": "x"}},
    {"class_path": "simo_lightning.extras.missing_extra", "init_args": {"message": "x"}},
    {"class_path": "torchvision.models.get_model", "init_args": {"name": "resnet18"}},
    {"class_path": "torchvision.models.resnet18", "init_args": {"weights": "IMAGENET1K_V1"}},
    {"class_path": "torchvision.models.resnet.load_state_dict_from_url", "init_args": {"url": "http://localhost"}},
    {"class_path": "torchvision.models.resnet.ResNet18_Weights", "init_args": {"value": 1}},
    {"class_path": "torchvision.models.feature_extraction.fx.GraphModule"},
    {"class_path": "torchvision.models.feature_extraction.DualGraphModule"},
    {"class_path": "pytorch_metric_learning.utils.common_functions.torch.load", "init_args": {"f": "a.ckpt"}},
    {"class_path": "pytorch_metric_learning.testers.GlobalEmbeddingSpaceTester"},
    {"class_path": "torchvision.datasets.CIFAR10", "init_args": {"root": ".", "download": True}},
    {"class_path": "timm_of_my_own.Encoder"},
    {"class_path": "hubconf.Run"},
    {"class_path": "torch.nn..Linear"},
    {"class_path": "../hubconf"},
    {"class_path": ["torch.nn.Linear"]},
    {"class_path": "simo_lightning.ProbeModule", "init_args": {"num_classes": 2, "checkpoint": "elsewhere.ckpt"}},
    {"class_path": "simo_lightning.ProbeModule", "init_args": {"num_classes": 2, "trusted": ["hubconf"]}},
    {"class_path": "torch.nn.Linear", "init_args": {"in_features": {"class_path": "os.system"}, "out_features": 2}},
    {"class_path": "torchvision.ops.MLP", "init_args": {"in_channels": 2, "norm_layer": {"type_path": "os.system"}}},
    {"class_path": "torchvision.ops.MLP", "init_args": {"in_channels": 2, "norm_layer": {"type_path": "hubconf.run"}}},
    {"type_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}},
]


@pytest.mark.parametrize("argument", ["encoder", "loss", "optimizer", "lr_scheduler"])
def test_class_paths_of_a_file_run_nothing(argument: str, sound: dict[str, Any], tmp_path: Path) -> None:
    for name in ("hubconf.py", "timm_of_my_own.py"):  # importing either leaves a trace
        Path(name).write_text(
            "open('ran', 'w')\ndef run(*args, **kwargs): pass\nclass Run: pass\nclass Encoder: pass\n"
        )
    path, arguments = tmp_path / "a.ckpt", sound["simo_module"]["init_args"]
    sys.path.insert(0, str(tmp_path))
    try:
        for hostile in FUNCTIONS:
            for wrapped in (hostile, [hostile], {"inner": (hostile,)})[: 3 if hostile is FUNCTIONS[0] else 1]:
                stored = {"class_path": "simo_lightning.SimOModule", "init_args": {**arguments, argument: wrapped}}
                torch.save({**sound, "simo_module": stored}, path)
                openers = (
                    [*OPENERS][1:] if (argument, hostile) == ("encoder", FUNCTIONS[0]) else ["load_from_checkpoint"]
                )
                assert_refused(path, rf"the argument '{argument}' of checkpoint .* cannot be built", openers)
    finally:
        sys.path.remove(str(tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.ckpt", "hubconf.py", "timm_of_my_own.py"]


def test_the_class_of_the_module_is_no_way_in(sound: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for name in ("os.system", "subprocess.Popen", "torch.hub.load", "builtins.eval", "torch.nn.Linear", None, {}):
        torch.save({**sound, "simo_module": {**sound["simo_module"], "class_path": name}}, path)
        assert_refused(path, r"a\.ckpt", ["load_module"])
    probe = {
        "class_path": "simo_lightning.ProbeModule",
        "init_args": {"num_classes": 2, "checkpoint": "elsewhere.ckpt"},
    }
    torch.save({**sound, "simo_module": probe}, path)
    assert_refused(path, "checkpoint of simo_lightning.ProbeModule is never taken from a file", ["load_module"])
    for stored in (None, 3, [], {"class_path": "simo_lightning.SimOModule"}, {"init_args": []}):
        torch.save({**sound, "simo_module": stored}, path)
        assert_refused(path, r"a\.ckpt", [*OPENERS][1:])


def test_lightnings_instantiator_is_not_followed(sound: dict[str, Any], tmp_path: Path) -> None:
    """Lightning's own load_from_checkpoint calls a function that the file names (its issue 21832)."""
    for instantiator in ("os.system", "lightning.pytorch.cli.instantiate_module"):
        hostile = {"_instantiator": instantiator, "_class_path": "subprocess.Popen", "args": ["touch", "ran"]}
        torch.save({**sound, "hyper_parameters": hostile}, tmp_path / "a.ckpt")
        assert isinstance(SimOModule.load_from_checkpoint(tmp_path / "a.ckpt").encoder, ImageEncoder)
        again = save(load_module(tmp_path / "a.ckpt"), tmp_path / "b.ckpt")
        assert "_instantiator" not in str(read_checkpoint(again).keys())
    assert not Path("ran").exists()


OTHER_LOSSES: list[dict[str, Any]] = [
    {"loss": "os.system", "arguments": {"command": "touch ran"}},
    {"loss": "pytorch_metric_learning.losses.os.system", "arguments": {"command": "touch ran"}},
    {"loss": "pytorch_metric_learning.utils.common_functions.os.system"},
    {"loss": "import_module", "arguments": {"name": "hubconf"}},
    {"loss": "SupConLoss", "miner": "subprocess.Popen", "miner_arguments": {"args": ["touch", "ran"]}},
    {"loss": "SupConLoss", "arguments": {"distance": {"os.system": {"command": "touch ran"}}}},
    {"loss": "CrossBatchMemory", "arguments": {"loss": {"builtins.eval": {"source": "open('ran', 'w')"}}}},
    {"loss": "ArcFaceLoss", "arguments": {"weight_init_func": "os.system"}},
    {"loss": "ArcFaceLoss", "arguments": {"num_classes": 2**40, "embedding_size": 2**10}},
    {"loss": "CrossBatchMemory", "arguments": {"loss": "SupConLoss", "embedding_size": 8, "memory_size": 2**40}},
]


@pytest.mark.parametrize("arguments", OTHER_LOSSES, ids=str)
def test_a_loss_by_name_is_looked_up_in_its_library_alone(arguments: dict[str, Any], sound: dict[str, Any]) -> None:
    stored = sound["simo_module"]
    loss = {"class_path": "simo_lightning.losses.MetricLearningLoss", "init_args": arguments}
    stored = {**stored, "init_args": {**stored["init_args"], "loss": loss}}
    torch.save({**sound, "simo_module": stored}, "a.ckpt")
    assert_refused(
        Path("a.ckpt"), r"'loss' of checkpoint a\.ckpt cannot be built", ["load_from_checkpoint", "load_module"]
    )
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "sizes", [{"num_classes": 2**40, "embedding_dim": 16}, {"num_classes": "os.system", "embedding_dim": 1}, [1, 2]]
)
def test_the_sizes_of_a_loss_claim_no_memory(sizes: Any, sound: dict[str, Any]) -> None:
    loss = {"class_path": "simo_lightning.losses.ClassifierLoss"}
    stored = {**sound["simo_module"], "loss_sizes": sizes}
    stored["init_args"] = {**stored["init_args"], "loss": loss}
    torch.save({**sound, "simo_module": stored}, "a.ckpt")
    assert_refused(Path("a.ckpt"), r"a\.ckpt does not fit SimOModule: ", ["load_from_checkpoint", "load_module"])


@pytest.mark.parametrize(
    "classes",
    [
        ["a"],
        {"names": "ab"},
        {"names": ["a", 1]},
        {"names": ["a"], "means": [[1.0]]},
        {"names": ["a"], "means": torch.ones(2, 16)},
        {"names": ["a"], "means": torch.ones(1, 16, dtype=torch.long)},
        {"names": ["a"], "means": torch.full((1, 16), float("inf"))},
    ],
    ids=str,
)
def test_classes_are_names_and_means(classes: Any, sound: dict[str, Any]) -> None:
    torch.save({**sound, "simo_module": {**sound["simo_module"], "classes": classes}}, "a.ckpt")
    assert_refused(
        Path("a.ckpt"),
        r"a\.ckpt .*its classes must have names",
        ["load_from_checkpoint", "load_module", "load_encoder"],
    )


def rewritten(
    source: Path, target: Path, name: Callable[[str], str] = str, compression: int = 0, **data: bytes
) -> Path:
    """A checkpoint file with other names, contents or compression of its entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            key = entry.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(name(entry.filename), data.get(key, old.read(entry)))
    return target


def test_entries_outside_and_compressed_ones_are_refused(sound: dict[str, Any], tmp_path: Path) -> None:
    torch.save(sound, tmp_path / "a.ckpt")
    for name in ("../../{}", "/tmp/{}", "a/../../{}"):
        path = rewritten(tmp_path / "a.ckpt", tmp_path / "b.ckpt", name.format)
        assert_refused(path, r"its entry '.*' lies outside of the archive")
    path = rewritten(tmp_path / "a.ckpt", tmp_path / "b.ckpt", compression=zipfile.ZIP_DEFLATED)
    assert_refused(path, r"its entry '.*' is compressed")


def data_pkl(path: Path) -> bytes:
    with zipfile.ZipFile(path) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def compressed_bomb(sound: dict[str, Any], path: Path) -> None:
    """256 MiB of zeros, compressed a thousandfold."""
    torch.save({**sound, "more": torch.zeros(16, dtype=torch.uint8)}, "plain.ckpt")
    with zipfile.ZipFile("plain.ckpt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as file:
                file.write(old.read(entry))
                for _ in range(16 * entry.filename.endswith("/data/0")):
                    file.write(bytes(2**24))


def storage_bomb(sound: dict[str, Any], path: Path) -> None:
    """A storage of 16 bytes that claims to have 2**30."""
    torch.save({**sound, "more": torch.zeros(16, dtype=torch.uint8)}, "plain.ckpt")
    content = data_pkl(Path("plain.ckpt"))
    at = content.rindex(b"K\x10t")  # the number of elements, at the end of the last storage's description
    rewritten(Path("plain.ckpt"), path, data_pkl=content[:at] + b"J\x00\x00\x00\x40" + content[at + 2 :])


def view_bomb(sound: dict[str, Any], path: Path) -> None:
    """A number that is repeated 2**40 times."""
    torch.save({**sound, "state_dict": {"encoder.w": torch.zeros(1).expand(2**40)}}, path)


def bytearray_bomb(sound: dict[str, Any], path: Path) -> None:
    """A call bytearray(2**31 - 1), which torch.load(weights_only=True) makes."""
    # an entry "z" of the outermost dictionary, right after its beginning: a string, the call with a tuple, SETITEM
    entry = b"X\x01\x00\x00\x00zcbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs"
    torch.save(sound, "plain.ckpt")
    content = data_pkl(Path("plain.ckpt"))
    rewritten(Path("plain.ckpt"), path, data_pkl=content[:5] + entry + content[5:])


def layer_bomb(sound: dict[str, Any], path: Path) -> None:
    """A layer of 64 GiB."""
    write_encoder(
        sound, path, {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2**17, "out_features": 2**17}}
    )


def depth_bomb(sound: dict[str, Any], path: Path) -> None:
    """A million layers of 12 MiB."""
    write_encoder(sound, path, {"class_path": "torch.nn.Transformer", "init_args": {"num_encoder_layers": 10**6}})


def count_bomb(sound: dict[str, Any], path: Path) -> None:
    """A million layers of a few numbers, which take more memory in Python than as tensors."""
    arguments = {"d_model": 1, "nhead": 1, "num_encoder_layers": 10**6, "dim_feedforward": 1}
    write_encoder(sound, path, {"class_path": "torch.nn.Transformer", "init_args": arguments})


def nesting_bomb(sound: dict[str, Any], path: Path) -> None:
    """A list of two lists, each the same list of two lists, and so on: 2**60 objects."""
    shape: Any = {"class_path": "torch.nn.Identity"}
    for _ in range(60):
        shape = [shape, shape]
    write_encoder(sound, path, {"class_path": "torch.nn.LayerNorm", "init_args": {"normalized_shape": shape}})


def write_encoder(sound: dict[str, Any], path: Path, encoder: Any) -> None:
    stored = {"class_path": "simo_lightning.SimOModule", "init_args": {"encoder": encoder}}
    torch.save({**sound, "simo_module": stored}, path)


BOMBS = [compressed_bomb, storage_bomb, view_bomb, bytearray_bomb, nesting_bomb, layer_bomb, depth_bomb, count_bomb]


def open_all(paths: list[Path], report: Path) -> None:
    """Open each file in a process of limited memory, and write its refusal and the MiB that it took."""
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    before, lines = peak_memory(), []
    for path in paths:
        with pytest.raises(ValueError, match=path.name) as raised:
            load_module(path)
        lines.append(f"{peak_memory() - before} {raised.value}")
    report.write_text("\n".join(lines))


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_small_files_take_little_memory(sound: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / f"{bomb.__name__}.ckpt" for bomb in BOMBS]
    for bomb, path in zip(BOMBS, paths, strict=True):
        bomb(sound, path)
        assert path.stat().st_size < 2**20
    assert start_ranks(1, open_all, paths, tmp_path / "report") == [0]
    lines = (tmp_path / "report").read_text().splitlines()
    assert len(lines) == len(paths)  # one line each
    for path, line in zip(paths, lines, strict=True):
        # the tensors that are built from arguments may take 256 MiB beyond the weights
        assert int(line.split()[0]) < (200 if path not in paths[-2:] else 600), line


@pytest.mark.parametrize("command", ["test", "predict", "plot", "fit"])
def test_the_command_runs_nothing_of_a_hostile_file(
    command: str, sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**sound, "callbacks": {"x": Touches(Path("ran"))}}, "a.ckpt")
    words = ["--config", str(CONFIG), "--ckpt_path", "a.ckpt", "--run_dir", "run"]
    monkeypatch.setattr(sys, "argv", ["simo", command, *words])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err.strip()
    assert error.startswith("simo: error: checkpoint a.ckpt cannot be read: it holds posix.system; only tensors")
    assert len(error.splitlines()) == 1
    assert not Path("ran").exists()
