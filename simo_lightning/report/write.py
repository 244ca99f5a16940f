"""The report of a checkpoint: embed a split, compute its metrics, draw the pictures and write the page."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from simo_lightning.callbacks import EmbeddingPlots, OnlineKNN, RetrievalMonitor
from simo_lightning.callbacks.checkpoints import mismatch_in_one_line
from simo_lightning.callbacks.evaluation import EvaluationCallback
from simo_lightning.checkpoints import TrainingClasses, read_checkpoint
from simo_lightning.extras import missing_extra
from simo_lightning.functional.geometry import not_computed
from simo_lightning.functional.moments import SECOND_BUDGET_MB, class_moments
from simo_lightning.plotting import Projection, load_snapshots
from simo_lightning.report.collector import EmbeddingCollector
from simo_lightning.report.contents import make_contents
from simo_lightning.report.curves import read_curves
from simo_lightning.report.file_names import file_names
from simo_lightning.report.page import write_page
from simo_lightning.report.pictures import EmbeddedImages
from simo_lightning.report.record import Record, save_record
from simo_lightning.report.rows import metric_rows
from simo_lightning.version import __version__

CallbackT = TypeVar("CallbackT", bound=pl.Callback)
_SCORES = re.compile(r"knn|(recall_at_\d+|r_precision|map_at_r)(_macro)?")
_SPLITS = {"val": "validation", "test": "test"}


def write_report(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    ckpt_path: str | None = "best",
    out: str | None = None,
    stage: Literal["val", "test"] = "val",
    projections: list[Projection] = ["pca", "tsne"],  # noqa: B006  # never changed
    queries: int | list[int] = 8,
    max_points: int = 2000,
    config_name: str | None = None,
    second_budget_mb: float = SECOND_BUDGET_MB,
) -> Path:
    """Draw the embeddings of a split into one page, with the metrics.

    With the extra report, the page has an interactive map. The pictures are written beside it as PNG and SVG, and the
    numbers as report.json and report.npz, which ``simo compare`` reads.

    Runs the validation or test loop once, with any module whose steps return ``embeddings`` and ``labels``; kNN
    requires a bank, as :class:`~simo_lightning.callbacks.OnlineKNN` does. The trainer's own callbacks that evaluate
    embeddings are not called.

    Args:
        trainer: Runs the loop; its ``default_root_dir`` is the folder of the run.
        model: The weights of the checkpoint, if there is one, are loaded into it.
        datamodule: Its ``class_names`` are used if it has them, otherwise class indices.
        ckpt_path: Checkpoint: "best" or "last" of the run, or a file.
        out: Folder of index.html and the pictures. Default: plots/report in the folder of the run.
        stage: Split: "val" or "test".
        projections: Maps of the embeddings: pca, tsne and, with the extra umap, umap.
        queries: Indices of images of the split whose nearest neighbours are shown, such as [3,17], or their number,
            spread over the classes; 0 for none.
        max_points: Points of a map, stratified by class.
        config_name: Name of the run on the page.
        second_budget_mb: Largest size in MB of the second moments of each class. Where C classes in D dimensions take
            more, 8 C D^2 bytes, the metrics that require them are not computed, and the page says so.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If an argument is out of its range, the checkpoint is damaged or does not fit the module, or the
            steps return no embeddings.
        PermissionError: If the folder cannot be written.
    """
    _check(stage, projections, max_points, second_budget_mb)
    run = Path(trainer.default_root_dir)
    if ckpt_path in ("best", "last"):
        ckpt_path = str(run / "checkpoints" / f"{ckpt_path}.ckpt")
    details = {"Config": config_name or type(model).__name__, "Run": _short(run)}
    details["Checkpoint"] = "none: current weights" if ckpt_path is None else _describe(Path(ckpt_path))
    folder = _make_folder(run / "plots" / "report" if out is None else Path(out))
    snapshots = load_snapshots(run / _find(trainer, EmbeddingPlots()).dirname / "snapshots")
    data, values, k = _embed(trainer, model, datamodule, ckpt_path, stage)
    if trainer.is_global_zero:
        names = _class_names(datamodule, data.labels)
        details["Data"] = f"{type(datamodule or model).__name__}, {_SPLITS[stage]} split"
        details["Images"] = f"{len(data.labels):,} of {len(data.labels.unique())} classes"
        details["Embeddings"] = f"{data.embeddings.shape[1]} dimensions"
        details["Made by"] = f"simo_lightning {__version__}"
        moments = class_moments(data.embeddings, data.labels, len(names), second_budget_mb=second_budget_mb)
        left_out = not_computed(moments, second_budget_mb)
        if left_out:
            rank_zero_info(left_out)
        rows = metric_rows(moments, values.pop("knn", math.nan), k, values)
        contents = make_contents(
            folder,
            data,
            moments,
            names,
            rows,
            snapshots,
            projections,
            queries,
            max_points,
            read_curves(run),
            _file_names(trainer, stage, len(data.labels)),
            _training_means(model, names),
            left_out,
        )
        title = f"{details['Config']}: embeddings of the {_SPLITS[stage]} split"
        write_page(folder, title, details, contents)
        labels = data.labels[contents.map_index]
        points = {str(name): each for name, each in contents.map_points.items()}
        record = Record(
            details["Config"], details, stage, names, contents.headline, rows, moments.means, points, labels
        )
        save_record(folder, record)
    trainer.strategy.barrier("report")
    return folder / "index.html"


def _check(stage: str, projections: list[Projection], max_points: int, second_budget_mb: float) -> None:
    if stage not in _SPLITS:
        raise ValueError(f"stage must be 'val' or 'test', got {stage!r}")
    for projection in projections:
        if projection not in get_args(Projection):
            raise ValueError(f"projections must be among {', '.join(get_args(Projection))}, got {projection!r}")
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
    if not second_budget_mb >= 0:
        raise ValueError(f"second_budget_mb must be at least 0, got {second_budget_mb}")
    if "umap" in projections and find_spec("umap") is None:  # refused before the data are embedded
        raise ValueError(missing_extra("No module named 'umap'"))


def _embed(
    trainer: pl.Trainer, model: pl.LightningModule, datamodule: Any, ckpt_path: str | None, stage: str
) -> tuple[EmbeddedImages, dict[str, float], int | None]:
    """The split's embeddings, the accuracy of kNN and the retrieval scores on it, and kNN's k."""
    collector, knn = EmbeddingCollector(), _find(trainer, OnlineKNN())
    retrieval = RetrievalMonitor()
    retrieval.required = False  # what is missing is reported below
    callbacks: list[EvaluationCallback] = [collector, _find(trainer, retrieval)]
    if knn.bank is not None or callable(getattr(datamodule, "bank_dataloader", None)):
        callbacks.append(knn)
    run = trainer.validate if stage == "val" else trainer.test
    with _evaluation_callbacks(trainer, model, callbacks), mismatch_in_one_line(ckpt_path):
        run(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
    if collector.result is None:
        raise ValueError(
            f"{type(model).__name__}'s {_SPLITS[stage]} steps must return a dictionary with embeddings and labels for "
            "each batch of the split, got no embeddings"
        )
    logged = {name.removeprefix(f"{stage}/"): float(value) for name, value in trainer.callback_metrics.items()}
    return collector.result, {name: value for name, value in logged.items() if _SCORES.fullmatch(name)}, knn.k


@contextmanager
def _evaluation_callbacks(trainer: Any, model: Any, evaluation: list[EvaluationCallback]) -> Iterator[None]:
    """The trainer with these callbacks instead of its own that evaluate embeddings or write checkpoints."""
    callbacks, defaults = trainer.callbacks, getattr(model, "default_callbacks", False)
    if defaults:
        model.default_callbacks = False
    trainer.callbacks = [
        each for each in callbacks if not isinstance(each, EvaluationCallback | Checkpoint)
    ] + evaluation
    try:
        with warnings.catch_warnings():
            # the removed callbacks may have a state in the checkpoint, which Lightning would warn about
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
            yield
    finally:
        trainer.callbacks = callbacks
        if defaults:
            model.default_callbacks = True


def _find(trainer: Any, default: CallbackT) -> CallbackT:
    """The trainer's callback of the class of the default, if it has one."""
    return next((each for each in trainer.callbacks if isinstance(each, type(default))), default)


