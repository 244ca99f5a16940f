"""Callbacks in real, tiny Trainer runs, with a module and a data module that the package does not know.

Logged values are float64 numbers that Lightning rounds to float32: they are right to one unit of float32's rounding.
"""

import os
import re
import warnings
from itertools import permutations

import lightning.pytorch as pl
import matplotlib
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.callbacks import (
    ClassMomentsCallback,
    CollapseAlarm,
    EmbeddingPlots,
    EmbeddingWriter,
    GeometryMonitor,
    ImagesPerSecond,
    OnlineKNN,
    OnlineProbe,
)
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import load_snapshots
from tests.bounds import UNIT
from tests.callback_parts import (
    NUM_CLASSES,
    Encoder,
    History,
    Pictures,
    Returned,
    cosine_loop,
    embedded,
    neighbours,
    trainer,
)
from tests.rank_processes import saved, start_ranks

KNN = ("knn", "nearest_class_mean", "knn_macro", "nearest_class_mean_macro")


@pytest.mark.parametrize("stage", ["val", "test"])
def test_values_are_those_of_numpy_and_scikit_learn(tmp_path, stage):
    module, data, monitor, returned = Encoder(), Pictures(), GeometryMonitor(), Returned()
    run = trainer(tmp_path, monitor, OnlineKNN(k=1), returned)
    logged = (run.validate if stage == "val" else run.test)(module, data, verbose=False)[0]
    asked = data.val if stage == "val" else data.train
    cosines = cosine_loop(returned.rows, returned.labels)
    assert logged[f"{stage}/class_cosine"] == pytest.approx(np.mean(cosines), rel=UNIT)
    assert logged[f"{stage}/class_cosine_max"] == pytest.approx(np.max(cosines), rel=UNIT)
    assert logged[f"{stage}/knn"] == pytest.approx(neighbours(module, data.train, asked, k=1))
    (bank, bank_labels), (queries, labels) = (embedded(module, images) for images in (data.train, asked))
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    means = np.stack([unit[bank_labels == label].mean(0) for label in range(NUM_CLASSES)])
    nearest = (queries @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
    assert logged[f"{stage}/nearest_class_mean"] == pytest.approx(np.mean(nearest == labels))
    assert set(logged) == {f"{stage}/{name}" for name in [*GEOMETRY, *KNN]}
    expected = {f"{stage}/{name}": metric(returned.moments()).item() for name, metric in GEOMETRY.items()}
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=UNIT)
    torch.testing.assert_close(monitor.moments.sums, returned.moments().sums, rtol=1e-12, atol=1e-12)


def log(folder, k, bank_size, world=1):
    callbacks = (GeometryMonitor(), OnlineKNN(k=k, bank_size=bank_size), EmbeddingPlots(max_points=12))
    options = {"strategy": "ddp", "devices": world} if world > 1 else {}
    run = trainer(folder, *callbacks, precision="64-true", **options)  # so that batches of other sizes agree
    values = run.validate(Encoder(), Pictures(), verbose=False)[0]
    torch.save(values, folder / f"logged.{run.global_rank}.pt")


