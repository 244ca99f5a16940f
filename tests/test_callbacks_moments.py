"""GeometryMonitor on training batches."""

from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from simo_lightning import SimOModule
from simo_lightning.callbacks import GeometryMonitor
from simo_lightning.callbacks import moments as callback_moments
from simo_lightning.functional.geometry import GEOMETRY
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
