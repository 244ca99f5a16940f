"""All uses of Lightning beyond its public interface, with their reasons.

Each part names the behaviour of Lightning that it works around, the issue there and the version it was last seen in.
``tests/test_lightning_private.py`` checks each behaviour in the installed version: a failing test means that Lightning
has changed and the part can be removed.
"""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from simo_lightning.retry import retry_while_lost


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The module's trainer, or None. The public property raises if there is none (by design, since 2.0; 2.6.6)."""
    return module._trainer


def logged_step(trainer: pl.Trainer) -> int:
    """The step number that Lightning logs with.

    ``trainer.global_step`` counts the steps of all optimizers, and no public attribute gives the logged number
    (#11805; 2.6.6).
    """
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def batches_processed(trainer: pl.Trainer) -> int:
    """Training batches of the epoch that are done.

    No public attribute gives the number, which after a restore in the middle of an epoch begins above 0 (2.6.6).
    """
    count: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return count


def transfer_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch on the trainer's device, through the batch-transfer hooks of the data module or the module.

    ``strategy.batch_to_device`` runs all of them but the first, ``on_before_batch_transfer`` (2.6.6).
    """
    module: Any = trainer.lightning_module
    return trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))


def given_arguments() -> dict[str, Any]:
    """Class path and arguments of the module that the command line is making; empty outside of it.

    Lightning passes them in this context variable only (2.6.6).
    """
    return _given_hyperparameters.get() or {}


def save_at_steps_and_epochs(callback: ModelCheckpoint) -> None:
    """Let a checkpoint callback save every n steps and at the end of each epoch; Lightning takes one of the two.

    (#11645; 2.6.6)
    """
    callback._every_n_epochs = 1


def forget_last_save(callback: ModelCheckpoint) -> None:
    """Let a checkpoint callback save again at the step of its last save.

    It skips that step, although validation and the end of the epoch have happened since (#6146; 2.6.6).
    """
    callback._last_global_step_saved = -1


def complete_last_epoch(checkpoint: dict[str, Any]) -> bool:
    """Count the last epoch of a checkpoint as complete if only its last hook is missing.

    A checkpoint written at the end of an epoch has it as incomplete, so a resumed run counts it twice
    (#19403; 2.6.6). Returns whether the next step belongs to a new epoch.
    """
    if "loops" not in checkpoint:  # weights only, which Lightning reports
        return False
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    between_epochs: bool = progress["current"]["processed"] == progress["current"]["ready"]
    if between_epochs:
        for count in progress.values():
            count["completed"] = count["processed"]
    return between_epochs


def begin_new_epoch(trainer: pl.Trainer) -> None:
    """Begin an epoch where a resumed loop would continue one.

    The setter of ``restarting`` stores True for every run whose length is given in steps (#19617; 2.6.6).
    """
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger, which appends to an existing file; Lightning deletes it (#19446; 2.6.6)."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of ``metrics.csv``."""
        if not isinstance(self._experiment, ExperimentWriter):
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        _drop_unfinished_row(path)
        with path.open(newline="") as file:
            self.metrics_keys = list(csv.DictReader(file).fieldnames or [])
        if not self.metrics_keys:
            path.unlink()  # a header is written only to a new file

    def save(self) -> None:
        keys, write = list(self.metrics_keys), super().save

        def attempt() -> None:
            self.metrics_keys = list(keys)  # a new one is written into the header once
            write()

        try:
            retry_while_lost(attempt, self.metrics_file_path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"{self.metrics_file_path} cannot be written: {reason}") from error

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning truncates the file first, so a crash here would lose every row (2.6.6)."""
        path = Path(self.metrics_file_path)
        unfinished = path.with_name(f".{path.name}.unfinished")
        with path.open(newline="") as file, unfinished.open("w", newline="") as target:
            writer = csv.DictWriter(target, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))
            target.flush()
            os.fsync(target.fileno())
        unfinished.replace(path)


def _drop_unfinished_row(path: Path) -> None:
    """Cut the file after its last complete line: a process that was killed may have written half of one."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


class FunctionCLI(LightningCLI):
    """LightningCLI whose subcommands may also be functions; Lightning takes methods of the trainer only (2.6.6)."""

    @staticmethod
    def functions() -> dict[str, tuple[Callable[..., Any], set[str]]]:
        """Functions by the name of their subcommand, each with its arguments that are not options."""
        return {}

    def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, (function, skip) in self.functions().items():
            summary = (function.__doc__ or "").strip().splitlines()[0]
            command: Any = self.init_parser(**{"description": summary, **kwargs.get(name, {})})
            self._add_arguments(command)
            self._subcommand_method_arguments[name] = command.add_function_arguments(function, skip=set(skip))
            self._subcommand_parsers[name] = command
            parser.commands.add_subcommand(name, command, help=summary)
        commands: list[Any] = list(self._subcommand_parsers.values())
        for command in commands:
            command.share_options([other for other in commands if other is not command])

    def _parse_ckpt_path(self) -> None:
        """Do nothing: in Lightning, arguments in a checkpoint replace those of the config (#21455; 2.6.6)."""

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in self.functions():
            getattr(self, subcommand)(**self._prepare_subcommand_kwargs(subcommand))
        else:
            super()._run_subcommand(subcommand)

    def of_command(self, key: str) -> Any:
        """An instantiated part of the subcommand's config."""
        return self._get(self.config_init, key)
