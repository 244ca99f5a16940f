"""The ``simo`` command: fit, validate, test, predict and plot from a config."""

import hashlib
import inspect
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from simo_lightning.callbacks import (
    BestCheckpoint,
    ClassTable,
    CollapseAlarm,
    EmbeddingPlots,
    EmbeddingProjector,
    EmbeddingWriter,
    GeometryMonitor,
    GracefulShutdown,
    ImagesPerSecond,
    LastCheckpoint,
    OnlineKNN,
    OnlineProbe,
    RetrievalMonitor,
    UnknownMonitor,
)
from simo_lightning.callbacks.checkpoints import mismatch_in_one_line
from simo_lightning.callbacks.evaluation import EvaluationCallback
from simo_lightning.checkpoints import CONFIG_FILE, adopt_preprocessing, read_checkpoint
from simo_lightning.commands import COMMANDS, command_parser, run_command
from simo_lightning.lightning_private import FunctionCLI
from simo_lightning.loggers import RunConfigWriter, RunCSVLogger
from simo_lightning.parser import SimoParser, user_error
from simo_lightning.report import write_report
from simo_lightning.run_folder import (
    Start,
    claim_run_folder,
    forget_run_folder,
    in_job,
    inherited_run_folder,
    make_writable,
    missing_folders,
    newest_run,
    remove_failed_start,
    run_folder_of,
    use_run_folder,
)
from simo_lightning.tensor_files import is_sharded, read_sharded, restore_former

# Callbacks that a config can set, or switch off with null.
CALLBACKS: dict[str, type[pl.Callback]] = {
    "best": BestCheckpoint,
    "last": LastCheckpoint,
    "knn": OnlineKNN,
    "retrieval": RetrievalMonitor,
    "unknown": UnknownMonitor,
    "probe": OnlineProbe,
    "geometry": GeometryMonitor,
    "alarm": CollapseAlarm,
    "plots": EmbeddingPlots,
    "projector": EmbeddingProjector,
}


