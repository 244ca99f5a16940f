"""Sharded weights and checkpoints (FSDP2) on real processes: saved, resumed, read and refused."""

import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from simo_lightning import DigitsPairDataModule, Embedder, ImageEncoder, OneCycle, ShardedStrategy, SimOModule
from simo_lightning.callbacks import BestCheckpoint, GracefulShutdown, LastCheckpoint
from simo_lightning.checkpoints import load_preprocessing, read_checkpoint, training_classes
from simo_lightning.tensor_files import former_of, replace_folder, restore_former
from tests.rank_fit import Signal
from tests.rank_processes import start_ranks
from tests.test_hostile_files import Touches

TERM = {13: (0, signal.SIGTERM)}  # step: (rank, signal)
BATCHES = 10  # of an epoch on two processes


class Restored(Callback):
    """Saves what a resumed run starts with."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir, "restored.ckpt"))


class FillsDisk(Callback):
    """Leaves no room in the folder after fifteen batches."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 15 and trainer.is_global_zero:
            with Path(trainer.default_root_dir, "other").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(2**12))


def train(
    folder: Path,
    world: int,
    strategy: str = "sharded",
    checkpoint: Path | None = None,
    signals: dict[int, tuple[int, int]] | None = None,
    epochs: int = 2,
    callbacks: tuple[Callback, ...] = (),
) -> None:
    """A ResNet with BatchNorm on digits, with the default callbacks; checkpoints go to ``folder/checkpoints``."""
    warnings.simplefilter("ignore")
    pl.seed_everything(0)
    encoder = ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1, embedding_dim=8)
    module = SimOModule(encoder, optimizer=partial(torch.optim.AdamW, lr=1e-2), lr_scheduler=OneCycle)
    made: Any = {
        "sharded": lambda: ShardedStrategy(process_group_backend="gloo"),
        "Lightning's": lambda: ModelParallelStrategy(world, 1, process_group_backend="gloo"),
        "one file": lambda: ShardedStrategy(process_group_backend="gloo", save_distributed_checkpoint=False),
        "auto": lambda: "auto",
    }[strategy]()
    saves = [Signal(signals or {}), GracefulShutdown(), LastCheckpoint(), BestCheckpoint(), *callbacks]
    trainer = pl.Trainer(
        max_epochs=epochs, default_root_dir=folder, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, devices=world, strategy=made, callbacks=saves,
    )  # fmt: skip
    trainer.fit(module, DigitsPairDataModule(samples_per_class=6), ckpt_path=checkpoint)
    if strategy != "auto":
        weights = dict(module.encoder.named_parameters())
        assert all(isinstance(weight, DTensor) for weight in weights.values())


def run(world: int, folder: Path, *rest: Any, **named: Any) -> list[int | None]:
    return start_ranks(world, _run, folder, world, rest, named)


