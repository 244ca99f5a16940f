"""The table of experiments, ``experiments.yaml``, and the CSV files of its results."""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE, SHIPPED = ROOT / "benchmarks" / "experiments.yaml", ROOT / "benchmarks" / "results"
PROTOCOL = 3  # raise it when the evaluation changes what a number means: all runs are then made again
_TEXT = ("name", "words", "config", "checksum", "error", "commit", "class", "variant", "course")

Config = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A row of the table, as its header describes it; ``words`` are further words of the ``simo`` command."""

    study: str
    name: str
    title: str
    model: Config  # the three parts of a config of the simo command, without learning rate and seeds
    data: Config
    trainer: Config
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int | None = None
    steps: int | None = None
    mlp: bool = False
    snapshots: int = 0
    bank_size: int = 5000
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"{self.study}/{self.name}"
        if (self.epochs is None) == (self.steps is None) or (self.epochs or self.steps or 0) < 1:
            raise ValueError(f"{where} must have epochs or steps of at least 1, got {self.epochs} and {self.steps}")
        if not self.seeds or not self.rates or not all(0 < rate < float("inf") for rate in self.rates):
            raise ValueError(f"{where} must have seeds and positive rates, got {list(self.seeds)}, {list(self.rates)}")
        if self.snapshots < 0 or self.snapshots == 1:
            raise ValueError(f"snapshots of {where} must be 0 or at least 2, got {self.snapshots}")

    def job(self, rate: float, seed: int) -> Config:
        """Input of one run's process, for JSON; ``config`` in its row is a digest of everything that determines a
        result except rate, seed and the images' folder.
        """
        length = {"max_epochs": self.epochs} if self.steps is None else {"max_epochs": -1, "max_steps": self.steps}
        parts = {"model": self.model, "data": self.data, "trainer": {**self.trainer, **length}}
        options = {"mlp": self.mlp, "snapshots": self.snapshots, "bank_size": self.bank_size}
        words = [word for word in self.words if not word.startswith("--data.data_dir")]
        content = json.dumps([PROTOCOL, parts, options, words], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        row = {"name": self.name, "epochs": self.epochs, "steps": self.steps, "rate": rate, "seed": seed}
        row |= {"config": digest, "words": " ".join(words)}
        own = {"seed_everything": seed, "data": {"init_args": {"seed": seed}}}
        own["model"] = {"init_args": {"optimizer": {"init_args": {"lr": rate}}}}
        return {"row": row, "config": merge(parts, own), "words": list(self.words), **options}


def merge(base: Config, over: Config) -> Config:
    """A config over another: dictionaries merge, but one with a class_path replaces the base's whole.

    Example:
        >>> merge({"a": {"b": 1, "c": 2}, "d": {"class_path": "X"}}, {"a": {"b": 3}, "d": {"class_path": "Y"}})
        {'a': {'b': 3, 'c': 2}, 'd': {'class_path': 'Y'}}
    """
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        if isinstance(value, dict) and isinstance(known, dict) and "class_path" not in value:
            value = merge(known, value)
        merged[key] = value
    return merged


def read_table(path: Path = TABLE) -> Config:
    """Studies by name."""
    if not path.is_file():
        raise ValueError(f"no table of experiments at {path}")
    table = yaml.safe_load(path.read_text())
    return {name: {"base": table["base"], "defaults": {}, **study} for name, study in table["studies"].items()}


def timings() -> Config:
    """Losses and shapes of the timings of the loss, by name."""
    found: Config = yaml.safe_load(TABLE.read_text())["timings"]
    return found


def experiments(study: str, names: Sequence[str] | None = None, path: Path = TABLE, **given: Any) -> list[Experiment]:
    """The rows of a study, or those in ``names``; ``given`` are fields of :class:`Experiment` instead of the table's.

    Raises:
        ValueError: If there is no such study or row, a key is unknown or a value is out of range.
    """
    studies = read_table(path)
    if study not in studies:
        raise ValueError(f"study must be one of {', '.join(studies)}, got {study}")
    rows, found = studies[study]["rows"], []
    given = {key: value for key, value in given.items() if value is not None}
    given |= {"steps": None} if "epochs" in given else {}
    for name in dict.fromkeys(names or rows):
        if name not in rows:
            raise ValueError(f"names of {study} must be among {', '.join(rows)}, got {name}")
        row, parts = merge(studies[study]["defaults"], rows[name]), {}
        for file in filter(None, [studies[study]["base"], row.pop("config", None)]):
            config = path.parent / file
            config = yaml.safe_load((config if config.is_file() else ROOT / file).read_text())
            parts = merge(parts, {key: config[key] for key in ("model", "data", "trainer") if key in config})
        model = {"loss": row.pop("loss", {}), "encoder": {"init_args": row.pop("encoder", {})}}
        if "simo" in row:
            model["loss"] = {"class_path": "simo_lightning.SimOLoss", "init_args": row.pop("simo")}
        own = {"data": {"init_args": row.pop("data", {})}, "trainer": row.pop("trainer", {})}
        parts = merge(parts, {"model": {"init_args": {key: part for key, part in model.items() if part}}, **own})
        for key in ("max_epochs", "max_steps"):  # the row's length replaces the config's
            parts["trainer"].pop(key, None)
        unknown = sorted(set(row) - {field.name for field in fields(Experiment)})
        if unknown:
            raise ValueError(f"{study}/{name} has unknown keys {', '.join(unknown)}")
        row |= {"rates": tuple(map(float, row["rates"])), "seeds": tuple(row["seeds"])}
        found.append(Experiment(study, name, **{"title": name, **row, **given}, **parts))
    return found


def read(path: Path) -> pd.DataFrame:
    """A CSV of results; an empty frame where there is none."""
    if not path.is_file():
        return pd.DataFrame(columns=["name", "epochs", "steps", "rate", "seed", "config", "words", "error"])
    frame = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False, na_values=[""])
    whole = [column for column in ("epochs", "steps") if column in frame]
    return frame.astype(dict.fromkeys(whole, "Int64")).fillna({"words": ""})


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a CSV, which is always whole, the old one or the new; commands that share it wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = [read(path)] if path.is_file() else []
        with unfinished.open("w") as file:
            pd.concat([*known, pd.DataFrame(rows)], ignore_index=True).to_csv(file, index=False)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