class SimoCLI(FunctionCLI):
    """LightningCLI with this package's callbacks, one folder per run and a summary at the end.

    A run's folder holds config.yaml, metrics.csv, TensorBoard events, checkpoints/ (best, last), plots/ and starts/.
    """

    run_dir: Path

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_new = False  # whether this start created the run's folder
        self._missing: list[Path] = []  # folders that did not exist before it
        self._resumed_step = 0
        self._class_table = ClassTable()
        with tempfile.TemporaryDirectory(prefix="simo_") as self._scratch:  # for a trial (fast_dev_run)
            try:
                super().__init__(*args, **kwargs)
            except BaseException:
                trainer: pl.Trainer | None = getattr(self, "trainer", None)
                if self._is_new and (trainer is None or trainer.global_step == 0):
                    remove_failed_start(self.run_dir, self._missing)
                raise

    @staticmethod
    def functions() -> dict[str, tuple[Callable[..., Any], set[str]]]:
        """``plot``."""
        return {"plot": (write_report, {"trainer", "model", "datamodule", "config_name"})}

    def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, summary in COMMANDS.items():  # for the help and the completion; main runs them
            parser.commands.add_subcommand(name, command_parser(name), help=summary)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run_dir`` and the callbacks that a config can set."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run. Default: runs/<name of the config>/version_N, or job_ID under a scheduler; "
            "for validate, test, predict and plot the folder of the checkpoint.",
        )
        for name, callback in CALLBACKS.items():
            summary = (callback.__doc__ or "").strip().splitlines()[0]
            options = ", ".join(f"--{name}.{option}" for option in inspect.signature(callback).parameters)
            parser.add_argument(
                f"--{name}",
                type=callback | None,
                default={"class_path": f"simo_lightning.callbacks.{callback.__name__}"},
                help=f"{summary} Set its arguments by {options}; null switches it off.",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then find the run's folder and the checkpoint, before the data are read."""
        super().parse_arguments(parser, args)
        command: str = self.config.subcommand
        config = self.config[command]
        _expand_home(config)
        if config.get("weights_only", False) is None:  # Lightning would open a checkpoint with any object in it
            config.weights_only = True
        _check_settings(command, config)
        own_run = self._run_of_config()
        if command in ("validate", "test", "predict") and own_run is not None and config.ckpt_path is None:
            config.ckpt_path = "best" if (own_run / "checkpoints" / "best.ckpt").exists() else "last"
        source, self.run_dir = self._find_run_folder(config, own_run)
        config.ckpt_path = self._find_checkpoint(config.ckpt_path, source)
        config.run_dir = str(self.run_dir)
        if command != "fit":
            self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer with the loggers of the config, TensorBoard by default; a fit also writes metrics.csv."""
        config, folder = self.of_command("trainer"), str(self.run_dir)
        fitting = self.subcommand == "fit"
        loggers = config.logger
        if config.barebones or self.subcommand == "plot":
            loggers = False
        elif loggers in (None, True):
            loggers = TensorBoardLogger(folder, name="", version="") if fitting else False
        if loggers and fitting:  # metrics.csv always, unless the config says false: no logger
            loggers = [*(loggers if isinstance(loggers, list) else [loggers]), RunCSVLogger(folder)]
        kwargs |= {"default_root_dir": folder, "logger": loggers, "callbacks": self._callbacks(config)}
        if config.barebones:
            kwargs["log_every_n_steps"] = None  # Lightning refuses a number, which most configs have
        elif not any(isinstance(callback, Checkpoint) for callback in kwargs["callbacks"]):
            kwargs["enable_checkpointing"] = False  # Lightning would add a callback of its own
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Make the parts; the module adds no callbacks, so that those of the config are the only ones."""
        super().instantiate_classes()
        if hasattr(self.model, "default_callbacks"):
            self.model.default_callbacks = False

    def _callbacks(self, config: Any) -> list[pl.Callback]:
        """The config's callbacks and those of every run; in a barebones run the config's list alone."""
        own = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [callback for callback in own if callback is not None]
        if config.barebones:
            self._note("barebones: no checkpoints, metrics or pictures are written, and the run cannot be resumed")
            return callbacks
        if config.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=10))  # Lightning's own redraws at every step
        off = {"best", "last"} if config.enable_checkpointing is False else set()
        named = {name: None if name in off else self.of_command(name) for name in CALLBACKS}
        for name, callback in named.items():
            if isinstance(callback, EvaluationCallback) and self._is_default(name):
                callback.required = False  # the module may be any, such as one without embeddings
        if named["last"] is None:
            why = "--last null" if not off else "--trainer.enable_checkpointing false"
            self._note(f"{why}: no last.ckpt is written, so a run that ends early cannot be resumed")
        callbacks += [callback for callback in named.values() if callback is not None]
        if config.log_every_n_steps is None:
            callbacks.append(_LogEveryEpoch())
        if self.subcommand in ("validate", "test"):
            callbacks.append(self._class_table)
        return [*callbacks, GracefulShutdown(save=named["last"] is not None), ImagesPerSecond(), EmbeddingWriter()]

    def _is_default(self, name: str) -> bool:
        """Whether the config sets none of a callback's arguments."""
        given = self.config[self.config.subcommand][name].get("init_args") or {}
        parameters = inspect.signature(CALLBACKS[name]).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        # a tuple is a list in a config
        return all(value in (defaults[argument], _as_list(defaults[argument])) for argument, value in given.items())

    def _note(self, line: str) -> None:
        if self.subcommand == "fit":
            _print(line)

    def _run_subcommand(self, subcommand: str) -> None:
        path = self.config[subcommand].ckpt_path
        with mismatch_in_one_line(path):
            if path is not None and Path(path).exists():  # so that the data are read at once as the model requires
                adopt_preprocessing(self.model, path)
            super()._run_subcommand(subcommand)

    def plot(self, **arguments: Any) -> None:
        """Write the report and print its path."""
        page = write_report(self.trainer, config_name=self._config_name(), **arguments)
        _print("", f"report      {page}")

    def after_fit(self) -> None:
        """Print the metrics and the paths of the checkpoints and pictures."""
        if self._resumed_step and self.trainer.global_step == self._resumed_step:
            _print("", f"nothing was trained: the run was already complete at step {self._resumed_step}")
        lines = [f"{name:<28}{float(value):>12.4g}" for name, value in sorted(self.trainer.callback_metrics.items())]
        if not self._is_trial():
            names = {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt", "plots": "plots"}
            paths = {name: self.run_dir / path for name, path in names.items()}
            lines += [f"{name:<12}{path}" for name, path in paths.items() if path.exists()]
        _print("", *lines)

    def after_validate(self) -> None:
        """Print the folder of the pictures, and the table of the classes with the worst of them."""
        if self._is_trial():
            return
        lines = self._class_table.summary()
        if (self.run_dir / "plots").exists():
            lines.insert(0, f"plots       {self.run_dir / 'plots'}")
        if lines:
            _print("", *lines)

    after_test = after_validate

    def _is_trial(self) -> bool:
        config = self.config[self.config.subcommand]
        return bool(config.trainer.fast_dev_run) and self.config.subcommand != "plot"

    def _config_file(self) -> Path | None:
        files = [Path(str(path)) for path in self.config[self.config.subcommand].get("config") or []]
        return files[-1] if files else None

    def _run_of_config(self) -> Path | None:
        """The run that the config file belongs to, if it is the config.yaml in a run's folder."""
        file = self._config_file()
        is_of_run = file is not None and file.name == "config.yaml" and (file.parent / "checkpoints").is_dir()
        return file.parent if file is not None and is_of_run else None

    def _config_name(self) -> str:
        """Stem of the config file; for a run's own config, the name of the run."""
        file, run = self._config_file(), self._run_of_config()
        if run is not None:
            run = run.absolute()
            return run.parent.name if re.fullmatch(r"(version|job)_.+", run.name) else run.name
        return file.stem if file is not None else "simo"

    def _given_folder(self, config: Any, own_run: Path | None, root: Path) -> Path | None:
        """The folder that the arguments determine; None for a fit whose folder is chosen below the root."""
        command, asked = self.config.subcommand, config.ckpt_path
        named = asked in ("best", "last")
        folder = None
        if config.run_dir is not None:
            folder = Path(config.run_dir)
        elif asked and not named:
            folder = run_folder_of(Path(asked))
        elif own_run is not None and (command != "fit" or (named and not in_job())):
            folder = own_run
        elif named and (command != "fit" or self._is_trial()):
            folder = newest_run(root, asked)
        return root / command if folder is None and command != "fit" else folder

    def _find_run_folder(self, config: Any, own_run: Path | None) -> tuple[Path, Path]:
        """The folder that "best" and "last" are looked up in, and the one that the command writes to."""
        command, asked = self.config.subcommand, config.ckpt_path
        root = Path(config.trainer.default_root_dir or "", "runs", self._config_name())
        folder = self._given_folder(config, own_run, root)
        inherited = inherited_run_folder()
        if self._is_trial():
            target = use_run_folder(inherited or Path(self._scratch))
            return folder or target, target
        if inherited is not None:
            return inherited, inherited
        self._missing = missing_folders(folder or root)
        if folder is None:
            start = Start.of_this_process(_fingerprint(self._settings()))
            folder, is_new = claim_run_folder(root, start, resume=asked in ("best", "last"))
        elif command == "fit" and asked is None and (folder / "checkpoints").exists():
            raise ValueError(
                f"--run_dir {folder} holds a run already: pass --ckpt_path last to resume it, or another folder"
            )
        else:
            is_new = folder in self._missing
        make_writable(folder)
        self.run_dir, self._is_new = folder, is_new
        if command == "fit":
            use_run_folder(folder)
        return folder, folder

    def _settings(self) -> dict[str, Any]:
        """The configuration, without the run's folder and the checkpoint."""
        config = self.config[self.config.subcommand].clone()
        config.run_dir = config.ckpt_path = None
        config.pop("config", None)
        text = self._subcommand_parsers[self.config.subcommand].dump(config, skip_none=False, format="json")
        settings: dict[str, Any] = json.loads(text)
        return settings

    def _print_changes(self, folder: Path) -> None:
        """Print the settings of a resumed run that differ from those in its config.yaml."""
        file = folder / "config.yaml"
        if not file.is_file():
            return
        try:
            former = dict(_leaves(yaml.safe_load(file.read_text())))
        except (OSError, ValueError, yaml.YAMLError) as error:
            _print(f"{file} cannot be compared with the settings of this start: {' '.join(str(error).split())}")
            return
        now = dict(_leaves(yaml.safe_load(yaml.safe_dump(self._settings()))))
        names = sorted(name for name in former.keys() & now.keys() if former[name] != now[name])
        if names:
            changes = (f"{name} {former[name]} -> {now[name]}" for name in names)
            _print(f"with settings that differ from config.yaml: {', '.join(changes)}")

    def _find_checkpoint(self, asked: str | None, folder: Path) -> str | None:
        """Path of the checkpoint, which must be readable; None if there is none yet."""
        if asked is None:
            return None
        fitting = self.config.subcommand == "fit"
        path = Path(asked)
        if asked in ("best", "last"):
            path = folder / "checkpoints" / f"{asked}.ckpt"
            restore_former(path)
            if not path.exists() and fitting:
                _print(f"no checkpoint at {path} yet: starting from the beginning")
                return None
        if path.is_dir() and (path / CONFIG_FILE).is_file():
            raise ValueError(f"--ckpt_path must be a checkpoint file, got the folder {path} of a shared model")
        # a damaged file is reported now, not after the data are read; `plot` has no weights_only
        weights_only = self.config[self.config.subcommand].get("weights_only")
        if is_sharded(path):
            checkpoint = read_sharded(path, tensors=False)
        else:
            checkpoint = read_checkpoint(path, map_location="cpu", weights_only=weights_only)
        if fitting:
            missing = [name for name in ("loops", "optimizer_states", "lr_schedulers") if name not in checkpoint]
            if missing:
                raise ValueError(
                    f"--ckpt_path {path} must hold the state of a run for fit to resume it, got weights only "
                    f"(no {', '.join(missing)})"
                )
            self._resumed_step = int(checkpoint["global_step"])
            _print(f"resuming from {path}: epoch {checkpoint['epoch']}, step {self._resumed_step}")
            self._print_changes(path.parent.parent)
        return str(path)


def main(args: Any = None) -> None:
    """Run the command.

    Args:
        args: Arguments of the command line; None for sys.argv.

    Raises:
        SystemExit: With 1 after a run that failed or was stopped, 2 after a wrong argument.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        forget_run_folder()
    _filter_messages()
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words and words[0] in COMMANDS:
        return run_command(words[0], words[1:])
    try:
        SimoCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
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
    except Exception as error:
        line = None if os.environ.get("SIMO_TRACEBACK") else user_error(error)
        if line is None:
            raise
        print(f"simo: error: {line} (SIMO_TRACEBACK=1 prints the traceback)", file=sys.stderr)
        raise SystemExit(1) from None


class _LogEveryEpoch(pl.Callback):
    """Log at least once per epoch, where that has fewer batches than Lightning's interval of 50 steps."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if math.isfinite(trainer.num_training_batches):
            steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
            trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, steps))  # type: ignore[attr-defined]


