import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from pytorch_metric_learning.losses import SupConLoss
from torch import nn

from simo_lightning import ImageEncoder, OneCycle, ProbeModule, SimOLoss, SimOModule
from simo_lightning.callbacks.checkpoints import AtomicCheckpointIO
from simo_lightning.checkpoints import load_encoder, load_module, read_checkpoint
from simo_lightning.class_paths import build, describe, is_plain
from simo_lightning.cli import main
from simo_lightning.semi_supervised import SemiSupervisedLoss
from tests.checkpoint_parts import Flat, OwnEncoder, SavesHyperparameters, fit, save
from tests.rank_processes import start_ranks

LARGE = 64 * 2**20  # bytes


def write(path: Path) -> None:
    """Write one checkpoint, and be killed while a second is being written over it."""
    writer, unfinished = AtomicCheckpointIO(), path.with_name(f".{path.name}.unfinished")
    writer.save_checkpoint({"step": 1, "rows": torch.arange(9)}, path)

    def kill() -> None:
        while not unfinished.exists() or unfinished.stat().st_size == 0:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill).start()
    writer.save_checkpoint({"step": 2, "rows": [torch.zeros(2**20, dtype=torch.uint8) for _ in range(64)]}, path)


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path, unfinished = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.unfinished"
    assert start_ranks(1, write, path) == [-signal.SIGKILL]
    assert 0 < unfinished.stat().st_size < LARGE
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == 1
    assert torch.equal(checkpoint["rows"], torch.arange(9))
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert not unfinished.exists()


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_arguments_are_stored_as_a_config_writes_them(tmp_path: Path) -> None:
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1)
    loss = SemiSupervisedLoss(3, labelled=SimOLoss(form="softmax", eps=np.float32(0.5)))
    module = SimOModule(encoder, loss, partial(torch.optim.SGD, lr=0.1), OneCycle, micro_batch_size=4)
    stored = torch.load(save(module, tmp_path / "a.ckpt"), weights_only=True)["simo_module"]
    labelled = {"class_path": "simo_lightning.SimOLoss", "init_args": {"form": "softmax", "eps": 0.5}}
    assert stored == {
        "class_path": "simo_lightning.SimOModule",
        "init_args": {
            "encoder": {
                "class_path": "simo_lightning.ImageEncoder",
                "init_args": {"backbone": "resnet10", "width": 0.125, "stem": "small", "in_channels": 1},
            },
            "loss": {
                "class_path": "simo_lightning.semi_supervised.SemiSupervisedLoss",
                "init_args": {"num_classes": 3, "labelled": labelled},
            },
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "lr_scheduler": {"class_path": "simo_lightning.OneCycle"},
            "micro_batch_size": 4,
        },
    }


