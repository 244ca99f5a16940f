"""Recipes: YAML files laid over one base config, and the digest that tells whether a run is of that recipe."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "recipes"
BASE = FOLDER / "base.yaml"
RATES = (2e-3, 4e-3, 8e-3)
# Raise when the evaluation changes what a number means: all runs are then made again.
PROTOCOL = 1

_CONFIG = ("trainer", "model", "data")
_OWN = ("title", "rates")
# Keys of a config of the simo command that have nothing to say here.
_OF_SIMO = ("seed_everything", "best", "last", "knn", "probe", "geometry", "alarm", "plots")

Config = dict[str, Any]


class Setting(NamedTuple):
    """What all recipes of one call share.

    Attributes:
        base: Config with the keys trainer, model and data.
        rates: Learning rates of the sweep of a recipe that has none of its own.
        fixed_rates: Whether they stand for those recipes too.
        epochs: Of every run.
        overrides: Words for every run's config, such as ``--model.encoder.width 0.25``.
    """

    base: Config
    rates: tuple[float, ...]
    fixed_rates: bool
    epochs: int
    overrides: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest of all of it but the rates: runs of one table share it."""
        return _digest([PROTOCOL, self.base, self.epochs, self.overrides])


class Recipe(NamedTuple):
    """One row of the table.

    Attributes:
        name: Of its file.
        title: For the table.
        rates: Learning rates of its sweep.
        config: Whole config, without the learning rate and the seeds.
        digest: Of the config, the epochs, the overrides and the protocol.
    """

    name: str
    title: str
    rates: tuple[float, ...]
    config: Config
    digest: str

    def config_of(self, rate: float, seed: int) -> Config:
        """The config of one run.

        Args:
            rate: Learning rate.
            seed: Of model and data.

        Returns:
            Keys seed_everything, trainer, model and data.
        """
        own: Config = {
            "seed_everything": seed,
            "model": {"init_args": {"optimizer": {"init_args": {"lr": rate}}}},
            "data": {"init_args": {"seed": seed}},
        }
        return lay_over(self.config, own)


def lay_over(base: Config, over: Config) -> Config:
    """Merge a config over another.

    Args:
        base: Config; not changed.
        over: Its values win. Dictionaries merge, but one with a class_path replaces the base's whole.

    Returns:
        The merged config.

    Example:
        >>> base = {"a": {"b": 1, "c": 2}, "d": {"class_path": "X", "e": 1}}
        >>> lay_over(base, {"a": {"b": 3}, "d": {"class_path": "Y"}})
        {'a': {'b': 3, 'c': 2}, 'd': {'class_path': 'Y'}}
    """
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        if isinstance(value, dict) and isinstance(known, dict) and "class_path" not in value:
            value = lay_over(known, value)
        merged[key] = value
    return merged


def read_setting(base: Path, rates: Sequence[float] | None, epochs: int, overrides: Sequence[str] = ()) -> Setting:
    """Read the base config.

    Args:
        base: File.
        rates: Learning rates for all recipes; None: each recipe's own, or the base's, or 2e-3, 4e-3 and 8e-3.
        epochs: Of every run, >= 1.
        overrides: Words for every run's config.

    Returns:
        The setting.

    Raises:
        ValueError: If the file has unknown keys, or epochs or a rate is out of range.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    config = _read(base, (*_CONFIG, *_OWN, *_OF_SIMO))
    chosen = _rates(rates if rates is not None else config.get("rates", RATES), base)
    shared = {key: config[key] for key in _CONFIG if key in config}
    return Setting(shared, chosen, rates is not None, epochs, tuple(overrides))


def recipe_names() -> list[str]:
    """Names of the recipes of this repository, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path != BASE)


def read_recipe(name: str, setting: Setting) -> Recipe:
    """Read a recipe and lay it over the base.

    Args:
        name: Of a recipe of this repository, or a file that ends in ``.yaml``.
        setting: With the base.

    Returns:
        The recipe.

    Raises:
        ValueError: If there is none of that name, or it has unknown keys.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file() or path == BASE:
        raise ValueError(f"recipe must be a .yaml file or one of {', '.join(recipe_names())}, got {name}")
    overlay = _read(path, (*_CONFIG, *_OWN))
    rates = setting.rates
    if "rates" in overlay and not setting.fixed_rates:
        rates = _rates(overlay["rates"], path)
    config = lay_over(setting.base, {key: overlay[key] for key in _CONFIG if key in overlay})
    digest = _digest([PROTOCOL, config, setting.epochs, setting.overrides])
    return Recipe(path.stem, str(overlay.get("title", path.stem)), rates, config, digest)


def read_recipes(names: Sequence[str], setting: Setting) -> list[Recipe]:
    """Read several recipes.

    Args:
        names: As for :func:`read_recipe`.
        setting: With the base.

    Returns:
        The recipes, in that order.

    Raises:
        ValueError: As :func:`read_recipe`, or if two have one name: their files would be mixed up.
    """
    recipes = [read_recipe(name, setting) for name in names]
    found = [recipe.name for recipe in recipes]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ValueError(f"recipes must have different names, got {', '.join(twice)} more than once")
    return recipes


def _read(path: Path, known: Sequence[str]) -> Config:
    if not path.is_file():
        raise ValueError(f"no config at {path}")
    config = yaml.safe_load(path.read_text())
    unknown = sorted(set(config) - set(known)) if isinstance(config, dict) else [str(config)[:40]]
    if unknown:
        raise ValueError(f"{path.name} may have the keys {', '.join(known)}, got {', '.join(unknown)}")
    return dict(config)


def _rates(values: Sequence[Any], path: Path) -> tuple[float, ...]:
    rates = tuple(sorted({float(value) for value in values}))  # YAML 1.1 reads 2e-3 as a word
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"rates must be positive numbers, at least one, got {list(values)} for {path.name}")
    return rates


def _digest(value: Any) -> str:
    """Of what decides a result: where the images lie does not."""
    return hashlib.blake2b(json.dumps(_without_data_dir(value), sort_keys=True).encode(), digest_size=8).hexdigest()


def _without_data_dir(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_data_dir(part) for key, part in value.items() if key != "data_dir"}
    return [_without_data_dir(part) for part in value] if isinstance(value, list | tuple) else value
