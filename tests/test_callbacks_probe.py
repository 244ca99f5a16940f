"""OnlineProbe: what it learns, that it does not change the encoder, and that it resumes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning import DigitsPairDataModule, SimOModule
from simo_lightning.callbacks import LastCheckpoint, OnlineProbe
from simo_lightning.testing.trainers import quiet_and_seeded, small_trainer
from tests.callback_parts import (
    NUM_CLASSES,
    Encoder,
    History,
    Pictures,
    adam_loop,
    assert_learned,
    embedded,
    trainer,
)


class Embedding(Encoder):
    """Returns what it trained on; keeps it too."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        embeddings = self.embed(batch[0])
        self.batches.append((embeddings.detach(), batch[1]))
        return {"loss": embeddings.square().mean(), "embeddings": embeddings, "labels": batch[1]}


@pytest.mark.parametrize("hidden", [False, True])
def test_it_is_softmax_regression_on_directions(tmp_path, hidden):
    class Hidden(Pictures):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
            if hidden and self.trainer.training:
                labels = torch.where(
                    torch.arange(len(labels)) % 3 == 0, NUM_CLASSES + torch.arange(len(labels)), labels
                )
            return images, labels

    module, probe, data, history = Embedding(), OnlineProbe(lr=0.05, every_n_batches=1), Hidden(), History()
    run = trainer(tmp_path, probe, history, max_epochs=3)
    run.fit(module, data)
    assert history.seen[0] == {}  # nothing of the sanity check
    assert_learned(probe.head, module.batches, 0.05)
    weight, bias = adam_loop(module.batches, 0.05)
    for stage, asked in (("val", data.val), ("test", data.train)):
        rows, labels = embedded(module, asked)
        rows = 2 * rows / np.linalg.norm(rows, axis=1, keepdims=True)  # sqrt of 4 dimensions
        share = np.mean((rows @ weight.T + bias).argmax(1) == labels)
        logged = (run.validate if stage == "val" else run.test)(module, data, verbose=False)[0]
        right = (rows @ weight.T + bias).argmax(1) == labels
        macro = np.mean([right[labels == label].mean() for label in range(NUM_CLASSES)])
        assert logged == {f"{stage}/probe": pytest.approx(share), f"{stage}/probe_macro": pytest.approx(macro)}
    assert history.seen[-1]["val/probe"] == run.validate(module, data, verbose=False)[0]["val/probe"]


def test_it_learns_from_every_second_batch_by_default(tmp_path):
    module, probe = Embedding(), OnlineProbe()
    trainer(tmp_path, probe, max_epochs=1).fit(module, Pictures())
    assert_learned(probe.head, module.batches[::2], 1e-2)


def test_it_evaluates_every_n_epochs_and_learns_in_all(tmp_path):
    history, module, probe = History(), Embedding(), OnlineProbe(every_n_epochs=2, every_n_batches=1)
    trainer(tmp_path, probe, history, max_epochs=3, num_sanity_val_steps=0).fit(module, Pictures())
    assert ["val/probe" in seen for seen in history.seen] == [False, True, True]
    assert_learned(probe.head, module.batches, 0.01)


def test_untrained_or_without_embeddings_nothing_is_logged(tmp_path):
    assert trainer(tmp_path, OnlineProbe()).validate(Embedding(), Pictures(), verbose=False) == [{}]
    probe, history = OnlineProbe(), History()
    probe.required = False
    trainer(tmp_path, probe, history, max_epochs=1).fit(Encoder(), Pictures())  # its training step returns a loss alone
    assert probe.head is None
    assert history.seen[-1] == {}