def test_a_checkpoint_from_python_loads_by_its_path_alone(tmp_path: Path) -> None:
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1)
    module = SimOModule(encoder, SimOLoss("pair", "log", eps=0.1), partial(torch.optim.SGD, lr=0.1), OneCycle)
    fit(module, tmp_path, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    again = SimOModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert equal_weights(module, again)
    assert isinstance(again.loss, SimOLoss)
    assert (again.loss.level, again.loss.form, again.loss.eps) == ("pair", "log", 0.1)
    assert isinstance(again.optimizer, partial)
    assert (again.optimizer.func, again.optimizer.keywords) == (torch.optim.SGD, {"lr": 0.1})
    assert again.lr_scheduler is OneCycle
    fit(again, tmp_path, max_steps=1)  # training can continue
    with (tmp_path / "a.ckpt").open("rb") as file:
        assert equal_weights(module, SimOModule.load_from_checkpoint(file))


def test_a_class_of_the_user_is_built_only_where_it_is_named(tmp_path: Path) -> None:
    module = SimOModule(Flat(hidden=8))
    path = save(module, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"'encoder' of checkpoint .*Flat' is no class .*trusted=\[\.\.\.\]") as raised:
        SimOModule.load_from_checkpoint(path)
    assert "\n" not in str(raised.value)
    for trusted in (Flat, [Flat], "tests.checkpoint_parts.Flat", ["tests.checkpoint_parts"], "tests"):
        assert equal_weights(module, SimOModule.load_from_checkpoint(path, trusted=trusted))
    assert equal_weights(module, SimOModule.load_from_checkpoint(path, encoder=Flat(8)))
    assert equal_weights(module.encoder, load_encoder(path, trusted=Flat))


def test_a_subclass_is_stored_with_its_own_arguments(tmp_path: Path) -> None:
    module = OwnEncoder(gain=3.0)
    path = save(module, tmp_path / "a.ckpt")
    for again in (OwnEncoder.load_from_checkpoint(path), load_module(path, trusted=OwnEncoder)):
        assert isinstance(again, OwnEncoder)
        assert again.gain == 3.0
        assert equal_weights(module, again)
    assert OwnEncoder.load_from_checkpoint(path, gain=4.0).gain == 4.0
    assert equal_weights(module.encoder, load_encoder(path, trusted=OwnEncoder))
    with pytest.raises(ValueError, match=r"class of checkpoint .*OwnEncoder' is no class .*trusted"):
        load_module(path)


@pytest.mark.parametrize(
    "value",
    [nn.GroupNorm, partial(nn.GroupNorm, num_groups=2), Path("a/b"), [torch.optim.SGD, {"path": Path("c")}], nn.Module],
    ids=str,
)
def test_classes_and_paths_are_arguments(value: Any) -> None:
    description = describe(value)
    torch.save(description, "a.pt")
    again = build(torch.load("a.pt", weights_only=True))
    assert is_plain(description)
    if isinstance(value, partial):
        assert (again.func, again.keywords) == (value.func, value.keywords)
    else:
        assert again == value


@pytest.mark.parametrize("loss", [None, "SupCon"])
def test_an_object_made_in_python_must_be_passed_again(loss: str | None, tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    module = SimOModule(encoder if loss is None else Flat(), None if loss is None else SupConLoss())
    path = save(module, tmp_path / "a.ckpt")
    name, kind = ("encoder", r"torch\.nn\.\S+\.Sequential") if loss is None else ("loss", r"\S+\.SupConLoss")
    message = (
        rf"does not hold the argument '{name}' \(a {kind} made in Python\): pass it, load_from_chec\S+path, {name}="
    )
    with pytest.raises(ValueError, match=message):
        SimOModule.load_from_checkpoint(path, trusted=Flat)
    again: dict[str, Any] = {"encoder": encoder} if loss is None else {"loss": SupConLoss()}
    assert equal_weights(module, SimOModule.load_from_checkpoint(path, trusted=Flat, **again))
    if loss is not None:  # what embeds images needs no loss
        assert equal_weights(module.encoder, load_encoder(path, trusted=Flat))


def test_a_function_that_is_not_stored_raises_when_it_is_called(tmp_path: Path) -> None:
    module = SimOModule(Flat(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    again = SimOModule.load_from_checkpoint(save(module, tmp_path / "a.ckpt"), trusted=Flat)
    assert equal_weights(module, again)
    with pytest.raises(
        ValueError, match=r"does not hold the argument 'optimizer' \(a builtins\.function made in Python"
    ):
        fit(again, tmp_path)


def test_the_command_line_knows_the_arguments_of_every_class() -> None:
    config = yaml.safe_load((Path(__file__).parent.parent / "configs" / "digits.yaml").read_text())
    backbone = {"class_path": "torch.nn.Flatten", "init_args": {"start_dim": 1}}
    config["model"]["init_args"]["encoder"]["init_args"] = {"backbone": backbone, "feature_dim": 64}
    loss = {"class_path": "pytorch_metric_learning.losses.SupConLoss", "init_args": {"temperature": 0.5}}
    config["model"]["init_args"]["loss"] = loss
    Path("config.yaml").write_text(yaml.safe_dump(config))
    options = "--trainer.max_steps 2 --trainer.max_epochs 1 --trainer.accelerator cpu"
    quiet = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
    main(["fit", "--config", "config.yaml", "--run_dir", "run", *options.split(), *quiet.split()])
    module = SimOModule.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert isinstance(module.loss, SupConLoss)
    assert module.loss.temperature == 0.5
    assert isinstance(module.encoder.backbone, nn.Flatten)
    assert module.optimizer.func is torch.optim.AdamW  # type: ignore[attr-defined]
    stored = read_checkpoint("run/checkpoints/last.ckpt")["simo_module"]["init_args"]
    assert stored["encoder"]["init_args"]["backbone"]["class_path"] == "torch.nn.Flatten"


def test_weights_are_stored_once(tmp_path: Path) -> None:
    module = SimOModule(Flat(hidden=20_000))
    path = save(module, tmp_path / "a.ckpt", weights_only=True)
    assert path.stat().st_size < 1.1 * sum(weight.nbytes for weight in module.state_dict().values())


def test_hparams_file_replaces_stored_arguments(tmp_path: Path) -> None:
    path = save(OwnEncoder(gain=3.0), tmp_path / "a.ckpt")
    (tmp_path / "hparams.yaml").write_text("gain: 5.0\n_class_path: other\n")
    (tmp_path / "hparams.csv").write_text("key,value\ngain,6.0\n")
    assert OwnEncoder.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.yaml").gain == 5.0
    assert OwnEncoder.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.csv").gain == 6.0
    assert OwnEncoder.load_from_checkpoint(path, "cpu", tmp_path / "hparams.csv", True, True, gain=7.0).gain == 7.0
    (tmp_path / "hparams.yaml").write_text("gian: 5.0\n")
    with pytest.raises(ValueError, match="must hold arguments of OwnEncoder, got gian"):
        OwnEncoder.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.yaml")
    with pytest.raises(ValueError, match=r"hparams_file must end in \.yaml, \.yml or \.csv, got a\.json"):
        OwnEncoder.load_from_checkpoint(path, hparams_file="a.json")


def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path: Path) -> None:
    path = save(SimOModule(Flat(hidden=8)), tmp_path / "a.ckpt")
    message = (
        r"a\.ckpt does not fit SimOModule: encoder\.layers\.1\.weight has shape \(8, 64\) in the file and \(16, 64\) "
        r"in the model; encoder\.layers\.1\.bias has shape \(8,\) in the file and \(16,\) in the model; .*\(4, 16\) in "
    )
    with pytest.raises(ValueError, match=message):
        SimOModule.load_from_checkpoint(path, encoder=Flat())
    with pytest.raises(ValueError, match=message):  # as Lightning's trainer loads it
        fit(SimOModule(Flat()), tmp_path, path)
    with pytest.raises(ValueError, match=r"encoder\.0\.weight is not in the file; .*; and 3 more$"):
        SimOModule.load_from_checkpoint(path, encoder=nn.Sequential(nn.Linear(2, 2)))
    loose = SimOModule.load_from_checkpoint(path, encoder=nn.Sequential(nn.Linear(2, 2)), strict=False)
    assert isinstance(loose.encoder, nn.Sequential)


def test_a_fit_does_not_resume_from_weights_alone(tmp_path: Path) -> None:
    path = save(SimOModule(Flat()), tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"a\.ckpt holds weights alone .* SimOModule\.load_from_checkpoint\(path\)"):
        fit(SimOModule(Flat()), tmp_path, path)


class NumpyState(pl.Callback):
    """Keeps numpy numbers and an array in its state."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"best": np.float64(0.1), "step": np.int64(3), "history": np.arange(3.0)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


@pytest.mark.filterwarnings("ignore:Attribute 'encoder' is an instance of `nn.Module`")
def test_save_hyperparameters_and_numpy_states_resume(tmp_path: Path) -> None:
    def module() -> SimOModule:
        torch.manual_seed(0)
        return SavesHyperparameters(Flat(), make=torch.hub.load, gain=2.0)

    path, callback = tmp_path / "a.ckpt", NumpyState()
    fit(module(), tmp_path, max_epochs=1, callbacks=[NumpyState()]).save_checkpoint(path)
    resumed = fit(module(), tmp_path, path, max_epochs=2, callbacks=[callback])  # weights_only as Lightning has it
    assert resumed.current_epoch == 2
    assert (callback.state["best"], callback.state["step"]) == (0.1, 3)
    assert torch.equal(callback.state["history"], torch.arange(3.0, dtype=torch.float64))
    checkpoint = read_checkpoint(path)
    assert checkpoint["hyper_parameters"] == {
        "encoder": {"class_path": "tests.checkpoint_parts.Flat", "init_args": {}},
        "gain": 2.0,
    }
    again = SavesHyperparameters.load_from_checkpoint(path, trusted=Flat)
    assert again.gain == 2.0


class Odd:
    """No plain data."""


class OddState(NumpyState):
    def state_dict(self) -> dict[str, Any]:
        return {"odd": Odd()}


def test_a_file_with_objects_is_refused_by_their_class_unless_the_user_trusts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run = fit(OwnEncoder(), tmp_path, max_steps=1, callbacks=[OddState()])
    with pytest.warns(
        UserWarning, match=r"holds a tests\.test_checkpoints\.Odd in callbacks\.OddState\.odd: it can only"
    ):
        run.save_checkpoint(path)
    with pytest.raises(
        ValueError, match=r"a\.ckpt cannot be read: it holds tests\.test_checkpoints\.Odd; only tensors, "
    ):
        OwnEncoder.load_from_checkpoint(path)
    for again in (OwnEncoder.load_from_checkpoint(path, weights_only=False), run.model):
        assert isinstance(again, OwnEncoder)
    assert isinstance(read_checkpoint(path, weights_only=False)["callbacks"]["OddState"]["odd"], Odd)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    path = save(SimOModule(Flat()), tmp_path / "a.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read: it is cut short, or not a checkpoint"):
        SimOModule.load_from_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        SimOModule.load_from_checkpoint(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt was not written by a module of simo_lightning"):
        SimOModule.load_from_checkpoint(tmp_path / "foreign.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt must hold a state_dict"):
        read_checkpoint(tmp_path / "list.ckpt")


class OwnProbe(ProbeModule):
    """A subclass that passes its arguments on."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(10, *arguments, **options)


def test_a_probe_describes_the_encoder_of_its_checkpoint(tmp_path: Path) -> None:
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1)
    first = save(SimOModule(encoder, SupConLoss()), tmp_path / "a.ckpt")
    probe = ProbeModule(10, str(first))
    second = save(probe, tmp_path / "b.ckpt")
    first.unlink()
    assert equal_weights(probe, ProbeModule.load_from_checkpoint(second))
    first = save(SimOModule(Flat()), tmp_path / "a.ckpt")
    for probe in (ProbeModule(10, str(first), trusted=["tests"]), OwnProbe(checkpoint=str(first), trusted=["tests"])):
        again = type(probe).load_from_checkpoint(save(probe, second), trusted=Flat)
        assert equal_weights(probe, again)
        assert isinstance(again.encoder, Flat)
