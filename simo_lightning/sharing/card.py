"""The model card, made from a module and its run."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simo_lightning.extras import import_extra
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.losses import SimOLoss

TEMPLATE = Path(__file__).parent / "model_card.md"
TAGS = ["image-embeddings", "contrastive-learning", "metric-learning", "simo-loss", "pytorch-lightning"]
TAGS += ["model_hub_mixin"]  # by which the Hub knows models that its library uploads
MOST_CLASSES = 200  # that the card lists; config.json has all
# Metrics that answer first how good the embeddings are, with their meaning; those of the geometry declare theirs.
HEADLINE = {
    "knn": "share of images that a vote of the nearest training images classifies rightly",
    "nearest_class_mean": "share of images whose nearest class mean is that of their class",
    "recall_at_1": "share of images whose nearest other image is of their class",
    "map_at_r": "mean average precision among the R nearest, R the number of other images of the class",
    "class_cosine": "mean absolute cosine between the means of two classes; 0 if all are orthogonal",
}
# Settings of a run that say where it ran, not how.
_OF_THE_MACHINE = {"run_dir", "ckpt_path", "logger", "default_root_dir", "weights_only"}


@dataclass
class CardFields:
    """What a model card says beyond what the module tells of itself.

    Args:
        run_dir: Folder of the run, for the metrics (metrics.csv, at the step of the weights), the data and the recipe
            (config.yaml). Of the recipe's absolute paths the last part is kept, loggers are left out.
        license: Licence of the model as the Hub abbreviates it, such as "apache-2.0", "cc-by-nc-4.0" or "other".
        license_name: With license "other", its name.
        license_link: With license "other", its address or file.
        data: What the model was trained on, in words, such as how many images.
        datasets: Names of the training data on the Hub.
        metrics: By their logged name, such as ``trainer.callback_metrics``; added to those of the run.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the licence is not abbreviated as the Hub does, or its name or link is given without "other".
    """

    run_dir: str | Path | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    data: str | None = None
    datasets: Sequence[str] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.run_dir is not None and not Path(self.run_dir).is_dir():
            raise FileNotFoundError(f"run_dir must be the folder of a run, got {str(self.run_dir)!r}")
        if self.license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", self.license):
            raise ValueError(
                "license must be abbreviated as on the Hub, such as apache-2.0, mit, cc-by-nc-4.0 or other, got "
                f"{self.license!r}"
            )
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError(f"license_name and license_link are for license 'other', got {self.license!r}")
        if isinstance(self.datasets, str):
            raise ValueError(f"datasets must be a list of names, got the string {self.datasets!r}")


def model_card(module: Any, config: Mapping[str, Any], fields: CardFields, repo_id: str, step: int | None) -> Any:
    """The model card of a module.

    Args:
        module: A SimOModule.
        config: Content of its config.json.
        fields: What else the card says.
        repo_id: Name of the model, as the code in the card loads it.
        step: Optimizer steps of the weights, which choose the row of the run's metrics.csv; None: the last row.

    Returns:
        A ``huggingface_hub.ModelCard``.
    """
    hub = import_extra("huggingface_hub")
    run = None if fields.run_dir is None else Path(fields.run_dir)
    settings = _settings(run)
    metrics = {} if run is None else run_metrics(run / "metrics.csv", step)
    metrics |= {name: float(value) for name, value in fields.metrics.items() if name.startswith(("val/", "test/"))}
    data = settings.get("data") or {}
    data_name, arguments = str(data.get("class_path", "")).rpartition(".")[2], data.get("init_args") or {}
    source = next((arguments[key] for key in ("path", "manifest", "data_dir") if arguments.get(key)), None)
    name = repo_id.rpartition("/")[2]
    classes, preprocessing = config["classes"] or [], config["preprocessing"] or {}
    has_means = getattr(getattr(module, "classes", None), "means", None) is not None
    card_data = hub.ModelCardData(
        model_name=name if metrics else None,
        library_name="simo_lightning",
        pipeline_tag="image-feature-extraction",
        tags=TAGS,
        license=fields.license,
        license_name=fields.license_name,
        license_link=fields.license_link,
        datasets=list(fields.datasets) or None,
        eval_results=_eval_results(hub, metrics, [*fields.datasets, data_name, "unknown"]) or None,
    )
    return hub.ModelCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        from_hub="/" in repo_id,
        config=config,
        preprocessing=preprocessing,
        size=_size(preprocessing.get("image_size")),
        parameters=f"{sum(parameter.numel() for parameter in module.encoder.parameters()):,}",
        backbone=_backbone(config),
        classes=[_code(each) for each in classes[:MOST_CLASSES]],
        number_of_classes=f"{len(classes):,}",
        more_classes=f"{len(classes) - MOST_CLASSES:,}" if len(classes) > MOST_CLASSES else "",
        has_means=has_means,
        loss="SimO loss (arXiv:2410.05233)" if isinstance(module.loss, SimOLoss) else f"`{type(module.loss).__name__}`",
        is_simo=isinstance(module.loss, SimOLoss),
        data_text=fields.data,
        data_name=data_name,
        data_source=_code(source) if isinstance(source, str) else "",
        headline=[row for row in _rows(metrics) if row[1] in HEADLINE],
        metrics=[row for row in _rows(metrics) if row[1] not in HEADLINE],
        recipe=_yaml(settings) if settings else "",
        step=f"{step:,}" if step else "",
    )


def run_metrics(path: Path, step: int | None = None) -> dict[str, float]:
    """The metrics of validation and test of a run.

    Args:
        path: Its metrics.csv.
        step: Number of steps of the weights; None: the last row.

    Returns:
        By their logged name; the last value up to that step. Empty if there is no such file.
    """
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if step is not None and int(float(row.get("step") or 0)) >= step:
                continue
            values = {name: value for name, value in row.items() if name and name.startswith(("val/", "test/"))}
            found |= {name: float(value) for name, value in values.items() if value}
    return found


def _rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Split, name, value and meaning, those of the headline first."""
    meanings = {name: metric.meaning for name, metric in GEOMETRY.items()} | HEADLINE
    order = {name: place for place, name in enumerate(HEADLINE)}
    rows = []
    for logged, value in metrics.items():
        split, _, name = logged.partition("/")
        rows.append((split, name, f"{value:.4g}", meanings.get(name, "")))
    return sorted(rows, key=lambda row: (row[0], order.get(row[1], len(order)), row[1]))