# of a bank of one image the first process has no share
@pytest.mark.parametrize(("k", "bank_size"), [(5, 50), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_two_processes_log_what_one_logs(tmp_path, k, bank_size):
    log(tmp_path / "1", k, bank_size)
    assert start_ranks(2, log, tmp_path / "2", k, bank_size, 2) == [0, 0]
    ((one,), (first, second)) = (saved(tmp_path / str(world), "logged", world) for world in (1, 2))
    for world in "12":
        drawn = {path.name for path in (tmp_path / world / "plots").iterdir()}
        assert drawn == {"norms.png", "scatter.png", "similarity.png", "spectrum.png"}
    assert first == second == pytest.approx(one, rel=UNIT)
    assert len(one) == len(GEOMETRY) + len(KNN)


def test_fit_logs_once_an_epoch_and_nothing_of_the_sanity_check(tmp_path):
    module, data, history, returned = Encoder(), Pictures(), History(), Returned()
    trainer(tmp_path, GeometryMonitor(), OnlineKNN(k=1), history, returned, max_epochs=2).fit(module, data)
    sanity, first, second = history.seen
    assert sanity == {}
    assert set(first) == set(second) == {f"val/{name}" for name in [*GEOMETRY, *KNN]}
    assert second["val/rms_norm"] < first["val/rms_norm"]  # the loss is the square of the embeddings
    cosines = cosine_loop(returned.rows, returned.labels)
    assert second["val/class_cosine"] == pytest.approx(np.mean(cosines), rel=UNIT)
    assert second["val/knn"] == pytest.approx(neighbours(module, data.train, data.val, k=1))


def test_knn_evaluates_every_n_epochs_and_keeps_its_value_between(tmp_path):
    history, counted = History(), []

    class Counted(Pictures):
        def bank_dataloader(self, limit: int | None = None) -> DataLoader:
            counted.append(self.trainer.current_epoch)
            return super().bank_dataloader(limit)

    trainer(tmp_path, OnlineKNN(bank_size=None, every_n_epochs=2), history, max_epochs=5).fit(Encoder(), Counted())
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
    class Recording(Encoder):
        dtypes: frozenset[torch.dtype] = frozenset()

        def embed(self, images: Tensor) -> Tensor:
            embeddings = self.net(images)
            self.dtypes |= {embeddings.dtype}
            return embeddings

    module = Recording()
    run = trainer(tmp_path, GeometryMonitor(), OnlineKNN(k=1), precision=precision)
    logged = run.validate(module, Pictures(), verbose=False)[0]
    assert module.dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float64}
    assert 0 < logged["val/knn"] <= 1


def test_a_validation_step_without_embeddings_is_named_after_its_first_batch(tmp_path):
    class Silent(Encoder):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
            assert batch_idx == 0
            return {"loss": batch[0].float().mean()}

    for callback in (GeometryMonitor(), OnlineKNN(), EmbeddingPlots()):
        with pytest.raises(ValueError) as raised:
            trainer(tmp_path, callback).validate(Silent(), Pictures())
        assert str(raised.value) == (
            f"{type(callback).__name__} requires that Silent.validation_step returns a dictionary with embeddings "
            "(N, D) and labels (N,), got a dictionary with loss"
        )
    assert not (tmp_path / "plots").exists()


def test_a_callback_that_nobody_asked_for_is_silent_without_embeddings(tmp_path):
    class Silent(Encoder):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            return None

    callbacks = [GeometryMonitor(), OnlineKNN(), EmbeddingPlots()]
    for callback in callbacks:
        callback.required = False
    assert trainer(tmp_path, *callbacks).validate(Silent(), Pictures(), verbose=False) == [{}]
    assert not (tmp_path / "plots").exists()


def test_pictures_of_every_epoch_and_the_latest(tmp_path):
    logger = TensorBoardLogger(tmp_path / "events", name="", version="")
    callback = EmbeddingPlots(every_n_epochs=2, max_points=7)
    trainer(tmp_path, callback, max_epochs=4, logger=logger, log_every_n_steps=1).fit(Encoder(), Pictures())
    folder, pictures = tmp_path / "plots", ("norms", "scatter", "similarity", "spectrum")
    names = sorted(f"{picture}{tail}.png" for picture in pictures for tail in ("", "_epoch=001", "_epoch=003"))
    assert sorted(path.name for path in folder.glob("*.png")) == names
    for picture in pictures:
        latest = (folder / f"{picture}.png").read_bytes()
        assert latest.startswith(b"\x89PNG")
        assert latest == (folder / f"{picture}_epoch=003.png").read_bytes()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"val/{picture}" for picture in pictures]
    assert len(events.Images("val/scatter")) == 2