class Dropping(nn.Module):
    """Draws random numbers at every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(images)
        return embeddings


def fit_digits(folder: Path, *callbacks: Any, checkpoint: Path | None = None, **options: Any) -> SimOModule:
    module = SimOModule(Dropping(), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    run = small_trainer(folder, callbacks=list(callbacks), **{"max_epochs": 2, "limit_train_batches": 4, **options})
    with quiet_and_seeded():
        run.fit(module, DigitsPairDataModule(samples_per_class=6), ckpt_path=checkpoint, weights_only=True)
    return module


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_the_encoder_trains_as_without_it_to_the_last_bit(tmp_path, options):
    probe = OnlineProbe()
    watched = fit_digits(tmp_path, probe, **options).state_dict()
    assert probe.head.weight.abs().sum() > 0
    assert equal(watched, fit_digits(tmp_path, **options).state_dict())


def test_it_resumes_to_the_last_bit(tmp_path):
    whole, second = OnlineProbe(), OnlineProbe()
    weights = fit_digits(tmp_path / "whole", whole).state_dict()
    fit_digits(tmp_path / "part", OnlineProbe(), LastCheckpoint(), enable_checkpointing=True, max_epochs=1)
    checkpoint = tmp_path / "part" / "checkpoints" / "last.ckpt"
    again = fit_digits(tmp_path / "part", second, LastCheckpoint(), enable_checkpointing=True, checkpoint=checkpoint)
    assert equal(again.state_dict(), weights)
    assert equal(second.head.state_dict(), whole.head.state_dict())
    states = [probe.state_dict()["optimizer"]["state"] for probe in (whole, second)]
    for one, other in zip(*(list(state.values()) for state in states), strict=True):
        assert equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"every_n_epochs": 0}, "at least 1, got 0"),
        ({"every_n_batches": 0}, "at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OnlineProbe(**options)


class Named(Pictures):
    """Pictures whose classes have other indices, and one class that training lacks, in evaluation."""

    class_names = ("cat", "dog", "ship", "truck")
    train_class_names = ("cat", "dog", "ship")
    num_classes, num_train_classes = 4, 3

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.class_names = names or Named.class_names
        self.train_class_names = self.class_names[:3]

    def val_dataloader(self) -> DataLoader:
        images, labels = self.val.tensors
        true = torch.tensor([self.class_names.index(name) for name in ("cat", "dog", "ship")])
        unseen = torch.arange(len(labels)) % 4 == 0
        return self.loader(TensorDataset(images, torch.where(unseen, self.class_names.index("truck"), true[labels])))


def test_only_images_of_its_classes_are_judged_matched_by_name(tmp_path):
    module, probe = Embedding(), OnlineProbe(lr=0.05)
    trainer(tmp_path, probe, max_epochs=2).fit(module, Named())
    assert probe.head.out_features == 3
    rows, labels = embedded(module, Named.val)
    seen = np.arange(len(labels)) % 4 != 0
    directions = torch.from_numpy(2 * rows / np.linalg.norm(rows, axis=1, keepdims=True))
    right = (probe.head.double()(directions).argmax(1).numpy() == labels)[seen]
    probe.head.float()
    run = trainer(tmp_path, probe)
    for names in (("cat", "dog", "ship", "truck"), ("truck", "ship", "cat", "dog")):
        logged = run.validate(module, Named(*names), verbose=False)[0]
        assert logged["val/probe"] == pytest.approx(right.mean())
        macro = np.mean([right[labels[seen] == label].mean() for label in range(3)])
        assert logged["val/probe_macro"] == pytest.approx(macro)


def test_classes_that_it_does_not_know_are_not_judged_and_that_is_said(tmp_path, caplog):
    module, saved = Embedding(), tmp_path / "of_cats.ckpt"
    run = trainer(tmp_path, OnlineProbe(), max_epochs=1)
    run.fit(module, Pictures())
    run.save_checkpoint(saved)

    class Others(Pictures):
        num_classes, class_names = 5, ("a", "b", "c", "d", "e")

    for data in (Others(), type("SameNumber", (Pictures,), {"class_names": ("a", "b", "c")})()):
        with caplog.at_level("INFO"):
            run = trainer(tmp_path, OnlineProbe())
            assert run.test(module, data, ckpt_path=saved, weights_only=True, verbose=False) == [{}]
    lines = [record.getMessage() for record in caplog.records if "OnlineProbe" in record.getMessage()]
    assert lines == ["OnlineProbe knows none of the classes of these images: test/probe is not logged"] * 2
    with caplog.at_level("INFO"):
        again = OnlineProbe()
        trainer(tmp_path, again, max_epochs=2).fit(module, Others(), ckpt_path=saved, weights_only=True)
    assert again.head.out_features == 5
    assert "OnlineProbe starts anew: that of the checkpoint was trained on 3 other classes" in caplog.text


def test_coarse_labels_in_training_are_those_it_is_judged_by(tmp_path):
    class Coarse(Pictures):
        coarse = {"animal": ["cat", "dog"], "vehicle": ["ship"]}  # noqa: RUF012
        train_class_names, num_train_classes = ("animal", "vehicle"), 2

        def train_dataloader(self) -> DataLoader:
            images, labels = self.train.tensors
            return self.loader(TensorDataset(images, labels // 2))

    module, probe = Embedding(), OnlineProbe(lr=0.05)
    run = trainer(tmp_path, probe, max_epochs=3)
    run.fit(module, Coarse())
    rows, labels = embedded(module, Coarse.val)
    directions = torch.from_numpy(2 * rows / np.linalg.norm(rows, axis=1, keepdims=True))
    logged = run.validate(module, Coarse(), verbose=False)[0]
    right = probe.head.double()(directions).argmax(1).numpy() == labels // 2
    assert logged["val/probe"] == pytest.approx(right.mean())


def test_without_a_number_of_classes_the_head_grows_with_the_labels(tmp_path):
    class Unnumbered(Pictures):
        num_classes = class_names = None

        def train_dataloader(self) -> DataLoader:
            images, labels = self.train.tensors
            order = labels.argsort(stable=True)
            return self.loader(TensorDataset(images[order], labels[order]))

    probe, module = OnlineProbe(lr=0.05, every_n_batches=1), Embedding()
    trainer(tmp_path, probe, max_epochs=1).fit(module, Unnumbered())
    # softmax regression over the classes so far; a class that appears starts at zero, as Adam's moments of it do
    head = nn.Linear(4, 3)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    adam = torch.optim.Adam(head.parameters(), lr=0.05)
    so_far = 0
    for rows, labels in module.batches:
        so_far = max(so_far, int(labels.max()) + 1)
        logits = head(torch.nn.functional.normalize(rows) * 2)[:, :so_far]
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        adam.step()
    torch.testing.assert_close(probe.head.weight, head.weight)
    torch.testing.assert_close(probe.head.bias, head.bias)