def _eval_results(hub: Any, metrics: Mapping[str, float], data_names: Sequence[str]) -> list[Any]:
    """The headline as the Hub's machine-readable results."""
    data = next(name for name in data_names if name)
    found = []
    for split, name, _, meaning in _rows(metrics):
        value = metrics[f"{split}/{name}"]
        if name in HEADLINE and math.isfinite(value):
            found.append(
                hub.EvalResult(
                    task_type="image-feature-extraction",
                    dataset_type=data,
                    dataset_name=data,
                    dataset_split={"val": "validation"}.get(split, split),
                    metric_type=name,
                    metric_name=f"{name} ({meaning})",
                    metric_value=round(value, 6),
                )
            )
    return found


def _settings(run: Path | None) -> dict[str, Any]:
    """The config of a run without what says where it ran."""
    if run is None or not (run / "config.yaml").is_file():
        return {}
    found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return _without_the_machine(found) if isinstance(found, dict) else {}


def _without_the_machine(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_the_machine(each) for key, each in value.items() if key not in _OF_THE_MACHINE}
    if isinstance(value, list):
        return [_without_the_machine(each) for each in value]
    if isinstance(value, str) and re.match(r"/|~|\w:[\\/]", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _backbone(config: Mapping[str, Any]) -> str:
    encoder = config["init_args"].get("encoder")
    arguments = encoder.get("init_args") if isinstance(encoder, dict) else None
    found = (arguments or {}).get("backbone")
    return found if isinstance(found, str) else ""


def _size(image_size: Any) -> str:
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    return "" if height is None else f"{height}, {width}"


def _code(text: str) -> str:
    """Text as it is in Markdown: between backticks, of which it has one less in a row."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{' '.join(text.split()) or ' '}{space}{ticks}"


def _yaml(value: Any) -> str:
    """A fenced block that nothing in it can end."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"