def test_frames_of_training_show_the_same_images_and_the_means_of_all(tmp_path):
    returned, callback = Returned(), EmbeddingPlots(every_n_epochs=2, snapshot_points=6)
    run = trainer(tmp_path, callback, returned, max_epochs=4)
    run.fit(Encoder(), Pictures())
    snapshots = load_snapshots(tmp_path / "plots" / "snapshots")
    assert [snapshot.epoch for snapshot in snapshots] == [1, 3]
    assert snapshots[1].step == run.global_step == 2 * snapshots[0].step
    first = [index for label in range(NUM_CLASSES) for index in np.flatnonzero(returned.labels == label)[:2]]
    assert snapshots[1].points.double().numpy().tolist() == returned.rows[first].tolist()
    # means are kept in float32: half a unit of rounding
    torch.testing.assert_close(snapshots[1].means.double(), returned.moments().means, rtol=UNIT, atol=0)
    assert snapshots[1].counts.tolist() == np.bincount(returned.labels).tolist()
    assert torch.equal(snapshots[0].labels, snapshots[1].labels)
    assert not torch.equal(snapshots[0].points, snapshots[1].points)


def test_points_are_the_first_of_each_class_over_batches(tmp_path):
    class Kept(EmbeddingPlots):
        def _draw(self, run, moments, points, labels):
            self.points, self.labels, self.moments = points, labels, moments

    returned, callback = Returned(), Kept(max_points=6)
    trainer(tmp_path, callback, returned).validate(Encoder(), Pictures(), verbose=False)
    first = [index for label in range(NUM_CLASSES) for index in np.flatnonzero(returned.labels == label)[:2]]
    assert callback.points.double().numpy().tolist() == returned.rows[first].tolist()
    assert callback.labels.tolist() == returned.labels[first].tolist()
    assert callback.moments.counts.sum() == len(returned.labels)


def of_plots(caught: list[warnings.WarningMessage]) -> list[str]:
    """The warnings of EmbeddingPlots, sorted; Lightning has some of its own."""
    return sorted(str(warning.message) for warning in caught if "EmbeddingPlots" in str(warning.message))


def test_a_plot_folder_that_cannot_be_written_is_named_at_start_and_the_run_continues(tmp_path):
    (tmp_path / "plots").touch()
    run = trainer(tmp_path, EmbeddingPlots(), GeometryMonitor(), max_epochs=2)
    with pytest.warns(UserWarning, match="EmbeddingPlots") as caught:
        run.fit(Encoder(), Pictures())
    (message,) = of_plots(caught)
    assert re.search(r"cannot write to its folder .*: .*plots is a file; change default_root_dir", message)
    assert run.current_epoch == 2
    assert run.callback_metrics.keys() == {f"val/{name}" for name in GEOMETRY}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_plot_folder_without_permission_is_named_at_start_and_the_run_continues(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="cannot write to its folder .*: no permission in"):
        trainer(tmp_path, EmbeddingPlots(), max_epochs=1).fit(Encoder(), Pictures())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_picture_that_cannot_be_written_is_named_once_and_the_run_continues(tmp_path):
    folder = tmp_path / "plots"
    (folder / "scatter.png").mkdir(parents=True)
    (folder / "similarity.png").symlink_to("/dev/full")
    run = trainer(tmp_path, EmbeddingPlots(), max_epochs=2)
    with pytest.warns(UserWarning, match="EmbeddingPlots") as caught:
        run.fit(Encoder(), Pictures())
    taken, full = of_plots(caught)
    assert re.search(r"cannot draw similarity: OSError: .*No space left on device; training continues", full)
    assert re.search(r"cannot draw scatter: IsADirectoryError: .*scatter\.png'; training continues", taken)
    assert run.current_epoch == 2
    assert (folder / "norms_epoch=001.png").is_file()
    assert (folder / "snapshots" / "epoch=001.npz").is_file()


