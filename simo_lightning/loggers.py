"""The metrics.csv and config.yaml of a run, and figures in the loggers that support them."""

import io
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

from simo_lightning.lightning_private import AppendingCSVLogger


class RunCSVLogger(AppendingCSVLogger):
    """Lightning's CSV logger, which appends to the file of a resumed run.

    An unfinished last row, as a killed process leaves it, is removed.

    Args:
        save_dir: The run's folder, which will contain ``metrics.csv``.
        flush_logs_every_n_steps: Largest number of rows in memory, which ``kill -9`` loses.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)


class RunConfigWriter(SaveConfigCallback):
    """Writes config.yaml into the run's folder; Lightning's own writes into the first logger's, such as ``mlruns``.

    Requires ``save_config_kwargs={"save_to_log_dir": False}``.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that all processes use one folder, then write."""
        folder = str(trainer.default_root_dir)
        first = trainer.strategy.broadcast(folder)
        if folder != first:
            raise RuntimeError(
                f"all processes must use one folder, got {first} in process 0 and {folder} in process "
                f"{trainer.global_rank}: pass --run_dir"
            )
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the settings without the folder and the checkpoint of this start; replaces an older file."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.run_dir = config.ckpt_path = None
        self.parser.save(config, str(folder / self.config_filename), skip_none=False, overwrite=True)


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Log a figure to TensorBoard, Weights & Biases or MLflow; other loggers are ignored.

    Call it on the process where ``trainer.is_global_zero``. MLflow stores a time-stepped image, which its page shows
    along training.

    Args:
        logger: One of ``trainer.loggers``.
        name: Such as "val/scatter"; MLflow accepts letters, digits, spaces and ``_-./`` only.
        figure: Drawn at its own resolution.
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
