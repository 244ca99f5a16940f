"""Geometry metrics against the pure functions: in batches, out of order, after a reset, pickled, over processes."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import class_moments
from simo_lightning.metrics import ClassMomentsMetric, EffectiveRank, Orthogonality, geometry_metrics

NUM_CLASSES, DIM = 4, 6


def data(n: int = 101, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (n,), generator=generator)
    centers = torch.randn(NUM_CLASSES, DIM, generator=generator)
    return centers[labels] + 0.3 * torch.randn(n, DIM, generator=generator), labels


def expected(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    moments = class_moments(embeddings, labels, NUM_CLASSES)
    return {name: function(moments).item() for name, function in GEOMETRY.items()}


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize("batch_size", [1, 10, 101])
def test_batches_add_up_in_any_order(batch_size):
    embeddings, labels = data()
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for rows in order.split(batch_size):
        metrics.update(embeddings[rows], labels[rows])
    assert floats(metrics.compute()) == pytest.approx(expected(embeddings, labels), rel=1e-10)


def test_collection_accumulates_once_from_the_first_update_on(monkeypatch):
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    batches = []

    def watched(*arguments):
        batches.append(arguments)
        return class_moments(*arguments)

    monkeypatch.setattr("simo_lightning.metrics.class_moments", watched)
    for seed in range(3):
        metrics.update(*data(seed=seed))
    assert len(batches) == 3
    assert len({metric.second.data_ptr() for metric in metrics.values(copy_state=False)}) == 1


def test_every_function_has_its_metric():
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    assert list(metrics.keys()) == list(GEOMETRY)
    lower = {name for name, metric in metrics.items() if metric.higher_is_better is False}
    assert {name for name, metric in metrics.items() if metric.higher_is_better} == {"effective_rank"}
    assert lower == set(GEOMETRY) - {"effective_rank", "rms_norm"}
    assert not any(metric.is_differentiable or metric.full_state_update for metric in metrics.values())


def test_reset_forgets():
    metric = Orthogonality(NUM_CLASSES, DIM)
    metric.update(*data(seed=1))
    metric.compute()
    metric.reset()
    assert metric.moments.counts.sum() == 0
    metric.update(*data())
    assert metric.compute().item() == pytest.approx(expected(*data())["orthogonality"])


def test_forward_gives_the_value_of_the_batch_and_keeps_the_whole():
    embeddings, labels = data()
    metric = EffectiveRank(NUM_CLASSES, DIM)
    first = metric(embeddings[:50], labels[:50])
    assert first.item() == pytest.approx(expected(embeddings[:50], labels[:50])["effective_rank"])
    metric(embeddings[50:], labels[50:])
    assert metric.compute().item() == pytest.approx(expected(embeddings, labels)["effective_rank"])


def test_pickle_keeps_the_state():
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    embeddings, labels = data()
    metrics.update(embeddings[:50], labels[:50])
    again = pickle.loads(pickle.dumps(metrics))
    again.update(embeddings[50:], labels[50:])
    assert floats(again.compute()) == pytest.approx(expected(embeddings, labels))


def test_updates_in_inference_mode_mix_with_others():
    embeddings, labels = data()
    metric = Orthogonality(NUM_CLASSES, DIM)
    with torch.inference_mode():
        metric.update(embeddings[:50], labels[:50])
    metric.update(embeddings[50:].requires_grad_(), labels[50:])
    assert metric.compute().item() == pytest.approx(expected(embeddings.detach(), labels)["orthogonality"])
    assert not metric.sums.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float64_whatever_the_embeddings(dtype):
    embeddings, labels = data()
    metric = Orthogonality(NUM_CLASSES, DIM)
    metric.half().update(embeddings.to(dtype), labels)
    assert metric.sums.dtype == torch.float64
    assert metric.compute().item() == pytest.approx(expected(embeddings.to(dtype), labels)["orthogonality"])


def test_float32_sums_for_devices_without_float64():
    embeddings, labels = data()
    metrics = geometry_metrics(NUM_CLASSES, DIM, dtype=torch.float32)
    metrics.update(embeddings, labels)
    found = metrics.compute()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert floats(found) == pytest.approx(expected(embeddings, labels), rel=1e-4)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        Orthogonality(0, 4)
    with pytest.raises(ValueError, match=r"1 GiB of torch.float64, got 1000 \* 512\^2 = 2.0 GiB"):
        Orthogonality(1000, 512)
    metric = Orthogonality(NUM_CLASSES, DIM)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(N, 6\), got \(3, 5\)"):
        metric.update(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
        metric.update(torch.zeros(3, 6), torch.tensor([0, 1, 4]))


def sync(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    embeddings, labels = data()
    own = slice(0, 31) if rank == 0 else slice(31, None)
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    metrics.update(embeddings[own], labels[own])
    found = floats(metrics.compute())
    local = metrics["nc1"].moments.counts.sum().item()
    lone = ClassMomentsMetric(NUM_CLASSES, DIM)
    if rank == 0:  # the other process has seen nothing
        lone.update(embeddings, labels)
    with lone.sync_context():
        whole = lone.moments
    torch.save((found, local, whole._asdict()), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_would(tmp_path):
    torch.multiprocessing.spawn(sync, (str(tmp_path),), nprocs=2)
    embeddings, labels = data()
    for rank, rows in ((0, 31), (1, 70)):
        found, local, whole = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(expected(embeddings, labels), rel=1e-10)
        assert local == rows
        for name, value in class_moments(embeddings, labels, NUM_CLASSES)._asdict().items():
            torch.testing.assert_close(whole[name], value)
