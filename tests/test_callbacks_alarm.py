"""CollapseAlarm: its rules against loops, and what it reports, when and how often."""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from simo_lightning import DigitsPairDataModule, SimOLoss, SimOModule
from simo_lightning.callbacks import CollapseAlarm
from simo_lightning.functional.geometry import (
    class_separation,
    class_separation_blocks,
    collapse,
    rank_share,
    spread_share,
)
from simo_lightning.functional.moments import class_moments
from simo_lightning.testing.trainers import small_trainer
from tests.callback_parts import NUM_CLASSES, Encoder, History, Pictures, trainer


def separation_loop(rows: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """As the docstring defines it, from the embeddings themselves."""
    found = np.full((num_classes, num_classes), np.nan)
    classes = [rows[labels == label] for label in range(num_classes)]
    for a, one in enumerate(classes):
        for b, other in enumerate(classes):
            if a == b or len(one) < 2 or len(other) < 2:
                continue
            line = other.mean(0) - one.mean(0)
            square = line @ line
            noise = sum(np.trace(np.cov(some.T)) / len(some) for some in (one, other))
            spread = np.mean([np.var(some @ line / np.sqrt(square), ddof=1) for some in (one, other)])
            found[a, b] = np.sqrt(max(square - noise, 0) / spread)
    return found


def random_embeddings(seed: int, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Classes of 20, 30, 2, 1 and no embeddings."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0] * 20 + [1] * 30 + [2] * 2 + [3])
    shift = 2 * torch.randn(5, dim, generator=generator, dtype=torch.float64)
    return torch.randn(len(labels), dim, generator=generator, dtype=torch.float64) + shift[labels], labels


@pytest.mark.parametrize("seed", range(3))
def test_separation_is_that_of_the_loop(seed):
    rows, labels = random_embeddings(seed)
    found = class_separation(class_moments(rows, labels, 5))
    np.testing.assert_allclose(found, separation_loop(rows.numpy(), labels.numpy(), 5), rtol=1e-9)
    turn = torch.linalg.qr(rows[:5])[0]
    torch.testing.assert_close(class_separation(class_moments(1e3 * rows @ turn, labels, 5)), found, equal_nan=True)


@pytest.mark.parametrize("budget", [256, 0])
@pytest.mark.parametrize("pairs", [1, 8192])
def test_separation_in_blocks_is_that_of_the_whole(monkeypatch, budget, pairs):
    rows, labels = random_embeddings(0)
    rows[labels == 1] += rows[labels == 0].mean(0) - rows[labels == 1].mean(0) + 1e-4  # two means nearly coincide
    moments = class_moments(rows, labels, 5, second_budget_mb=budget)
    whole = class_separation(moments)
    monkeypatch.setattr(collapse, "_BLOCK", 2)
    monkeypatch.setattr(collapse, "_PAIRS", pairs)
    assert len(list(class_separation_blocks(moments))) == 6
    torch.testing.assert_close(class_separation(moments), whole, rtol=1e-10, atol=0, equal_nan=True)


def test_separation_without_second_moments_of_classes_is_in_units_of_the_pooled_spread():
    """Equal to the loop where every class is given the pooled covariance, and to the other form where they share it."""
    rows, labels = random_embeddings(1)
    found = class_separation(class_moments(rows, labels, 5, second_budget_mb=0))
    classes = [rows[labels == label].numpy() for label in range(5)]
    pooled = sum(np.cov(some.T) * (len(some) - 1) for some in classes[:3]) / sum(len(some) - 1 for some in classes[:3])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        line = classes[b].mean(0) - classes[a].mean(0)
        noise = sum(np.trace(np.cov(classes[c].T)) / len(classes[c]) for c in (a, b))
        square = line @ line
        expected = np.sqrt(max(square - noise, 0) / (line @ pooled @ line / square))
        assert found[a, b].item() == found[b, a].item() == pytest.approx(expected, rel=1e-10)
    assert found[3:].isnan().all()
    noise = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same, index = torch.cat([noise, noise + 2, noise - 1]), torch.arange(3).repeat_interleave(30)
    own, shared = (class_separation(class_moments(same, index, 3, second_budget_mb=budget)) for budget in (1, 0))
    torch.testing.assert_close(own, shared, rtol=1e-10, atol=0, equal_nan=True)
    assert class_separation(class_moments(rows[:4], torch.arange(4), 4, second_budget_mb=0)).isnan().all()


def test_separation_of_points():
    labels = torch.arange(12) % 3
    apart = class_separation(class_moments(torch.eye(3)[labels], labels, 3))
    assert torch.equal(apart.isinf(), ~torch.eye(3, dtype=torch.bool))
    together = class_separation(class_moments(torch.full((12, 3), 0.1), labels, 3))
    assert together[0, 1] == together[1, 2] == 0


def test_a_few_embeddings_in_many_dimensions_are_not_separated_by_chance():
    """The means of two halves of 28 embeddings in 64 dimensions are 3 spreads apart by chance."""
    found, plain = [], []
    for seed in range(40):
        rows = torch.randn(28, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(float(class_separation(class_moments(rows, torch.arange(28) % 2, 2))[0, 1]))
        plain.append(float((rows[::2].mean(0) - rows[1::2].mean(0)).norm()))
    assert np.median(plain) > 2.5
    assert np.median(found) < 1


def test_shares_in_closed_cases():
    labels = torch.arange(4)
    line = class_moments(torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [3.0, 3.0]]), labels, 4)
    assert rank_share(line).item() == pytest.approx(0, abs=1e-9)
    assert rank_share(class_moments(torch.eye(4), labels, 4)).item() == pytest.approx(1)
    assert rank_share(class_moments(torch.eye(4)[:1], labels[:1], 4)).isnan()
    assert spread_share(class_moments(torch.eye(4), labels, 4)).item() == pytest.approx(0.75)
    assert spread_share(class_moments(torch.ones(4, 2), labels, 4)).item() == 0
    assert spread_share(class_moments(torch.zeros(4, 2), labels, 4)).isnan()


Embed = Callable[[Tensor], Tensor]  # from labels (N,) to embeddings (N, 4)


def of_means(*rows: list[float], scale: float = 1.0) -> Embed:
    """Embeddings around a mean of each class; a class spreads 0.1 in each direction."""

    def embedded(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(len(labels)))
        return scale * (torch.tensor(rows)[labels] + 0.1 * noise)

    return embedded


X, Y, Z = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
WELL, CAT_IS_DOG, ALL_ONE = of_means(X, Y, Z), of_means(X, X, Z), of_means(X, X, X)
SMALL = of_means(X, Y, Z, scale=1e-6)
LINE = of_means([100.0, 0, 0, 0], [200.0, 0, 0, 0], [-100.0, 0, 0, 0])
POINT = of_means([100.0, 0, 0, 0], [100.0, 0, 0, 0], [100.0, 0, 0, 0])


def nan(labels: Tensor) -> Tensor:
    return torch.full((len(labels), 4), float("nan"))


class Scripted(Encoder):
    """Validation returns the embeddings of one entry of the script per epoch."""

    def __init__(self, *script: Embed) -> None:
        super().__init__()
        self.script = script

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"embeddings": self.script[self.current_epoch](batch[1]), "labels": batch[1]}