def test_a_picture_that_cannot_be_drawn_is_named_once_and_the_run_goes_on(tmp_path):
    run = trainer(tmp_path, EmbeddingPlots(), max_epochs=2)
    too_fine = matplotlib.rc_context({"savefig.dpi": 1e7})  # a setting that matplotlib takes and cannot follow
    with too_fine, pytest.warns(UserWarning, match="EmbeddingPlots") as caught:
        run.fit(Encoder(), Pictures())
    messages = of_plots(caught)
    assert len(messages) == 4
    for picture in ("similarity", "scatter", "spectrum", "norms"):
        assert any(f"cannot draw {picture}: " in message and "Image size of" in message for message in messages)
    assert run.current_epoch == 2


class KeptMoments(ClassMomentsCallback):
    """Keeps the moments of each evaluation by stage."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.kept: list[tuple[str, ClassMoments]] = []

    def evaluate(self, run, stage, moments):
        self.kept.append((stage, moments))
        return {}


class TwoLoaders(Pictures):
    def val_dataloader(self) -> list[DataLoader]:
        return [self.loader(self.val), self.loader(self.train)]


class Plain(Encoder):
    """Returns embeddings in training too, and takes the number of the loader."""

    def training_step(self, batch, batch_idx):
        embeddings = self.embed(batch[0])
        return {"loss": embeddings.square().mean(), "embeddings": embeddings, "labels": batch[1]}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"embeddings": self.embed(batch[0]), "labels": batch[1]}


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_moments_are_summed_once_for_all_callbacks_in_any_order(tmp_path, order):
    first, second, plots, returned = KeptMoments(), KeptMoments(num_classes=NUM_CLASSES), EmbeddingPlots(), Returned()
    callbacks = (first, second, plots)
    run = trainer(tmp_path, *(callbacks[index] for index in order), returned)
    run.validate(Plain(), TwoLoaders(), verbose=False)
    ((stage, moments),), ((_, same),) = first.kept, second.kept
    assert stage == "val"
    assert same is moments
    assert moments.counts.sum() == 100
    for name, expected in returned.moments().tensors().items():
        torch.testing.assert_close(getattr(moments, name), expected, rtol=1e-12, atol=1e-12)


def test_callbacks_evaluate_in_their_own_epochs_and_share_those_in_common(tmp_path):
    every, second, third = KeptMoments(), KeptMoments(every_n_epochs=2), KeptMoments(every_n_epochs=3)
    trainer(tmp_path, second, every, third, max_epochs=6).fit(Plain(), Pictures())
    assert [len(callback.kept) for callback in (every, second, third)] == [6, 3, 2]
    for epoch, (_, moments) in enumerate(every.kept):
        assert moments.counts.sum() == 40
        if epoch % 2 == 1:
            assert second.kept[epoch // 2][1] is moments
        if epoch % 3 == 2:
            assert third.kept[epoch // 3][1] is moments


def test_windows_of_training_are_shared_where_they_are_equally_long(tmp_path):
    one, same, other = KeptMoments(every_n_steps=3), KeptMoments(every_n_steps=3), KeptMoments(every_n_steps=2)
    trainer(tmp_path, one, other, same, max_epochs=3, limit_val_batches=0).fit(Plain(), Pictures())  # 4 steps an epoch
    assert [len(callback.kept) for callback in (one, same, other)] == [4, 4, 6]
    assert all(mine[1] is theirs[1] for mine, theirs in zip(one.kept, same.kept, strict=True))
    assert {stage for stage, _ in one.kept + other.kept} == {"train"}
    sizes = [16, 16, 16, 12] * 3
    assert [int(moments.counts.sum()) for _, moments in one.kept] == [sum(sizes[i : i + 3]) for i in range(0, 12, 3)]
    assert [int(moments.counts.sum()) for _, moments in other.kept] == [sum(sizes[i : i + 2]) for i in range(0, 12, 2)]


def test_classes_of_another_number_are_summed_apart(tmp_path):
    three, five = KeptMoments(), KeptMoments(num_classes=5)
    trainer(tmp_path, three, five).validate(Plain(), Pictures(), verbose=False)
    assert [len(moments.counts) for callback in (three, five) for _, moments in callback.kept] == [3, 5]
    assert three.kept[0][1].counts.sum() == five.kept[0][1].counts.sum() == 40


def plain(value: object) -> bool:
    """Whether a checkpoint holds it as plain data: no NumPy number, no object."""
    if isinstance(value, dict):
        return all(plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def test_the_states_of_callbacks_are_plain_data(tmp_path):
    probe = OnlineProbe(lr=np.float64(0.01), every_n_epochs=np.int64(1))
    alarm = CollapseAlarm(after_epochs=np.int64(0), min_separation=np.float32(50))
    callbacks = [probe, alarm, GeometryMonitor(), OnlineKNN(k=np.int64(1)), EmbeddingPlots(), ImagesPerSecond()]
    run = trainer(tmp_path, *callbacks, max_epochs=3)
    with pytest.warns(UserWarning, match="all 3 classes merged"):
        run.fit(Plain(), Pictures())
    states = [callback.state_dict() for callback in callbacks]
    assert states[0]["head"]
    assert states[1]["reported"]["val"]
    assert all(plain(dict(state)) for state in ({**states[0], "head": dict(states[0]["head"])}, *states[1:]))
    torch.save(states, tmp_path / "states.pt")
    assert len(torch.load(tmp_path / "states.pt", weights_only=True)) == len(callbacks)


def test_a_k_beyond_the_bank_is_named_in_validation(tmp_path):
    with pytest.raises(ValueError, match="k must be at most the 60 images of the bank, got k=61"):
        trainer(tmp_path, OnlineKNN(k=61)).validate(Encoder(), Pictures())


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (OnlineKNN, {"k": 0}, "k must be at least 1, got 0"),
        (OnlineKNN, {"k": 20, "bank_size": 10}, "k must be at most bank_size=10, got k=20"),
        (EmbeddingPlots, {"max_points": 0}, "max_points must be at least 1, got 0"),
        (EmbeddingPlots, {"snapshot_points": 0}, "snapshot_points must be at least 1, got 0"),
        (EmbeddingPlots, {"projection": "lda"}, "projection must be one of pca, tsne, umap, got 'lda'"),
    ],
)
def test_numbers_out_of_range_are_named(callback, options, message):
    with pytest.raises(ValueError, match=message):
        callback(**options)


def test_a_k_beyond_the_bank_is_refused_before_training(tmp_path):
    history = History()
    with pytest.raises(ValueError, match="k must be at most the 60 images of the bank, got k=61"):
        trainer(tmp_path, OnlineKNN(k=61), history, max_epochs=1, num_sanity_val_steps=0).fit(Encoder(), Pictures())
    assert history.seen == []


def test_predictions_without_embeddings_are_not_written(tmp_path):
    class Numbers(Encoder):
        def predict_step(self, batch, batch_idx):
            return batch[1]

    with pytest.raises(ValueError, match="a dictionary with embeddings and labels, of one data loader, got Tensor"):
        trainer(tmp_path, EmbeddingWriter()).predict(Numbers(), DataLoader(Pictures().val, batch_size=16))


def test_images_of_other_batches_are_not_counted(tmp_path):
    class Named(Encoder):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"].float(), None), batch_idx)

        def validation_step(self, batch, batch_idx):
            return None

    images = [{"image": image} for image in Pictures().train.tensors[0]]
    run = trainer(tmp_path, ImagesPerSecond(), max_epochs=1)
    run.fit(Named(), DataLoader(images, 16), DataLoader(images, 16))
    assert "train/images_per_second" not in run.callback_metrics
