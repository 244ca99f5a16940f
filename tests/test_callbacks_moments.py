"""GeometryMonitor on training batches."""

from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from simo_lightning import SimOModule
from simo_lightning.callbacks import CollapseAlarm, EmbeddingPlots, GeometryMonitor
from simo_lightning.callbacks import moments as callback_moments
from simo_lightning.data import TensorPairDataModule
from simo_lightning.data.sources import LabelledImages
from simo_lightning.functional.geometry import GEOMETRY, computable_metrics
from simo_lightning.functional.moments import class_moments
from simo_lightning.testing.trainers import small_trainer
from tests.callback_parts import NUM_CLASSES, Encoder, Pictures, Shares, layer, trainer


class Recording(SimOModule):
    """Keeps what each training step returned."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.outputs: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        self.outputs.append(outputs)
        return outputs


def geometry(outputs: list[dict[str, Tensor]]) -> dict[str, float]:
    embeddings = torch.cat([output["embeddings"] for output in outputs])
    labels = torch.cat([output["labels"] for output in outputs])
    known = labels < NUM_CLASSES
    moments = class_moments(embeddings[known], labels[known], NUM_CLASSES)
    return {f"train/{name}": float(function(moments)) for name, function in GEOMETRY.items()}


class Kept(CSVLogger):
    """Keeps the geometry of training that it was given."""

    logged: list[tuple[int, dict[str, float]]]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/class_cosine" in metrics:
            values = {key: value for key, value in metrics.items() if key != "epoch"}
            self.logged = [*getattr(self, "logged", []), (step, values)]
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("micro_batch_size", [None, 7])
@pytest.mark.parametrize("chunk_size", [1, 50, 4096])
def test_the_window_holds_the_batches_since_the_last_time(tmp_path, monkeypatch, micro_batch_size, chunk_size):
    monkeypatch.setattr(callback_moments, "_CHUNK_SIZE", chunk_size)
    module, logger = Recording(layer(), micro_batch_size=micro_batch_size), Kept(tmp_path)
    options = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 4}
    small_trainer(tmp_path, callbacks=[GeometryMonitor(every_n_steps=3)], **options).fit(module, Shares())
    assert [step for step, _ in logger.logged] == [2, 5]  # counted from 0, as Lightning does
    assert not module.outputs[0]["embeddings"].requires_grad
    for number, (_, values) in enumerate(logger.logged):
        assert values == pytest.approx(geometry(module.outputs[3 * number : 3 * number + 3]), rel=1e-9, nan_ok=True)


def test_embeddings_of_no_class_are_ignored_and_accumulated_steps_count_once(tmp_path):
    class Hidden(Shares):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, labels = batch
            hidden = self.trainer.training & (torch.arange(len(labels)) % 4 == 0)
            return images, torch.where(hidden, NUM_CLASSES + torch.arange(len(labels)), labels)

    module, logger = Recording(layer()), Kept(tmp_path)
    options = {"max_epochs": 1, "logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    small_trainer(tmp_path, callbacks=[GeometryMonitor(every_n_steps=1)], **options).fit(module, Hidden())
    assert [step for step, _ in logger.logged] == [0, 1]
    for number, (_, values) in enumerate(logger.logged):
        assert values == pytest.approx(geometry(module.outputs[2 * number : 2 * number + 2]), rel=1e-9, nan_ok=True)


def test_without_every_n_steps_nothing_is_kept(tmp_path):
    monitor = GeometryMonitor()
    run = small_trainer(tmp_path, callbacks=[monitor], max_epochs=1)
    run.fit(SimOModule(layer()), Shares())
    assert monitor._window is None
    assert not [name for name in run.callback_metrics if name.removeprefix("train/") in GEOMETRY]
    run = trainer(tmp_path, GeometryMonitor(every_n_steps=1), max_epochs=1)
    with pytest.raises(ValueError, match=r"training_step returns loss, embeddings .*, got a dictionary with loss"):
        run.fit(Encoder(), Pictures())


def test_a_number_of_steps_below_one_is_named():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, or None, got 0"):
        GeometryMonitor(every_n_steps=0)


def test_what_exceeds_the_budget_is_left_out_with_one_line_for_all_epochs(tmp_path, caplog):
    monitor, alarm = GeometryMonitor(second_budget_mb=0), CollapseAlarm()
    with caplog.at_level("INFO"):
        run = trainer(tmp_path, monitor, alarm, EmbeddingPlots(2, second_budget_mb=0), max_epochs=2)
        run.fit(Encoder(), Pictures())
    lines = [record.getMessage() for record in caplog.records if "not computed" in record.getMessage()]
    assert lines == [
        "GeometryMonitor: not computed: participation_ratio, subspace_overlap, variance_across, variance_along: the "
        "second moments of 3 classes in 4 dimensions take 0.00038 MB, above second_budget_mb=0"
    ]
    logged = {name.removeprefix("val/") for name in run.callback_metrics}
    assert {name for name in GEOMETRY if name not in logged} == {
        name for name, metric in GEOMETRY.items() if metric.needs_second
    }
    assert (tmp_path / "plots" / "norms.png").is_file()
    with pytest.raises(ValueError, match="second_budget_mb must be at least 0, got -1"):
        GeometryMonitor(second_budget_mb=-1)


def test_classes_that_appear_later_can_exceed_the_budget():
    """Without a number of classes the sums grow with the labels; those of each class go when they are too large."""
    shared = callback_moments._SharedMoments(None, skip_unknown=False, second_budget_mb=8 * 10 * 4**2 / 1e6)
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    shared.update(rows[:10], torch.arange(10), 0)
    assert shared.compute("first", rows.device).second is not None
    for index in range(3):
        shared.update(rows[10 * index : 10 * index + 10], torch.arange(10) + 10 * index, index + 1)
        shared._add_batches()
    moments, expected = shared.compute("second", rows.device), class_moments(rows, torch.arange(30), 30)
    assert moments.second is None
    assert torch.equal(moments.sums, expected.sums)
    torch.testing.assert_close(moments.second_moment, expected.second_moment)


def labelled(num_classes: int, seed: int) -> LabelledImages:
    """Two noisy images of 8 x 8 pixels of each class."""
    patterns = torch.randint(256, (num_classes, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2 * num_classes) % num_classes
    noise = torch.randint(-20, 21, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    images = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
    return LabelledImages(images, labels, [f"class {label}" for label in range(num_classes)])


def test_all_callbacks_of_a_run_with_many_classes_in_many_dimensions(tmp_path, caplog):
    """550 classes in 256 dimensions: (C, D, D) would take 288 MB; so with 10,000 classes in 512, only longer."""
    data = TensorPairDataModule(
        labelled(550, 1), labelled(550, 2), classes_per_batch=275, samples_per_class=2, augment=None
    )
    module = SimOModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256)))
    callbacks = [EmbeddingPlots(), CollapseAlarm(after_epochs=0)]  # besides OnlineKNN and GeometryMonitor, the defaults
    with caplog.at_level("INFO"):
        run = small_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
        run.fit(module, data)
    lines = [record.getMessage() for record in caplog.records if "not computed" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].endswith("550 classes in 256 dimensions take 288 MB, above second_budget_mb=256")
    assert run.callback_metrics["val/collapsed_classes"] == 0
    batches = (data.prepare(batch, augment=False) for batch in data.val_dataloader())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        moments = class_moments(module.eval()(images), labels, 550)
    for name, metric in computable_metrics(moments).items():
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(float(metric(moments)), rel=1e-5), name
    assert {path.name for path in (tmp_path / "plots").glob("*.png")} >= {"norms.png", "similarity.png", "scatter.png"}
