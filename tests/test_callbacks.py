"""Callbacks in real, tiny Trainer runs, with a module and a data module that the package does not know."""

import os

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.neighbors import NearestCentroid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import EmbeddingPlots, GeometryMonitor, OnlineKNN
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import load_snapshots
from tests.callback_parts import (
    NUM_CLASSES,
    Encoder,
    History,
    Pictures,
    cosine_loop,
    embedded,
    neighbours,
    pictures,
    trainer,
)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_values_are_those_of_numpy_and_scikit_learn(tmp_path, stage):
    module, data, monitor = Encoder(), Pictures(), GeometryMonitor()
    run = trainer(tmp_path, monitor, OnlineKNN(k=1))
    logged = (run.validate if stage == "val" else run.test)(module, data, verbose=False)[0]
    asked = data.val if stage == "val" else data.train
    cosines = cosine_loop(*embedded(module, asked))
    assert logged[f"{stage}/class_cosine"] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert logged[f"{stage}/class_cosine_max"] == pytest.approx(np.max(cosines), rel=1e-5)
    assert logged[f"{stage}/knn"] == pytest.approx(neighbours(module, data.train, asked, k=1))
    centroids = NearestCentroid().fit(*embedded(module, data.train))
    assert logged[f"{stage}/nearest_class_mean"] == pytest.approx(centroids.score(*embedded(module, asked)))
    assert set(logged) == {f"{stage}/{name}" for name in [*GEOMETRY, "knn", "nearest_class_mean"]}
    moments = class_moments(*map(torch.from_numpy, embedded(module, asked)), NUM_CLASSES)
    expected = {f"{stage}/{name}": function(moments).item() for name, function in GEOMETRY.items()}
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(monitor.moments.sums, moments.sums, rtol=1e-5, atol=1e-5)


