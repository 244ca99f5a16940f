"""The ``simo`` command: fit, validate, test, predict and plot from a config."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from simo_lightning.callbacks import (
    BestCheckpoint,
    CollapseAlarm,
    EmbeddingPlots,
    EmbeddingWriter,
    GeometryMonitor,
    ImagesPerSecond,
    LastCheckpoint,
    OnlineKNN,
    OnlineProbe,
    RequeueAtTimeLimit,
    StopSafely,
)
from simo_lightning.checkpoints import read_checkpoint
from simo_lightning.loggers import RunConfigWriter, RunCSVLogger
from simo_lightning.parser import SimoParser, in_one_line
from simo_lightning.report import ReportTrainer
from simo_lightning.run_folder import (
    choose_run_folder,
    forget_run_folder,
    make_writable,
    remove_if_empty,
    run_folder_of,
)


class SimoCLI(LightningCLI):
    """LightningCLI with this package's callbacks, one folder per run and a summary at the end.

    A run's folder holds config.yaml, metrics.csv, TensorBoard events, checkpoints/ (best, last) and plots/.
    """

    run_dir: Path

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Run the command; a start that failed leaves no empty folder behind.

        Args:
            args: Of LightningCLI.
            kwargs: Of LightningCLI.
        """
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            remove_if_empty(getattr(self, "run_dir", None))
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``plot``.

        Returns:
            Methods of the trainer, each with those of its arguments that are no words of the command.
        """
        return {**LightningCLI.subcommands(), "plot": {"model", "datamodule", "config_name"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run_dir`` and the callbacks that a config can set.

        Args:
            parser: Of one subcommand.
        """
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run. Default: runs/<name of the config>/version_N, or job_ID under a scheduler; "
            "for validate, test, predict and plot the folder of the checkpoint.",
        )
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(OnlineKNN, "knn")
        parser.add_lightning_class_args(OnlineProbe, "probe")
        parser.add_lightning_class_args(GeometryMonitor, "geometry")
        parser.add_lightning_class_args(CollapseAlarm, "alarm")
        parser.add_lightning_class_args(EmbeddingPlots, "plots")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then find the run's folder and the checkpoint, before anything slow happens.

        Args:
            parser: The command's.
            args: None for the command line.
        """
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        self.run_dir = self._find_run_folder(config)
        config.ckpt_path = self._find_checkpoint(config.ckpt_path)
        config.run_dir = str(self.run_dir)
        config.trainer.default_root_dir = str(self.run_dir)
        if self.config.subcommand != "fit":
            self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer: loggers as the config says, TensorBoard unless it does, and in training metrics.csv always.

        Args:
            kwargs: For the trainer.

        Returns:
            The trainer.
        """
        fitting, folder = self.subcommand == "fit", str(self.run_dir)
        loggers = self._get(self.config_init, "trainer").logger
        if loggers in (None, True):
            loggers = TensorBoardLogger(folder, name="", version="") if fitting else False
        if loggers and fitting:  # metrics.csv always, unless the config says false: no logger
            kwargs["logger"] = [*(loggers if isinstance(loggers, list) else [loggers]), RunCSVLogger(folder)]
        else:
            kwargs["logger"] = False if self.subcommand == "plot" else loggers
        return super().instantiate_trainer(**kwargs, callbacks=self._with_progress_bar())

    def _with_progress_bar(self) -> list[pl.Callback]:
        """The config's callbacks, with a bar that moves at every tenth step; Lightning's own redraws at every one."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [callback for callback in callbacks if callback is not None]
        if config.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=10))
        return callbacks

    def plot(self, **arguments: Any) -> None:
        """Write the report and print where it lies.

        Args:
            arguments: Of :meth:`~simo_lightning.report.ReportTrainer.plot`.
        """
        assert isinstance(self.trainer, ReportTrainer)
        page = self.trainer.plot(config_name=self._config_name(), **arguments)
        _say("", f"report      {page}")

    def after_fit(self) -> None:
        """Print what came out and where it lies."""
        checkpoints, plots = self.run_dir / "checkpoints", self.run_dir / "plots"
        lines = [f"{name:<28}{float(value):>12.4g}" for name, value in sorted(self.trainer.callback_metrics.items())]
        for name, path in (("best", checkpoints / "best.ckpt"), ("last", checkpoints / "last.ckpt"), ("plots", plots)):
            if path.exists():
                lines.append(f"{name:<12}{path}")
        _say("", *lines)

    def after_test(self) -> None:
        """Print where the pictures lie."""
        self.after_validate()

    def after_validate(self) -> None:
        """Print where the pictures lie."""
        if (self.run_dir / "plots").exists():
            _say("", f"plots       {self.run_dir / 'plots'}")

    def _config_name(self) -> str:
        files = [Path(str(path)) for path in self.config[self.config.subcommand].get("config") or []]
        return files[-1].stem if files else "simo"

    def _find_run_folder(self, config: Any) -> Path:
        named = config.ckpt_path in ("best", "last")
        root = Path("runs", self._config_name())
        of_checkpoint = run_folder_of(Path(config.ckpt_path)) if config.ckpt_path and not named else None
        if config.run_dir is not None:
            folder = Path(config.run_dir)
            if self.config.subcommand == "fit" and config.ckpt_path is None and (folder / "checkpoints").exists():
                raise ValueError(
                    f"--run_dir {folder} holds a run already: give --ckpt_path last to go on with it, or another folder"
                )
        elif of_checkpoint is not None:
            folder = of_checkpoint
        elif self.config.subcommand == "fit" or named:
            folder = choose_run_folder(root, resume=named)
        else:
            folder = root / self.config.subcommand
        make_writable(folder)
        return folder

    def _find_checkpoint(self, asked: str | None) -> str | None:
        if asked is None:
            return None
        path = Path(asked)
        if asked in ("best", "last"):
            path = self.run_dir / "checkpoints" / f"{asked}.ckpt"
            if not path.is_file() and self.config.subcommand == "fit":
                _say(f"no checkpoint at {path} yet: starting from the beginning")
                return None
        read_checkpoint(path, map_location="cpu")  # a damaged file is told now, not after the data is loaded
        return str(path)


def main(args: Any = None) -> None:
    """Run the command.

    Args:
        args: Words of the command line; None for sys.argv.

    Raises:
        SystemExit: With 1 after a run that failed or was stopped, 2 after a wrong argument.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        forget_run_folder()
    _hush()
    try:
        SimoCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults={"callbacks": [StopSafely(), RequeueAtTimeLimit(), ImagesPerSecond(), EmbeddingWriter()]},
            seed_everything_default=0,
            trainer_class=ReportTrainer,
            save_config_callback=RunConfigWriter,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            parser_class=SimoParser,
            parser_kwargs={
                "allow_abbrev": False,
                "description": "Train, evaluate and explain image encoders with SimO loss.",
            },
            args=args,
        )
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("SIMO_TRACEBACK"):
            raise
        print(f"simo: error: {in_one_line(str(error))} (SIMO_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(1) from None


@rank_zero_only
def _say(*lines: str) -> None:
    print(*lines, sep="\n")


def _hush() -> None:
    """Leave out what Lightning says of itself to every user of every command."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()
