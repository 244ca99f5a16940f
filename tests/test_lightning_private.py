"""What the package works around in Lightning is still so in the installed version.

A test that fails here says that Lightning has changed: the part of ``lightning_private.py`` that it names can go.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from simo_lightning import lightning_private
from simo_lightning.loggers import RunCSVLogger

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
BATCHES = 3


class Line(pl.LightningModule):
    """A line, trained by two optimizers where that is asked for."""

    def __init__(self, width: int = 1, optimizers: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, width)
        self.count = optimizers
        self.automatic_optimization = optimizers == 1
        self.logged: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                optimizer.step()
            self.logged.append(lightning_private.logged_step(self.trainer))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=1e-3) for _ in range(self.count)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(BATCHES, 1))


def fit(folder: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    defaults = {"logger": False, "max_epochs": 1, "default_root_dir": folder, **QUIET}
    trainer = pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})
    trainer.fit(Line())
    return trainer


def saved(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def test_attached_trainer_the_public_property_raises_without_one() -> None:
    module = Line()
    assert lightning_private.attached_trainer(module) is None
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        module.trainer  # noqa: B018


def test_logged_step_global_step_counts_every_optimizer(tmp_path: Path) -> None:
    module = Line(optimizers=2)
    pl.Trainer(logger=False, enable_checkpointing=False, max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(module)
    assert module.logged == [0, 1, 2]
    assert module.global_step == 2 * BATCHES


def test_save_at_steps_and_epochs_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="should be mutually exclusive"):
        ModelCheckpoint(every_n_train_steps=2, every_n_epochs=1)


def test_forget_last_save_the_end_of_an_epoch_is_not_saved_after_its_last_batch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(
        tmp_path, "last", save_top_k=1, every_n_train_steps=BATCHES, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    lightning_private.save_at_steps_and_epochs(callback)
    fit(tmp_path, callback)
    progress = saved(tmp_path / "last.ckpt")["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert (progress["ready"], progress["processed"]) == (1, 0)  # as after the last batch


def test_complete_last_epoch_a_checkpoint_of_its_end_calls_it_incomplete(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True))
    checkpoint = saved(tmp_path / "last.ckpt")
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert (progress["processed"], progress["completed"]) == (1, 0)
    assert lightning_private.complete_last_epoch(checkpoint)
    assert progress["completed"] == 1


def test_begin_new_epoch_a_run_with_max_steps_always_continues_one(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=-1, max_steps=2, enable_checkpointing=False)
    trainer.fit_loop.restarting = False
    assert trainer.fit_loop.restarting
    lightning_private.begin_new_epoch(trainer)
    assert not trainer.fit_loop.restarting


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_appending_csv_logger_lightnings_own_deletes_the_file(tmp_path: Path) -> None:
    for logger, kept in ((RunCSVLogger(str(tmp_path)), True), (CSVLogger(str(tmp_path), "", ""), False)):
        (tmp_path / "metrics.csv").write_text("a,step\n1,0\n")
        assert logger.experiment is not None
        assert (tmp_path / "metrics.csv").exists() == kept


def test_appending_csv_logger_lightnings_own_truncates_the_file_for_a_new_column(tmp_path: Path) -> None:
    replaced = {}
    for kind in (RunCSVLogger, CSVLogger):
        folder = tmp_path / kind.__name__
        logger = kind(str(folder), **({} if kind is RunCSVLogger else {"name": "", "version": ""}))
        for step, name in enumerate("ab"):
            logger.log_metrics({name: 1.0}, step)
            before = (folder / "metrics.csv").stat().st_ino if step else None
            logger.save()
        replaced[kind] = (folder / "metrics.csv").stat().st_ino != before
        assert (folder / "metrics.csv").read_text().splitlines() == ["a,b,step", "1.0,,0", ",1.0,1"]
    assert replaced == {RunCSVLogger: True, CSVLogger: False}


def test_function_cli_a_subcommand_must_be_a_method_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithPlot(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "plot": set()}

    with pytest.raises(AttributeError, match="plot"):
        WithPlot(Line, args=["plot"])


def test_function_cli_arguments_of_a_checkpoint_replace_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "line.ckpt"
    torch.save({"hyper_parameters": {"width": 1}}, path)

    class ParseOnly(LightningCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    words = ["validate", "--model.width", "2", "--ckpt_path", str(path), "--trainer.accelerator", "cpu"]
    assert ParseOnly(Line, args=words, seed_everything_default=False).model.layer.out_features == 1


def test_batches_processed_counts_within_the_epoch(tmp_path: Path) -> None:
    counts = []

    class Counting(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            counts.append(lightning_private.batches_processed(self.trainer))
            return super().training_step(batch, batch_idx)

    arguments: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "max_epochs": 2, **QUIET}
    pl.Trainer(default_root_dir=tmp_path, **arguments).fit(Counting())
    assert counts == [*range(BATCHES)] * 2


def test_given_arguments_are_those_of_the_command_line() -> None:
    given = []

    class Given(Line):
        def __init__(self, width: int = 1) -> None:
            super().__init__(width)
            given.append(lightning_private.given_arguments())

    words = ["--model.width", "2", "--trainer.accelerator", "cpu"]
    LightningCLI(Given, args=words, run=False, seed_everything_default=False)
    assert given[0]["width"] == 2
    assert lightning_private.given_arguments() == {}