def _describe(checkpoint: Path) -> str:
    content = read_checkpoint(checkpoint, map_location="cpu")
    epoch, step = (content.get(name, "unknown") for name in ("epoch", "global_step"))
    return f"{checkpoint.name}, epoch {epoch}, step {step}"


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"the report's folder {folder} cannot be created: {error.strerror or error}") from error
    return folder


def _short(folder: Path) -> str:
    """A folder relative to the working directory, or its name if it is elsewhere."""
    absolute, here = folder.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if here in absolute.parents else absolute.name


def _class_names(datamodule: Any, labels: Tensor) -> list[str]:
    names = [str(name) for name in getattr(datamodule, "class_names", None) or []]
    return names + [str(label) for label in range(len(names), int(labels.max()) + 1)]


def _training_means(model: Any, class_names: list[str]) -> Tensor | None:
    """The class means that the checkpoint holds, if it has one for each class."""
    classes = getattr(model, "classes", None)
    if not isinstance(classes, TrainingClasses) or classes.means is None or list(classes.names) != class_names:
        return None
    return None if classes.means.isnan().any() else classes.means.detach().cpu()


def _file_names(trainer: Any, stage: str, count: int) -> list[str] | None:
    loaders = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
    source = getattr(loaders, "dataset", None)
    return None if source is None or len(source) != count else file_names(source, count)