def _check_settings(command: str, config: Any) -> None:
    """Raise ValueError for settings that contradict each other."""
    if command != "fit":
        return
    for name in ("limit_train_batches", "max_epochs", "max_steps"):
        if config.trainer[name] == 0 and config.trainer[name] is not False:
            raise ValueError(f"--trainer.{name} must not be 0, or nothing is trained, got {config.trainer[name]}")
    if config.best is not None and config.trainer.enable_checkpointing is not False and not config.trainer.barebones:
        monitor = config.best.init_args.get("monitor")
        for name, metric in (("knn", "val/knn"), ("retrieval", "val/map_at_r"), ("probe", "val/probe")):
            if config[name] is None and monitor == metric:
                raise ValueError(
                    f"--best monitors {metric}, which --{name} null switches off: pass --best.monitor METRIC "
                    "or --best null"
                )
        if monitor is None and config.knn is None and config.retrieval is None:
            raise ValueError(
                "--best monitors val/knn or val/map_at_r, which --knn null and --retrieval null switch off: pass "
                "--best.monitor METRIC or --best null"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _expand_home(values: Any) -> None:
    """Replace ~ at the start of every path of a config."""
    items = enumerate(values) if isinstance(values, list) else vars(values).items()
    for key, value in list(items):
        if isinstance(value, Namespace | list):
            _expand_home(value)
        elif isinstance(value, str) and re.match(r"~[^/\s]*(/|$)", value):
            values[key] = os.path.expanduser(value)


def _fingerprint(settings: dict[str, Any]) -> str:
    """Hash that identifies a configuration."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with their dotted names."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values


@rank_zero_only
def _print(*lines: str) -> None:
    print(*lines, sep="\n")


def _filter_messages() -> None:
    """Suppress messages of Lightning that do not apply to the command."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # another run_dir for validate or test; and the command logs the last batch of an epoch, see _LogEveryEpoch
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()
