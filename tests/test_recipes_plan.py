import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.recipes.plan import Recipe, Setting, lay_over, read_recipe, read_recipes, read_setting, recipe_names
from benchmarks.recipes.run import make_parts, run
from benchmarks.recipes.store import best_rate, path_of, put_aside, read_results, write_result
from benchmarks.recipes.table import spread, sweep_seed
from tests.recipe_parts import DIGITS, write_yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes"])  # LightningCLI warns of two sources of words


def digits_setting(tmp_path: Path) -> Setting:
    return read_setting(write_yaml(tmp_path / "digits.yaml", DIGITS), None, 1)


def job_of(recipe: Recipe, *overrides: str) -> dict[str, Any]:
    return {"config": recipe.config_of(1e-3, 3), "epochs": 1, "overrides": list(overrides)}


def test_the_issues_recipes_are_there() -> None:
    levels = {f"simo_{level}_{form}" for level in ("group", "class", "centroid", "pair") for form in ("ratio", "log")}
    softmax = {"simo_centroid_softmax", "simo_pair_softmax"}
    baselines = {"supcon", "triplet", "normalized_softmax", "proxy_anchor", "cross_entropy", "simo_paper", "simo2"}
    assert set(recipe_names()) >= levels | softmax | baselines


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_makes_a_loss_that_trains(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name, digits_setting(tmp_path))
    parts = make_parts(job_of(recipe, "--trainer.limit_train_batches=1"))
    labels = torch.arange(40) % 10
    embeddings = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = parts.model.loss(embeddings, labels)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().sum() > 0
    own = list(parts.model.loss.parameters())
    assert bool(own) == (name in ("cross_entropy", "normalized_softmax", "proxy_anchor"))
    if own:  # they belong to the module, and so to its optimizer
        before = [parameter.detach().clone() for parameter in own]
        parts.trainer.fit(parts.model, datamodule=parts.datamodule)
        assert all(not torch.equal(parameter, old) for parameter, old in zip(own, before, strict=True))


def test_the_base_of_the_repository_is_that_of_the_config_on_two_cores() -> None:
    known = yaml.safe_load((ROOT / "configs" / "cifar10_cpu.yaml").read_text())
    base = yaml.safe_load((ROOT / "configs" / "recipes" / "base.yaml").read_text())
    assert base["trainer"]["precision"] == known["trainer"]["precision"]
    own = {"encoder": {"embedding_dim": 16}, "data": {"split_seed": 0}}  # what the other leaves to the defaults
    for config in (known, base):
        model = config["model"]["init_args"]
        model.pop("loss", None)  # the recipes'
        for part, more in (("encoder", model["encoder"]), ("data", config["data"])):
            more["init_args"] = {**own[part], **more["init_args"]}
        model["optimizer"].setdefault("init_args", {}).pop("lr", None)  # the command's
    assert base["model"] == known["model"]
    assert base["data"] == known["data"]
    make_parts(job_of(read_recipe("supcon", read_setting(ROOT / "configs" / "recipes" / "base.yaml", None, 5))))


def test_a_run_that_diverges_is_a_result_and_one_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    recipe = read_recipe("cross_entropy", digits_setting(tmp_path))
    whole = {"recipe": recipe.name, "title": "", "digest": "", "setting": "", "rate": 1e-3, "seed": 3}
    result = run({**job_of(recipe), **whole, "config": recipe.config_of(1e30, 3)})
    assert result["metrics"] is None
    assert result["error"].startswith("diverged: ")
    with pytest.raises(ValueError, match="must have a validation split"):
        run({**job_of(recipe, "--data.val_fraction", "0", "--trainer.limit_train_batches=1"), **whole})


def test_recipes_start_from_the_same_encoder(tmp_path: Path) -> None:
    setting = digits_setting(tmp_path)
    states = [
        make_parts(job_of(recipe)).model.encoder.state_dict()
        for recipe in read_recipes(["simo_pair_log", "cross_entropy", "proxy_anchor"], setting)
    ]
    for state in states[1:]:
        for name, weight in states[0].items():
            assert torch.equal(weight, state[name]), name


def test_a_digest_tells_configs_apart_but_not_folders(tmp_path: Path) -> None:
    setting = digits_setting(tmp_path)
    recipe = read_recipe("simo_pair_log", setting)
    moved = setting._replace(base=lay_over(setting.base, {"data": {"init_args": {"data_dir": "elsewhere"}}}))
    assert read_recipe("simo_pair_log", moved).digest == recipe.digest
    assert moved.digest == setting.digest
    for other in (setting._replace(epochs=2), setting._replace(overrides=("--model.encoder.width", "1"))):
        assert read_recipe("simo_pair_log", other).digest != recipe.digest
        assert other.digest != setting.digest
    assert read_recipe("simo_pair_log", setting._replace(rates=(1.0,))).digest == recipe.digest


def test_the_best_rate_is_of_the_sweeps_seed_the_lower_of_equals_and_none_that_diverged() -> None:
    def run(rate: float, seed: int, knn: float | None) -> dict[str, Any]:
        return {"rate": rate, "seed": seed, "metrics": None if knn is None else {"val": {"knn20": knn}}}

    runs = [run(1.0, 0, 0.5), run(2.0, 0, 0.75), run(4.0, 0, 0.75), run(8.0, 0, None), run(1.0, 1, 0.99)]
    assert best_rate(runs, 0) == 2.0
    assert best_rate([run(8.0, 0, None)], 0) is None
    assert best_rate([], 0) is None
    assert sweep_seed(runs) == 0
    assert sweep_seed([run(1.0, 3, 0.5), run(1.0, 2, 0.5), run(2.0, 3, 0.5)]) == 3


def test_undefined_numbers_are_null_in_the_file_and_unfinished_files_are_not_read(tmp_path: Path) -> None:
    path = path_of(tmp_path, "a", 5, 4e-3, 1)
    assert path.name == "a-5e-lr0.004-seed1.json"
    write_result(path, {"digest": "x", "value": float("nan"), "more": [float("inf"), 1.5]})
    path.with_name(f".{path.name}.unfinished").write_text("{")
    assert read_results(tmp_path) == [{"digest": "x", "value": None, "more": [None, 1.5]}]
    recipe = Recipe("a", "A", (4e-3,), {}, "y")
    assert put_aside(tmp_path, recipe, 1) == []
    assert [moved.name for moved in put_aside(tmp_path, recipe, 5)] == ["a-5e-lr0.004-seed1-x.json"]
    assert read_results(tmp_path) == []


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 6.0], 3) == "3.000 ± 2.646"