def messages(folder: Path, caplog: pytest.LogCaptureFixture, alarm: CollapseAlarm, *script: Embed) -> list[str]:
    """The messages of a run, warnings marked; the history of the run is kept in ``alarm.history``."""
    alarm.history = History()
    caplog.clear()
    run = trainer(folder, alarm, alarm.history, max_epochs=len(script))
    reported = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reported.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Handler()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: reported.append(f"warning: {message}")
            warnings.simplefilter("always")
            run.fit(Scripted(*script), Pictures())
    finally:
        logger.removeHandler(handler)
    return [line for line in reported if line.startswith(("warning: epoch", "epoch")) or "collapse" in line]


def test_merged_classes_are_named_once_and_so_is_their_recovery(tmp_path, caplog):
    script = [CAT_IS_DOG, CAT_IS_DOG, CAT_IS_DOG, WELL, CAT_IS_DOG, WELL, WELL, WELL]
    alarm = CollapseAlarm(after_epochs=0)
    assert messages(tmp_path, caplog, alarm, *script) == [
        "warning: epoch 1, step 8: val embeddings collapsed: classes merged: cat = dog",
        "epoch 6, step 28: recovered from collapse: classes cat, dog",
    ]
    counts = [seen["val/collapsed_classes"] for seen in alarm.history.seen[1:]]
    assert counts == [2, 2, 2, 0, 2, 0, 0, 0]
    assert not alarm.collapsed