# of a bank of one image the first process has no share
@pytest.mark.parametrize(("k", "bank_size"), [(5, 50), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_two_processes_log_what_one_logs(tmp_path, k, bank_size):
    values = []
    for options in ({}, {"strategy": "ddp_spawn", "devices": 2}):
        folder = tmp_path / str(len(options))
        callbacks = (GeometryMonitor(), OnlineKNN(k=k, bank_size=bank_size), EmbeddingPlots(max_points=12))
        run = trainer(folder, *callbacks, **options)
        values.append(run.validate(Encoder(), Pictures(), verbose=False)[0])
        assert sorted(path.name for path in (folder / "plots").iterdir()) == [
            "norms.png",
            "scatter.png",
            "similarity.png",
            "spectrum.png",
        ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert len(values[0]) == len(GEOMETRY) + 2


def test_fit_logs_once_an_epoch_and_nothing_of_the_sanity_check(tmp_path):
    module, data, history = Encoder(), Pictures(), History()
    trainer(tmp_path, GeometryMonitor(), OnlineKNN(k=1), history, max_epochs=2).fit(module, data)
    sanity, first, second = history.seen
    assert sanity == {}
    assert set(first) == set(second) == {f"val/{name}" for name in [*GEOMETRY, "knn", "nearest_class_mean"]}
    assert second["val/rms_norm"] < first["val/rms_norm"]  # the loss is the square of the embeddings
    assert second["val/class_cosine"] == pytest.approx(np.mean(cosine_loop(*embedded(module, data.val))), rel=1e-4)
    assert second["val/knn"] == pytest.approx(neighbours(module, data.train, data.val, k=1))


def test_knn_measures_every_n_epochs_and_keeps_its_value_between(tmp_path):
    history, counted = History(), []

    class Counted(Pictures):
        def bank_dataloader(self, limit: int | None = None) -> DataLoader:
            counted.append(self.trainer.current_epoch)
            return super().bank_dataloader(limit)

    trainer(tmp_path, OnlineKNN(every_n_epochs=2), history, max_epochs=5).fit(Encoder(), Counted())
    assert counted == [1, 3]
    values = [seen.get("val/knn") for seen in history.seen]
    assert values[:2] == [None, None]  # sanity check and first epoch
    assert values[2] == values[3]
    assert None not in values[2:]


def test_the_bank_is_embedded_in_eval_mode_and_leaves_the_module_as_it_was(tmp_path):
    class Training(Encoder):
        def on_validation_model_eval(self) -> None:
            self.train()
            self.net[1].eval()  # a part that its owner has frozen

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {"embeddings": batch[0].flatten(1)[:, :4], "labels": batch[1]}

    class Modes(pl.Callback):
        def on_validation_epoch_end(self, run, module):
            assert [part.training for part in module.net] == [True, False, True, True, True]

    module = Training()
    before = module.net[2].running_mean.clone()
    trainer(tmp_path, OnlineKNN(), Modes()).validate(module, Pictures(), verbose=False)
    assert torch.equal(module.net[2].running_mean, before)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_the_bank_is_embedded_in_the_trainers_precision(tmp_path, precision):
    class Watched(Encoder):
        dtypes: frozenset[torch.dtype] = frozenset()

        def embed(self, images: Tensor) -> Tensor:
            embeddings = self.net(images)
            self.dtypes |= {embeddings.dtype}
            return embeddings

    module = Watched()
    run = trainer(tmp_path, GeometryMonitor(), OnlineKNN(k=1), precision=precision)
    logged = run.validate(module, Pictures(), verbose=False)[0]
    assert module.dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float64}
    assert 0 < logged["val/knn"] <= 1


def test_a_module_without_embeddings_is_left_alone(tmp_path):
    class Silent(Encoder):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            return None

    run = trainer(tmp_path, GeometryMonitor(), OnlineKNN(), EmbeddingPlots())
    assert run.validate(Silent(), Pictures(), verbose=False) == [{}]
    assert not (tmp_path / "plots").exists()


def test_pictures_of_every_epoch_and_the_latest(tmp_path):
    logger = TensorBoardLogger(tmp_path / "events", name="", version="")
    callback = EmbeddingPlots(every_n_epochs=2, max_points=7)
    trainer(tmp_path, callback, max_epochs=4, logger=logger, log_every_n_steps=1).fit(Encoder(), Pictures())
    folder, kinds = tmp_path / "plots", ("norms", "scatter", "similarity", "spectrum")
    names = sorted(f"{kind}{tail}.png" for kind in kinds for tail in ("", "_epoch=001", "_epoch=003"))
    assert sorted(path.name for path in folder.glob("*.png")) == names
    for kind in kinds:
        latest = (folder / f"{kind}.png").read_bytes()
        assert latest.startswith(b"\x89PNG")
        assert latest == (folder / f"{kind}_epoch=003.png").read_bytes()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"val/{kind}" for kind in kinds]
    assert len(events.Images("val/scatter")) == 2


def test_snapshots_of_training_show_the_same_images_and_the_means_of_all(tmp_path):
    class Seen(pl.Callback):
        def on_validation_end(self, run, module):
            self.rows, self.labels = embedded(module, Pictures.val)

    seen, callback = Seen(), EmbeddingPlots(every_n_epochs=2, snapshot_points=6)
    run = trainer(tmp_path, callback, seen, max_epochs=4)
    run.fit(Encoder(), Pictures())
    snapshots = load_snapshots(tmp_path / "plots" / "snapshots")
    assert [snapshot.epoch for snapshot in snapshots] == [1, 3]
    assert snapshots[1].step == run.global_step == 2 * snapshots[0].step
    first = [index for label in range(NUM_CLASSES) for index in np.flatnonzero(seen.labels == label)[:2]]
    np.testing.assert_allclose(snapshots[1].points.numpy(), seen.rows[first], rtol=1e-4, atol=1e-6)
    for label in range(NUM_CLASSES):
        of_class = seen.rows[seen.labels == label]
        np.testing.assert_allclose(snapshots[1].means[label].numpy(), of_class.mean(axis=0), rtol=1e-4, atol=1e-6)
        assert snapshots[1].counts[label] == len(of_class)
    assert torch.equal(snapshots[0].labels, snapshots[1].labels)
    assert not torch.equal(snapshots[0].points, snapshots[1].points)


def test_points_are_the_first_of_each_class_over_batches(tmp_path):
    class Kept(EmbeddingPlots):
        def _draw(self, run, moments, points, labels):
            self.points, self.labels, self.moments = points, labels, moments

    module, data, callback = Encoder(), Pictures(), Kept(max_points=6)
    trainer(tmp_path, callback).validate(module, data, verbose=False)
    rows, labels = embedded(module, data.val)
    first = [index for label in range(NUM_CLASSES) for index in np.flatnonzero(labels == label)[:2]]
    np.testing.assert_allclose(callback.points.numpy(), rows[first], rtol=1e-5)
    assert callback.labels.tolist() == labels[first].tolist()
    assert callback.moments.counts.sum() == len(labels)


def test_a_plot_folder_that_cannot_be_written_is_named_before_the_run(tmp_path):
    (tmp_path / "plots").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write to its folder .*plots is a file.*default_root_dir"):
        trainer(tmp_path, EmbeddingPlots(), max_epochs=1).fit(Encoder(), Pictures())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_plot_folder_without_permission_is_named_before_the_run(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write to its folder"):
        trainer(tmp_path, EmbeddingPlots(), max_epochs=1).fit(Encoder(), Pictures())


def test_what_a_callback_misses_is_named(tmp_path):
    class Bare(pl.LightningDataModule):
        def val_dataloader(self) -> DataLoader:
            images, labels = pictures(8, 0).tensors
            return DataLoader(TensorDataset(images.float(), labels), batch_size=8)

    with pytest.raises(ValueError, match=r"GeometryMonitor\(num_classes=...\)"):
        trainer(tmp_path, GeometryMonitor()).validate(Encoder(), Bare())
    for callback, missed in ((OnlineKNN(), "method bank_dataloader"), (EmbeddingPlots(), "attribute class_names")):
        with pytest.raises(TypeError, match=f"needs a data module with the {missed}, got Bare"):
            trainer(tmp_path, callback).validate(Encoder(), Bare())
    with pytest.raises(ValueError, match="k must be at most the 60 images of the bank, got k=61"):
        trainer(tmp_path, OnlineKNN(k=61)).validate(Encoder(), Pictures())
    given = trainer(tmp_path, GeometryMonitor(num_classes=NUM_CLASSES)).validate(Encoder(), Bare(), verbose=False)[0]
    assert given.keys() == {f"val/{name}" for name in GEOMETRY}


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (OnlineKNN, {"k": 0}, "k must be at least 1, got 0"),
        (OnlineKNN, {"k": 20, "bank_size": 10}, "k must be at most bank_size=10, got k=20"),
        (EmbeddingPlots, {"max_points": 0}, "max_points must be at least 1, got 0"),
        (EmbeddingPlots, {"snapshot_points": 0}, "snapshot_points must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(callback, options, message):
    with pytest.raises(ValueError, match=message):
        callback(**options)
