"""What a run records: metrics.csv, config.yaml, and figures in the loggers that take them."""

import io
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

from simo_lightning.lightning_private import AppendingCSVLogger


class RunCSVLogger(AppendingCSVLogger):
    """Lightning's CSV logger, but a run that goes on in its folder keeps its rows.

    A row that a killed process left unfinished is removed.

    Args:
        save_dir: The run's folder; ``metrics.csv`` lies directly in it.
        flush_logs_every_n_steps: Rows held back at most, so lost by kill -9.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)


class RunConfigWriter(SaveConfigCallback):
    """Writes config.yaml into the run's folder; Lightning's own would follow the first logger, to ``mlruns`` say.

    Give the command line ``save_config_kwargs={"save_to_log_dir": False}`` with it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that all processes work in one folder, then write."""
        folder = str(trainer.default_root_dir)
        of_first = trainer.strategy.broadcast(folder)
        if folder != of_first:
            raise RuntimeError(
                f"all processes must work in one folder, got {of_first} in the first and {folder} in process "
                f"{trainer.global_rank}: give --run_dir"
            )
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the settings, without the folder and the checkpoint of this start, over an older file."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.run_dir = config.ckpt_path = None
        self.parser.save(config, str(folder / self.config_filename), skip_none=False, overwrite=True)


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Log a figure to TensorBoard, Weights & Biases or MLflow; other loggers are left alone.

    Call it where ``trainer.is_global_zero``. MLflow gets it as a time-stepped image, which its page shows along
    training.

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