def test_one_bad_evaluation_is_not_reported_nor_are_the_first_epochs(tmp_path, caplog):
    assert messages(tmp_path, caplog, CollapseAlarm(after_epochs=0), WELL, ALL_ONE, WELL, CAT_IS_DOG) == []
    script = [ALL_ONE] * 4
    reported = messages(tmp_path, caplog, CollapseAlarm(after_epochs=3), *script)
    assert [line.partition(":")[2][:16] for line in reported] == [" epoch 3, step 1"]
    assert reported[0].endswith("all 3 classes merged")
    assert messages(tmp_path, caplog, CollapseAlarm(after_epochs=4), *script) == []


def test_a_group_that_grows_is_reported_and_so_is_a_class_that_leaves_it(tmp_path, caplog):
    script = [CAT_IS_DOG, CAT_IS_DOG, ALL_ONE, ALL_ONE, CAT_IS_DOG, CAT_IS_DOG]
    assert messages(tmp_path, caplog, CollapseAlarm(after_epochs=0), *script) == [
        "warning: epoch 1, step 8: val embeddings collapsed: classes merged: cat = dog",
        "warning: epoch 3, step 16: val embeddings collapsed: all 3 classes merged",
        "epoch 5, step 24: recovered from collapse: classes ship",
    ]


@pytest.mark.parametrize(
    ("embed", "text"),
    [
        (SMALL, "RMS norm 1.04e-06"),
        (LINE, "effective rank 1.02 for 3 classes in 4 dimensions"),
        (POINT, "all at one point (variance is 3.4e-06 of the mean square)"),
    ],
)
def test_what_collapsed_is_named(tmp_path, caplog, embed, text):
    reported = messages(tmp_path, caplog, CollapseAlarm(after_epochs=0), embed, embed, embed, WELL, WELL)
    assert reported[0] == f"warning: epoch 1, step 8: val embeddings collapsed: {text}"
    assert reported[1].startswith("epoch 4, step 20: recovered from collapse: ")
    assert len(reported) == 2


def test_nan_is_reported_at_once_and_the_rest_is_kept(tmp_path, caplog):
    alarm = CollapseAlarm(after_epochs=0)
    assert messages(tmp_path, caplog, alarm, CAT_IS_DOG, CAT_IS_DOG, nan, CAT_IS_DOG, CAT_IS_DOG) == [
        "warning: epoch 1, step 8: val embeddings collapsed: classes merged: cat = dog",
        "warning: epoch 2, step 12: val embeddings collapsed: nan or infinite values",
        "epoch 4, step 20: recovered from collapse: nan",
    ]
    assert np.isnan(alarm.history.seen[3]["val/collapsed_classes"])
    assert alarm.collapsed == {("merged", 0, 1)}


def test_it_can_stop_the_run(tmp_path, caplog):
    alarm = CollapseAlarm(after_epochs=0, action="stop")
    reported = messages(tmp_path, caplog, alarm, WELL, CAT_IS_DOG, CAT_IS_DOG, WELL, WELL)
    assert reported == [
        "warning: epoch 2, step 12: val embeddings collapsed: classes merged: cat = dog; training stops"
    ]
    assert len(alarm.history.seen) == 1 + 3


def test_what_was_reported_is_in_the_checkpoint(tmp_path, caplog):
    alarm, second = CollapseAlarm(after_epochs=0), CollapseAlarm(after_epochs=0)
    messages(tmp_path, caplog, alarm, CAT_IS_DOG, CAT_IS_DOG)
    torch.save(alarm.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.collapsed == alarm.collapsed == {("merged", 0, 1)}
    assert messages(tmp_path, caplog, second, CAT_IS_DOG, CAT_IS_DOG) == []


def test_validation_by_itself_reports_without_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    logged = trainer(tmp_path, CollapseAlarm()).validate(Scripted(CAT_IS_DOG), Pictures(), verbose=False)
    assert logged == [{"val/collapsed_classes": 2}]
    assert "val embeddings are collapsed: classes merged: cat = dog" in caplog.text


class Small(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))