def _run(folder: Path, world: int, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
    train(folder, world, *rest, **named)


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_equal(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, values in enumerate(zip(one, other, strict=True)):
            assert_equal(*values, f"{where}.{index}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_equal_states(one: Path, other: Path) -> None:
    first, second = read_checkpoint(one), read_checkpoint(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(first[key], second[key], key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on two processes, and in the folder beside it the first epoch of them."""
    folder = tmp_path_factory.mktemp("sharded") / "whole"
    assert run(2, folder) == [0, 0]
    return folder


@pytest.mark.slow  # four processes
def test_a_run_that_was_stopped_within_an_epoch_goes_on_to_the_last_bit(whole: Path, tmp_path: Path) -> None:
    assert run(2, tmp_path / "stopped", signals=TERM)[0] == 143
    checkpoint = last(tmp_path / "stopped")
    assert read_checkpoint(checkpoint)["global_step"] == 14
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"
    ]  # fmt: skip
    assert run(2, tmp_path / "again", checkpoint=checkpoint) == [0, 0]
    assert_equal_states(last(tmp_path / "again"), last(whole))
    assert not list(last(whole).parent.glob(".*"))  # nothing unfinished or former


def test_every_part_reads_it_as_one_file(whole: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(last(whole))
    module = SimOModule.load_from_checkpoint(last(whole))
    assert_equal(module.state_dict(), checkpoint["state_dict"])
    assert {weight.shape for weight in module.state_dict().values()} >= {torch.Size([8])}
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    assert Embedder.load(last(whole))(images).shape == (3, 8)
    assert load_preprocessing(last(whole)) == module.preprocessing
    classes = training_classes(checkpoint)
    assert classes is not None
    assert classes.means is not None
    assert classes.means.shape == (10, 8)
    assert classes.means.isfinite().all()
    torch.save(checkpoint, tmp_path / "one.ckpt")
    assert_equal(read_checkpoint(tmp_path / "one.ckpt"), checkpoint)
    best = read_checkpoint(whole / "checkpoints" / "best.ckpt")
    assert best["global_step"] in (BATCHES, 2 * BATCHES)


@pytest.mark.slow  # half a minute: ten processes
@pytest.mark.parametrize("world, strategy", [(1, "sharded"), (1, "auto"), (2, "one file")])
def test_it_resumes_on_another_number_of_processes_and_without_shards(
    whole: Path, tmp_path: Path, world: int, strategy: str
) -> None:
    """From the end of an epoch, for another one."""
    folder = tmp_path / "other"
    assert run(world, folder, strategy, last(whole), epochs=3, callbacks=(Restored(),)) == [0] * world
    assert_equal_states(folder / "restored.ckpt", last(whole))
    there = read_checkpoint(last(folder))
    steps = 2 * BATCHES + 2 * BATCHES // world
    assert there["global_step"] == steps
    assert all(weight.isfinite().all() for weight in there["state_dict"].values())
    if strategy == "one file":
        assert last(folder).is_file()
    # and back on two, from shards of one process or from one file
    assert run(2, tmp_path / "two", "sharded", last(folder), epochs=4, callbacks=(Restored(),)) == [0, 0]
    assert_equal_states(tmp_path / "two" / "restored.ckpt", last(folder))
    assert read_checkpoint(last(tmp_path / "two"))["global_step"] == steps + BATCHES


@pytest.mark.slow
def test_lightnings_own_strategy_is_made_safe(whole: Path, tmp_path: Path) -> None:
    assert run(2, tmp_path / "run", "Lightning's") == [0, 0]
    assert_equal_states(last(tmp_path / "run"), last(whole))


@pytest.fixture
def disk(mounted: Callable[[str], Path]) -> Path:
    """A file system of 16 MiB."""
    return mounted("16m")


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_save_leaves_the_shards_before(disk: Path, whole: Path) -> None:
    folder = disk / "run"
    codes = run(2, folder, callbacks=(FillsDisk(),))
    assert 0 not in codes
    assert read_checkpoint(last(folder))["global_step"] == BATCHES
    assert {path.name for path in last(folder).parent.iterdir()} == {"last.ckpt", "best.ckpt"}
    (folder / "other").unlink()
    assert run(2, folder, checkpoint=last(folder)) == [0, 0]
    assert_equal_states(last(folder), last(whole))


def test_a_crash_while_a_folder_is_replaced_loses_nothing(tmp_path: Path) -> None:
    target, new = tmp_path / "last.ckpt", tmp_path / "new"
    for content in "ab":
        new.mkdir()
        (new / "file").write_text(content)
        replace_folder(new, target)
        assert (target / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    restore_former(target)
    assert (target / "file").read_text() == "b"
    target.rename(former_of(target))  # as a crash between the two steps leaves it
    restore_former(target)
    assert (target / "file").read_text() == "b"
    new.write_text("one file")
    replace_folder(new, target)
    assert target.read_text() == "one file"


def hostile_list(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Touches(marker)))


def hostile_entry(folder: Path, marker: Path) -> None:
    """In the place of a plain entry of the optimizer, as far as it has room."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    shard = folder / "__0_0.distcp"
    for index, stored in metadata.storage_data.items():
        if index.fqn == "optimizer_0.param_groups.0.betas":
            stored.offset, stored.relative_path = shard.stat().st_size, shard.name
            torch.save(Touches(marker), folder / "extra")
            stored.length = (folder / "extra").stat().st_size
            with shard.open("ab") as file:
                file.write((folder / "extra").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_rest(folder: Path, marker: Path) -> None:
    torch.save({**torch.load(folder / "meta.pt", weights_only=True), "callbacks": Touches(marker)}, folder / "meta.pt")


def outside(folder: Path, marker: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def too_large(folder: Path, marker: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([2**40])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "change, match",
    [
        (hostile_list, r"its .metadata holds \w+\.system, which is not part of a list of shards"),
        (hostile_entry, r"its entry 'optimizer_0.*betas' holds more than tensors and plain data"),
        (hostile_rest, "only tensors, numbers, strings, lists and dictionaries are read"),
        (outside, "lies outside of the folder"),
        (too_large, "claim more than the files have"),
    ],
)
def test_opening_a_sharded_checkpoint_runs_no_code_from_it(
    whole: Path, tmp_path: Path, change: Any, match: str
) -> None:
    folder, marker = tmp_path / "last.ckpt", tmp_path / "ran"
    shutil.copytree(last(whole), folder)
    change(folder, marker)
    for tensors in (True, False):
        if tensors or change is not too_large:
            with pytest.raises(ValueError, match=match) as raised:
                read_checkpoint(folder) if tensors else ShardedStrategy.load_checkpoint(_Alone(), folder)  # type: ignore[arg-type]
            assert len(str(raised.value).splitlines()) == 1
    assert not marker.exists()


class _Alone:
    """What the strategy needs of itself before it opens a file."""

    def broadcast(self, path: Any) -> Any:
        return path


@pytest.mark.slow
def test_tensor_parallel_processes_need_a_division_of_layers(tmp_path: Path) -> None:
    assert start_ranks(2, _tensor_parallel, tmp_path / "error") == [0, 0]
    assert "tensor_parallel_size must be 1" in (tmp_path / "error").read_text()


def _tensor_parallel(answer: Path) -> None:
    warnings.simplefilter("ignore")
    strategy = ModelParallelStrategy(1, 2, process_group_backend="gloo")
    trainer = pl.Trainer(
        max_epochs=1, devices=2, strategy=strategy, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=answer.parent,
    )  # fmt: skip
    try:
        trainer.fit(SimOModule(ImageEncoder("resnet10", width=0.125, in_channels=1)), DigitsPairDataModule())
    except ValueError as error:
        if os.environ["RANK"] == "0":
            answer.write_text(str(error))
