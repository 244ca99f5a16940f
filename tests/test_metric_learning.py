"""Losses of pytorch-metric-learning by name, and the classifier, against the library and against PyTorch."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor, nn

from simo_lightning import DigitsPairDataModule, SimOModule
from simo_lightning.checkpoints import load_module
from simo_lightning.cli import main
from simo_lightning.losses import ClassifierLoss, MetricLearningLoss
from simo_lightning.losses.metric_learning import WITHOUT_LABELS, _classes
from simo_lightning.semi_supervised import SemiSupervisedLoss
from simo_lightning.testing import check_resume
from tests.checkpoint_parts import Flat, Seen, fit, save
from tests.rank_processes import saved, start_ranks

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
LABELS = torch.arange(24) % 4
NEEDED: dict[str, dict[str, Any]] = {  # arguments without a default that no data or encoder has
    "CrossBatchMemory": {"loss": "ContrastiveLoss"},
    "MultipleLosses": {"losses": ["TripletMarginLoss", {"ArcFaceLoss": {"margin": 5}}]},
    "RankedListLoss": {"margin": 0.4, "Tn": 1},
}


def draw(rows: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Linear(nn.Module):
    """An encoder without a nonlinearity, in float64."""

    embedding_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 8, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.layer(images)
        return embeddings


# our arguments, and the same loss and miner made directly with its counts
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "proxy_anchor": (
        {"loss": "ProxyAnchorLoss", "arguments": {"alpha": 16}},
        losses.ProxyAnchorLoss(4, 8, alpha=16),
        None,
    ),
    "arcface": ({"loss": "ArcFaceLoss", "arguments": {"margin": 20}}, losses.ArcFaceLoss(4, 8, margin=20), None),
    "soft_triple": ({"loss": "SoftTripleLoss"}, losses.SoftTripleLoss(4, 8), None),
    "normalized_softmax": ({"loss": "NormalizedSoftmaxLoss"}, losses.NormalizedSoftmaxLoss(4, 8), None),
    "sub_centers": (
        {"loss": "SubCenterArcFaceLoss", "arguments": {"sub_centers": 2}},
        losses.SubCenterArcFaceLoss(num_classes=4, embedding_size=8, sub_centers=2),
        None,
    ),
    "multi_similarity": (
        {"loss": "MultiSimilarityLoss", "miner": "MultiSimilarityMiner", "miner_arguments": {"epsilon": 0.2}},
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(epsilon=0.2),
    ),
    "supcon": ({"loss": "pytorch_metric_learning.losses.SupConLoss"}, losses.SupConLoss(), None),
    "triplet": (
        {"loss": "TripletMarginLoss", "miner": "TripletMarginMiner", "miner_arguments": {"type_of_triplets": "hard"}},
        losses.TripletMarginLoss(),
        miners.TripletMarginMiner(type_of_triplets="hard"),
    ),
    "drawn_triplets": (
        {"loss": "TripletMarginLoss", "miner": "DistanceWeightedMiner"},
        losses.TripletMarginLoss(),
        miners.DistanceWeightedMiner(),
    ),
    "memory": (
        {"loss": "CrossBatchMemory", "arguments": {"loss": {"NTXentLoss": {"temperature": 0.2}}, "memory_size": 60}},
        losses.CrossBatchMemory(losses.NTXentLoss(temperature=0.2), 8, memory_size=60),
        None,
    ),
    "distance": (
        {"loss": "ContrastiveLoss", "arguments": {"distance": {"LpDistance": {"p": 1}}, "neg_margin": 2}},
        losses.ContrastiveLoss(distance=LpDistance(p=1), neg_margin=2),
        None,
    ),
    "class_path": (
        {
            "loss": "MarginLoss",
            "arguments": {
                "num_classes": None,
                "learn_beta": True,
                "distance": {"class_path": "pytorch_metric_learning.distances.LpDistance", "init_args": {"power": 2}},
            },
        },
        losses.MarginLoss(num_classes=4, learn_beta=True, distance=LpDistance(power=2)),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_that_of_the_library(name: str) -> None:
    """Three steps of the module, counts filled in, against the library called directly; in float64, equal."""
    arguments, direct, miner = CASES[name]
    module = SimOModule(Linear(), MetricLearningLoss(**arguments))
    module._configure_loss(4, 8)
    module.double()
    encoder, direct = Linear(), direct.double()
    encoder.load_state_dict(module.encoder.state_dict())
    own: nn.Module = module.loss.loss  # type: ignore[assignment]
    direct.load_state_dict(own.state_dict())
    images = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        torch.manual_seed(step)
        module.zero_grad()
        loss = module.training_step((images + step, LABELS), step)["loss"]
        loss.backward()
        torch.manual_seed(step)
        encoder.zero_grad()
        direct.zero_grad()
        embeddings = encoder(images + step)
        expected = (
            direct(embeddings, LABELS) if miner is None else direct(embeddings, LABELS, miner(embeddings, LABELS))
        )
        expected.backward()
        assert torch.equal(loss, expected)
        pairs = [*zip(module.encoder.parameters(), encoder.parameters(), strict=True)]
        pairs += zip(own.parameters(), direct.parameters(), strict=True)
        for ours, theirs in pairs:
            assert ours.grad is not None
            assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # of the library's HistogramLoss
@pytest.mark.filterwarnings("ignore:__array_wrap__ must:DeprecationWarning")  # of its LargeMarginSoftmaxLoss
def test_every_loss_and_every_miner_trains() -> None:
    for name in sorted(_classes("losses").keys() - WITHOUT_LABELS):
        loss = MetricLearningLoss(name, NEEDED.get(name))
        loss.configure(4, 8)
        embeddings = draw(dtype=torch.float32).requires_grad_()
        loss(embeddings, LABELS).backward()
        assert embeddings.grad is not None, name
        assert embeddings.grad.isfinite().all(), name
    for name in _classes("miners"):
        embeddings = draw(dtype=torch.float32).requires_grad_()
        MetricLearningLoss("TripletMarginLoss", miner=name)(embeddings, LABELS).backward()
        assert embeddings.grad is not None, name


def test_classifier_is_cross_entropy_of_a_linear_layer() -> None:
    loss = ClassifierLoss(label_smoothing=0.3)
    assert not list(loss.parameters())
    loss.configure(4, 8)
    loss.double()
    embeddings = draw()
    log_p = (embeddings @ loss.weight.T + loss.bias).log_softmax(dim=1)  # type: ignore[union-attr,operator]
    expected = -(0.7 * log_p[torch.arange(24), LABELS] + 0.3 * log_p.mean(dim=1)).mean()
    torch.testing.assert_close(loss(embeddings, LABELS), expected)
    assert [tuple(each.shape) for each in loss.parameters()] == [(4, 8), (4,)]
    assert [name for name, _ in ClassifierLoss(4, 8, bias=False).named_parameters()] == ["weight"]
    assert loss(embeddings[:0], LABELS[:0]).item() == 0


NAMES = "pytorch_metric_learning"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ArcFace",), f"'ArcFace' is no class of {NAMES}.losses; did you mean ArcFaceLoss?"),
        (("os.system",), f"'os.system' is no class of {NAMES}.losses"),
        ((f"{NAMES}.miners.HDCMiner",), f"'{NAMES}.miners.HDCMiner' is no class of {NAMES}.losses"),
        (("VICRegLoss",), "loss must be one that takes labels, got 'VICRegLoss'"),
        (("ArcFaceLoss", {"margn": 3}), "ArcFaceLoss has no argument 'margn'; did you mean margin?"),
        (("RankedListLoss",), r"arguments of RankedListLoss must hold Tn and margin, got \[\]"),
        (("ArcFaceLoss", {"margin": "x"}), "ArcFaceLoss cannot be made with arguments {'margin': 'x'}: "),
        (("SupConLoss", None, "HDCMine"), f"'HDCMine' is no class of {NAMES}.miners; did you mean HDCMiner?"),
        (("SupConLoss", None, None, {"epsilon": 1}), "miner must be given with miner_arguments, got None"),
        (("SupConLoss", {"distance": "CosineSim"}), f"'CosineSim' is no class of {NAMES}.distances; did you mean Cos"),
        (("SupConLoss", {"distance": {"LpDistance": {"q": 1}}}), "LpDistance has no argument 'q'; it has coll"),
        (("SupConLoss", {"distance": {"a": {}, "b": {}}}), r"distances must be a name or {name: arguments}, got"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as raised:
        MetricLearningLoss(*arguments)
    assert len(str(raised.value).splitlines()) == 1


def test_wrong_counts_labels_and_miners() -> None:
    for loss in (MetricLearningLoss("ArcFaceLoss"), ClassifierLoss()):
        name = "ArcFaceLoss" if isinstance(loss, MetricLearningLoss) else "ClassifierLoss"
        with pytest.raises(ValueError, match=f"num_classes .*of {name} must be given"):
            loss(draw(), LABELS)
        with pytest.raises(ValueError, match=f"num_classes of {name} must be given, since the data module has no"):
            loss.configure(None, 8)
        loss.configure(3, 8)
        with pytest.raises(ValueError, match=rf"labels of {name} must be in 0\.\.2, got 0\.\.3"):
            loss(draw(), LABELS)
        with pytest.raises(
            ValueError, match=f"num_classes of {name} must be at least 4, the classes of the data, got 3"
        ):
            loss.configure(4, 8)
    given = MetricLearningLoss("ArcFaceLoss", {"num_classes": 5, "embedding_size": 6})
    with pytest.raises(ValueError, match="embedding_size of ArcFaceLoss must be 8, the encoder's embedding_dim, got 6"):
        given.configure(5, 8)
    with pytest.raises(ValueError, match="embedding_dim of ClassifierLoss must be 8, the encoder's"):
        ClassifierLoss(5, 6).configure(5, 8)
    with pytest.raises(ValueError, match="num_classes must be at least 1, or None, got 0"):
        ClassifierLoss(0)
    with pytest.raises(ValueError, match=r"label_smoothing must be in 0\.\.1, got 2"):
        ClassifierLoss(label_smoothing=2)
    with pytest.raises(ValueError, match="miner must be None for PNPLoss, got MultiSimilarityMiner"):
        MetricLearningLoss("PNPLoss", miner="MultiSimilarityMiner")(draw(), LABELS)
    memory = MetricLearningLoss("CrossBatchMemory", {"loss": "ContrastiveLoss", "memory_size": 20})
    memory.configure(4, 8)
    with pytest.raises(ValueError, match="memory_size must be at least the size of the global batch, 24, got 20"):
        memory(draw(), LABELS)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    line = r"pytorch_metric_learning is missing: pip install 'simo_lightning\[losses\]'"
    with pytest.raises(ImportError, match=line):
        MetricLearningLoss("ArcFaceLoss")


class OwnLossInside(SimOModule):
    """A subclass that makes its loss itself, without counts."""

    def __init__(self, margin: float = 20.0) -> None:
        super().__init__(Flat(), MetricLearningLoss("ArcFaceLoss", {"margin": margin}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimOModule(Flat(), MetricLearningLoss("ArcFaceLoss", {"margin": 20})),
        lambda: SimOModule(Flat(), ClassifierLoss(label_smoothing=0.1)),
        lambda: SimOModule(Flat(), SemiSupervisedLoss(labelled=ClassifierLoss(), pseudo_label_weight=0.0)),
        OwnLossInside,
    ],
)
def test_counts_come_from_the_data_and_travel_in_the_checkpoint(make: Any, tmp_path: Path) -> None:
    module = make()
    fit(module, tmp_path, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    sizes = {tuple(each.shape) for each in module.loss.parameters()}
    assert sizes & {(4, 10), (10, 4)}  # in the optimizer:
    groups = module.optimizers().optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len([*module.parameters()])
    loaded = load_module(tmp_path / "a.ckpt", trusted=[OwnLossInside, Flat])
    again = load_module(save(loaded, tmp_path / "b.ckpt"), trusted=[OwnLossInside, Flat])
    embeddings, labels = draw(dtype=torch.float32)[:, :4], LABELS
    for each in (loaded, again):
        assert torch.equal(each.loss(embeddings, labels), module.loss(embeddings, labels))
    # a test of a new module needs no counts in the data: they come from the file
    tester = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    fresh = make()
    tester.validate(fresh, DigitsPairDataModule(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(fresh.loss(embeddings, labels), module.loss(embeddings, labels))


@pytest.mark.parametrize(
    "loss",
    [
        partial(MetricLearningLoss, "CrossBatchMemory", {"loss": "ContrastiveLoss", "memory_size": 700}),
        partial(MetricLearningLoss, "ArcFaceLoss", None, "DistanceWeightedMiner"),
    ],
    ids=["memory", "drawn"],
)
def test_resume_is_exact(loss: Any) -> None:
    check_resume(
        lambda: SimOModule(Flat(), loss(), partial(torch.optim.SGD, lr=0.01)),
        lambda: DigitsPairDataModule(samples_per_class=30, views=1),
    )


@pytest.mark.parametrize("name", ["CrossBatchMemory", "DynamicSoftMarginLoss"])
def test_what_a_loss_remembers_is_in_its_state(name: str) -> None:
    first, second = MetricLearningLoss(name, NEEDED.get(name)), MetricLearningLoss(name, NEEDED.get(name))
    for loss in (first, second):
        loss.configure(4, 8)
    embeddings = 0.1 * draw(dtype=torch.float32) + torch.eye(8)[0]
    first(embeddings, LABELS)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(embeddings.flip(0), LABELS), second(embeddings.flip(0), LABELS))


# ---- two ranks


def fit_two_ranks(folder: Path) -> None:
    """Two steps in float64; each rank saves its batches, its losses and the last weights."""
    for name, miner in (("all", None), ("drawn", "DistanceWeightedMiner")):
        pl.seed_everything(0, verbose=False)
        module = SimOModule(Flat(), MetricLearningLoss("ArcFaceLoss", miner=miner), partial(torch.optim.SGD, lr=0.01))
        seen = Seen()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, precision="64-true",
            callbacks=[seen], limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, DigitsPairDataModule(samples_per_class=6))
        content = {"seen": seen.steps, "before": seen.before, "after": module.state_dict()}
        torch.save(content, folder / f"{name}.{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    assert start_ranks(2, fit_two_ranks, folder) == [0, 0]
    return folder


def test_two_ranks_train_as_one_process_on_the_global_batch(two_ranks: Path) -> None:
    first, second = saved(two_ranks, "all", 2)
    module = SimOModule(Flat(), MetricLearningLoss("ArcFaceLoss"))
    module._configure_loss(10, 4)
    module.double()
    module.load_state_dict(first["before"])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for one, two in zip(first["seen"], second["seen"], strict=True):
        loss = module.loss(module.embed(torch.cat([one[0], two[0]])), torch.cat([one[1], two[1]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(one[2], loss.detach(), rtol=1e-12, atol=0)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(first["after"][name], value, rtol=1e-11, atol=1e-13)
        assert not torch.equal(value, first["before"][name])


def test_miners_draw_the_same_on_every_rank(two_ranks: Path) -> None:
    first, second = (each["seen"] for each in saved(two_ranks, "drawn", 2))
    assert [step[2] for step in first] == [step[2] for step in second]


# ---- the command


def test_the_command_fills_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--trainer.max_steps 2 --plots null --probe null --trainer.enable_progress_bar false --run_dir run"
    words += " --model.loss MetricLearningLoss --model.loss.loss ProxyAnchorLoss --model.loss.arguments.alpha 16"
    words += " --model.loss.miner MultiSimilarityMiner"
    main(["fit", "--config", str(CONFIG), *words.split()])
    module = load_module(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert module.loss.loss.proxies.shape == (10, 16)
    assert (module.loss.loss.alpha, type(module.loss.miner).__name__) == (16, "MultiSimilarityMiner")


def test_the_command_names_a_loss_that_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(CONFIG), "--model.loss", "MetricLearningLoss", "--model.loss.loss", "ArcFace"])
    assert (
        "error: 'ArcFace' is no class of pytorch_metric_learning.losses; did you mean ArcF" in capsys.readouterr().err
    )
