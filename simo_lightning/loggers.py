"""What a run writes down of itself: metrics.csv, config.yaml, and pictures in whichever logger it has."""

import csv
import io
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from matplotlib.figure import Figure
from PIL import Image


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, but a run that goes on in its folder keeps the rows it has.

    Args:
        save_dir: The run's folder; ``metrics.csv`` lies directly in it.
        flush_logs_every_n_steps: Rows held back at most, so lost by kill -9.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

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
        if path.is_file():  # Lightning deletes it here
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class RunConfigWriter(SaveConfigCallback):
    """Writes config.yaml into the run's folder; Lightning's own would follow the first logger, to ``mlruns`` say.

    Give the command line ``save_config_kwargs={"save_to_log_dir": False}`` with it.
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, over an older one: a run that goes on has one already.

        Args:
            trainer: Its ``default_root_dir`` is the run's folder.
            pl_module: Unused.
            stage: Unused.
        """
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(folder / self.config_filename), skip_none=False, overwrite=True)


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Hand a picture to TensorBoard, Weights & Biases or MLflow; any other logger takes none and is left alone.

    Call it where ``trainer.is_global_zero``. MLflow gets it as a time-stepped image, so that its page can go back and
    forth in training.

    Args:
        logger: One of ``trainer.loggers``.
        name: Such as "val/scatter"; for MLflow letters, digits, spaces and ``_-./`` alone.
        figure: The picture, drawn at its own resolution.
        step: Optimizer steps so far.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> log_figure(CSVLogger("runs"), "val/scatter", Figure(), step=0)
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step)
    elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        logger.experiment.log_image(logger.run_id, Image.open(file), key=name, step=step)
