"""JointLoss and ProjectionHeadLoss against their formulas, in checkpoints, in the command and on two processes."""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from simo_lightning import (
    ClassifierLoss,
    DigitsPairDataModule,
    JointLoss,
    ParameterGroups,
    ProjectionHeadLoss,
    ShardedStrategy,
    SimOLoss,
    SimOModule,
)
from simo_lightning.checkpoints import load_module
from simo_lightning.cli import main
from simo_lightning.testing import check_resume
from tests.checkpoint_parts import Flat, Seen, fit, save, weights
from tests.rank_processes import saved, start_ranks

CONFIGS = Path(__file__).parent.parent / "configs"
LABELS = torch.arange(24) % 4


def draw(rows: int = 24, dim: int = 8) -> Tensor:
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def joint(weight: float = 0.3) -> JointLoss:
    return JointLoss({"simo": SimOLoss(), "classifier": ClassifierLoss(label_smoothing=0.1)}, {"simo": weight})


def projected() -> ProjectionHeadLoss:
    return ProjectionHeadLoss(SimOLoss(), output_dim=6, hidden_dim=12)


def test_a_joint_loss_is_the_weighted_sum_of_its_losses() -> None:
    loss = joint().double()
    loss.configure(4, 8)
    loss.double()
    classifier = loss.losses["classifier"]
    logits = draw() @ classifier.weight.T + classifier.bias
    expected = 0.3 * SimOLoss()(draw(), LABELS) + cross_entropy(logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(loss(draw(), LABELS), expected)
    terms = loss.terms(draw(), LABELS)
    assert list(terms) == ["simo_similar", "simo_dissimilar", "simo_mean", "classifier"]
    torch.testing.assert_close(sum(terms.values()), expected)
    assert JointLoss({"only": SimOLoss()})(draw(), LABELS) == SimOLoss()(draw(), LABELS)


def test_a_projection_head_is_two_layers_between_embeddings_and_loss() -> None:
    loss = projected()
    loss.configure(4, 8)
    loss.double()
    assert loss.head is not None
    first, norm, _, last = loss.head
    assert (first.weight.shape, last.weight.shape) == ((12, 8), (6, 12))
    inside = draw() @ first.weight.T + first.bias
    inside = (inside - inside.mean(0)) / (inside.var(0, unbiased=False) + norm.eps).sqrt()
    inside = (inside * norm.weight + norm.bias).clamp(min=0)
    expected = SimOLoss()(inside @ last.weight.T + last.bias, LABELS)
    torch.testing.assert_close(loss(draw(), LABELS), expected)
    assert list(loss.terms(draw(), LABELS)) == ["similar", "dissimilar", "mean"]
    loss.eval()(draw(1), LABELS[:1])  # by the running statistics, so that one row will do
    inner = ProjectionHeadLoss(ClassifierLoss(), output_dim=3)
    inner.configure(4, 8)
    assert inner.loss.weight.shape == (4, 3)  # type: ignore[union-attr]
    assert list(inner.terms(draw().float(), LABELS)) == ["loss"]


def test_wrong_arguments() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: JointLoss({}), "losses must hold at least one loss, got none"),
        (lambda: JointLoss({"a.b": SimOLoss()}), "names of losses must be identifiers, got 'a.b'"),
        (
            lambda: JointLoss({"a": SimOLoss(), "a_mean": SimOLoss()}),
            "no name of losses may begin with another one and '_', got 'a_mean'",
        ),
        (
            lambda: JointLoss({"pop": SimOLoss()}),
            "no name of losses may be that of an attribute of nn.ModuleDict, got 'pop'",
        ),
        (lambda: JointLoss({"a": SimOLoss()}, {"b": 1.0}), "weights must be of the losses a, got 'b'"),
        (lambda: JointLoss({"a": SimOLoss()}, {"a": -1.0}), "weights must be finite and >= 0, got -1.0 for 'a'"),
        (lambda: JointLoss({"a": SimOLoss()}, {"a": float("nan")}), "weights must be finite and >= 0, got nan for 'a'"),
        (lambda: ProjectionHeadLoss(SimOLoss(), 0), "output_dim must be at least 1, or None, got 0"),
        (lambda: projected()(draw(), LABELS), "embedding_dim of ProjectionHeadLoss must be given, or set by"),
        (lambda: projected().configure(4, None), "embedding_dim of ProjectionHeadLoss must be given, since the enc"),
        (
            lambda: ProjectionHeadLoss(SimOLoss(), embedding_dim=5).configure(4, 8),
            "embedding_dim of ProjectionHeadLoss must be 8, the encoder's embedding_dim, got 5",
        ),
        (
            lambda: ProjectionHeadLoss(SimOLoss(), embedding_dim=5)(draw(), LABELS),
            "embeddings must have 5 dimensions, got 8",
        ),
        (
            lambda: ProjectionHeadLoss(SimOLoss(), embedding_dim=8)(draw(1), LABELS[:1]),
            "embeddings must have at least 2 rows for BatchNorm in training, got 1",
        ),
        (lambda: joint().configure(None, 8), "num_classes of ClassifierLoss must be given, since the data module"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("make", [joint, projected, lambda: JointLoss({"head": projected(), "classifier": joint()})])
def test_a_checkpoint_has_losses_and_heads(make: Any, tmp_path: Path) -> None:
    module = SimOModule(Flat(), make())
    fit(module, tmp_path, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_module(tmp_path / "a.ckpt", trusted=[Flat])
    again = load_module(save(loaded, tmp_path / "b.ckpt"), trusted=[Flat])
    embeddings = draw(dim=4).float()
    for each in (loaded, again):
        assert torch.equal(each.loss.eval()(embeddings, LABELS), module.loss.eval()(embeddings, LABELS))


def test_resume_is_exact() -> None:
    check_resume(
        lambda: SimOModule(
            Flat(), JointLoss({"head": projected(), "other": joint()}), partial(torch.optim.SGD, lr=0.01)
        ),
        lambda: DigitsPairDataModule(samples_per_class=30, views=1),
    )


def test_a_head_has_the_rate_of_the_loss(tmp_path: Path) -> None:
    module = SimOModule(Flat(), projected(), partial(torch.optim.SGD, lr=0.01))
    module.parameter_groups = ParameterGroups(loss_lr_factor=10.0)
    fit(module, tmp_path, max_steps=1)
    optimizer: Any = module.optimizers().optimizer  # type: ignore[union-attr]
    rates = {id(each): round(group["lr"], 6) for group in optimizer.param_groups for each in group["params"]}
    assert {rates[id(each)] for each in module.loss.parameters()} == {0.1}
    assert {rates[id(each)] for each in module.encoder.parameters()} == {0.01}


# ---- two processes


def fit_two_ranks(folder: Path) -> None:
    """Two steps; each rank saves its batches, its losses and the weights before and after."""
    warnings.filterwarnings("ignore")
    made: dict[str, Any] = {"ddp": "ddp", "sharded": ShardedStrategy(process_group_backend="gloo")}
    for name, strategy in made.items():
        pl.seed_everything(0, verbose=False)
        loss = JointLoss({"head": projected(), "other": joint()})
        module = SimOModule(Flat(), loss, partial(torch.optim.SGD, lr=0.01))
        seen = Seen()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[seen],
            limit_val_batches=0, precision="64-true" if name == "ddp" else "32-true",
        )  # fmt: skip
        trainer.fit(module, DigitsPairDataModule(samples_per_class=6))
        assert all(isinstance(each, DTensor) == (name == "sharded") for each in module.loss.parameters())
        content = {"seen": seen.steps, "before": seen.before, "after": weights(module)}
        torch.save(content, folder / f"{name}.{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    assert start_ranks(2, fit_two_ranks, folder) == [0, 0]
    return folder


@pytest.mark.parametrize(("strategy", "rtol"), [("ddp", 1e-11), ("sharded", 1e-4)])  # in float64; in float32
def test_two_ranks_train_as_one_process_on_the_global_batch(two_ranks: Path, strategy: str, rtol: float) -> None:
    first, second = saved(two_ranks, strategy, 2)
    module = SimOModule(Flat(), JointLoss({"head": projected(), "other": joint()}))
    module._configure_loss(10, 4)
    module.double()
    module.load_state_dict(first["before"])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for one, two in zip(first["seen"], second["seen"], strict=True):
        images, labels = (torch.cat(pair) for pair in zip(one[:2], two[:2], strict=True))
        loss = module.loss(module.embed(images.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(one[2].double(), loss.detach(), rtol=rtol, atol=0)
    for name, value in module.state_dict().items():
        for after in (first["after"], second["after"]):
            torch.testing.assert_close(after[name], value, rtol=rtol, atol=rtol / 100, check_dtype=False)


# ---- the command


@pytest.mark.parametrize("name", ["simo_cross_entropy", "simo_projection_head"])
def test_the_shipped_configs_train(name: str, tmp_path: Path) -> None:
    words = "--trainer.max_steps 2 --trainer.log_every_n_steps 1 --plots null --probe null --run_dir run"
    words += " --trainer.enable_progress_bar false"
    config = CONFIGS / "losses" / f"{name}.yaml"
    main(["fit", "--config", str(CONFIGS / "digits.yaml"), "--config", str(config), *words.split()])
    module = load_module(tmp_path / "run" / "checkpoints" / "last.ckpt")
    wanted = yaml.safe_load(config.read_text())["model"]["init_args"]["loss"]["class_path"]
    assert type(module.loss).__name__ == wanted.rsplit(".", 1)[1]
    logged = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss_" in logged