@pytest.mark.parametrize("leaning", [1.0, 0.0])
def test_a_run_without_orthogonality_collapses_and_one_with_it_does_not(tmp_path, leaning):
    """The paper's form on digits; training batches are evaluated too."""
    loss = SimOLoss("group", "log", eps=0.01, normalize=False, orthogonality_leaning=leaning)
    alarm = CollapseAlarm(after_epochs=2, every_n_steps=12)
    run = small_trainer(tmp_path, callbacks=[alarm], max_epochs=6, log_every_n_steps=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(SimOModule(Small(), loss, partial(torch.optim.AdamW, lr=1e-2)), DigitsPairDataModule())
    collapsed = [str(warning.message) for warning in caught if "embeddings collapsed" in str(warning.message)]
    print(*collapsed, sep="\n")  # pytest -rP shows it
    assert bool(collapsed) == (leaning == 0)
    assert {"val/collapsed_classes", "train/collapsed_classes"} <= run.callback_metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after_epochs": -1}, "after_epochs must be at least 0, got -1"),
        ({"action": "shout"}, "action must be 'warn' or 'stop', got 'shout'"),
        ({"min_rank": 1.0}, "min_rank must be between 0 and 1, got 1.0"),
        ({"min_spread": 0.0}, "min_spread must be between 0 and 1, got 0.0"),
        ({"min_separation": 0.0}, "min_separation must be positive, got 0.0"),
        ({"smallest_norm": 2.0, "largest_norm": 1.0}, "below largest_norm, got 2.0 and 1.0"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CollapseAlarm(num_classes=NUM_CLASSES, **options)


def test_three_thousand_merged_classes_are_reported_in_one_line_and_take_a_bit_per_pair(tmp_path):
    embeddings = torch.ones(6_000, 2) + 1e-2 * torch.randn(6_000, 2, generator=torch.Generator().manual_seed(0))
    moments = class_moments(embeddings, torch.arange(6_000) % 3_000, 3_000)
    alarm, run = CollapseAlarm(after_epochs=0, min_spread=1e-9, min_rank=1e-9, min_separation=1e9), trainer(tmp_path)
    run.state.fn = TrainerFn.FITTING
    assert alarm.evaluate(run, "val", moments) == {"collapsed_classes": torch.tensor(3_000.0)}
    with pytest.warns(UserWarning, match="embeddings collapsed: all 3000 classes merged$"):
        alarm.evaluate(run, "val", moments)
    state = alarm.state_dict()
    assert state["reported"]["val"]["merged"].nbytes == 3_000**2 / 8
    again = CollapseAlarm()
    again.load_state_dict(state)
    assert again.state_dict()["reported"]["val"]["merged"].equal(state["reported"]["val"]["merged"])


def test_of_many_classes_the_merged_ones_are_found_without_their_second_moments(tmp_path):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1_100, 8, generator=generator)
    centers[[7, 1_050]] = centers[[3, 900]]
    labels = torch.arange(70_400) % 1_100
    rows = centers[labels] + 0.1 * torch.randn(70_400, 8, generator=generator)
    moments = class_moments(rows, labels, 1_100, second_budget_mb=0)
    alarm, run = CollapseAlarm(after_epochs=0), trainer(tmp_path)
    run.state.fn = TrainerFn.FITTING
    alarm.evaluate(run, "val", moments)
    with pytest.warns(UserWarning, match="embeddings collapsed: classes merged: 3 = 7; 900 = 1050$"):
        assert alarm.evaluate(run, "val", moments) == {"collapsed_classes": torch.tensor(4.0)}


def test_the_state_of_a_run_with_other_classes_is_dropped(tmp_path, caplog):
    alarm = CollapseAlarm(after_epochs=0)
    messages(tmp_path, caplog, alarm, CAT_IS_DOG, CAT_IS_DOG)
    moments = class_moments(torch.eye(4), torch.arange(4) % 2, 2)
    run = trainer(tmp_path)
    run.state.fn = TrainerFn.FITTING
    alarm.evaluate(run, "val", moments)
    assert not alarm.collapsed
