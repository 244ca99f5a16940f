"""Geometry metrics against the pure functions: in batches, out of order, after a reset, pickled, over processes."""

import pickle
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor

from simo_lightning import metrics as metrics_module
from simo_lightning.functional.geometry import GEOMETRY, geometry_metric, subspace_overlap
from simo_lightning.functional.moments import ClassMoments, class_moments
from simo_lightning.metrics import (
    NC3,
    ClassCosine,
    ClassMomentsMetric,
    EffectiveRank,
    NearestClassMeanAccuracy,
    RMSNorm,
    SubspaceOverlap,
    Uniformity,
    geometry_metrics,
    metric_class,
)
from tests.bounds import UNIT
from tests.rank_processes import start_ranks

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

    add = ClassMoments.add_

    def watched(*arguments):
        batches.append(arguments)
        add(*arguments)

    monkeypatch.setattr(ClassMoments, "add_", watched)
    for seed in range(3):
        metrics.update(*data(seed=seed))
    assert len(batches) == 3
    assert len({metric.second.data_ptr() for metric in metrics.values(copy_state=False)}) == 1


def test_every_declared_metric_has_its_class():
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    assert list(metrics.keys()) == sorted(GEOMETRY)
    for name, metric in metrics.items():
        declared = GEOMETRY[name]
        assert type(metric) is getattr(metrics_module, declared.class_name)
        assert declared.class_name in metrics_module.__all__
        assert metric.higher_is_better == {"higher": True, "lower": False, "neither": None}[declared.better]
        assert declared.meaning in type(metric).__doc__
    assert not any(metric.is_differentiable or metric.full_state_update for metric in metrics.values())


def test_a_class_can_be_subclassed():
    class Rounded(ClassCosine):
        def compute(self):
            return super().compute().round(decimals=1)

    metric = Rounded(NUM_CLASSES, DIM)
    metric.update(*data())
    assert metric.compute().item() == round(expected(*data())["class_cosine"], 1)


@geometry_metric(interval=">= 0", better="higher", undefined="no embeddings", class_name="OwnMetric")
def own_metric(moments: ClassMoments) -> Tensor:
    """Largest count of a class: ``max_c n_c``."""
    return moments.counts.max()


OWN = GEOMETRY.pop("own_metric")  # back in the test of it: the other tests are about the metrics of the package


def test_a_metric_declared_elsewhere_has_a_class_too(monkeypatch):
    with pytest.raises(ValueError, match="function must be declared with @geometry_metric, got own_metric"):
        metric_class(own_metric)
    monkeypatch.setitem(GEOMETRY, "own_metric", OWN)
    made = metric_class(own_metric)
    monkeypatch.setattr(sys.modules[__name__], "OwnMetric", made, raising=False)  # as `OwnMetric = metric_class(...)`
    metric = made(NUM_CLASSES, DIM)
    assert (repr(metric), metric.higher_is_better) == ("OwnMetric()", True)
    metric.update(torch.zeros(3, DIM), torch.tensor([0, 1, 1]))
    assert pickle.loads(pickle.dumps(metric)).compute() == 2
    assert type(geometry_metrics(NUM_CLASSES, DIM)["own_metric"]) is made


def classes_on_the_way(toward: str, share: float) -> tuple[Tensor, Tensor]:
    """Classes that get better from share 0 to 1: their means go orthogonal, or their spread small."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(300) % 5
    worst = 1 + 0.3 * torch.randn(5, 8, generator=generator, dtype=torch.float64)  # all lean to one side
    worst[1] = worst[0] + 0.01  # and two are merged
    noise = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    ideal = 3 * torch.eye(5, 8, dtype=torch.float64)
    if toward == "orthogonal":
        return ((1 - share) * worst + share * ideal)[labels] + 0.1 * noise, labels
    return (0.2 * worst + 0.8 * ideal)[labels] + (2 - 1.8 * share) * noise, labels


def new_metric(name: str) -> ClassMomentsMetric | Uniformity | NearestClassMeanAccuracy:
    if name == "Uniformity":
        return Uniformity(8, sample_size=512)
    if name == "NearestClassMeanAccuracy":
        return NearestClassMeanAccuracy(torch.eye(5, 8))
    if name == "NC3":
        head = torch.nn.Linear(8, 5)
        torch.nn.init.eye_(head.weight)
        head.weight.data -= head.weight.data.mean(dim=0)
        return NC3(head)
    return getattr(metrics_module, name)(5, 8)


OF_SEARCH = {"FPRAtRecall", "MAPAtR", "RPrecision", "RecallAtK"}  # in test_retrieval and test_unknown
CLASSES = sorted(set(metrics_module.__all__) - {"geometry_metrics", "metric_class"} - OF_SEARCH)
DECLARED = {metric.class_name: metric for metric in GEOMETRY.values()}
OF_SPREAD = {"NearestClassMeanAccuracy"} | {
    name for name, metric in DECLARED.items() if metric.function.__module__.endswith("geometry.spread")
}


@pytest.mark.parametrize("name", CLASSES)
def test_better_geometry_moves_it_the_way_it_says(name):
    better = new_metric(name).higher_is_better
    toward = "tight" if name in OF_SPREAD else "orthogonal"
    values = []
    for share in (0.0, 0.3, 0.6, 1.0):
        metric = new_metric(name)
        metric.update(*classes_on_the_way(toward, share))
        values.append(metric.compute().sum().item())
    if better is None:
        assert name == "ClassMomentsMetric" or DECLARED[name].better == "neither"
    else:
        gains = [(after - before) * (1 if better else -1) for before, after in pairwise(values)]
        assert sum(gains) > 0.05 * max(map(abs, values))
        assert min(gains) > -0.01 * sum(gains)  # CenteredCosine dips by 0.3 % below its value in a simplex


def test_subspace_overlap_keeps_its_directions():
    embeddings, labels = data()
    metric = pickle.loads(pickle.dumps(SubspaceOverlap(NUM_CLASSES, DIM, directions=3)))
    metric.update(embeddings, labels)
    moments = class_moments(embeddings, labels, NUM_CLASSES)
    assert metric.compute().item() == pytest.approx(subspace_overlap(moments, 3).item())
    assert metric.compute().item() != pytest.approx(subspace_overlap(moments, 2).item())
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        SubspaceOverlap(NUM_CLASSES, DIM, directions=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'direction'"):
        SubspaceOverlap(NUM_CLASSES, DIM, direction=2)


def test_reset_forgets():
    metric = ClassCosine(NUM_CLASSES, DIM)
    metric.update(*data(seed=1))
    metric.compute()
    metric.reset()
    assert metric.moments.counts.sum() == 0
    metric.update(*data())
    assert metric.compute().item() == pytest.approx(expected(*data())["class_cosine"])


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
    metric = ClassCosine(NUM_CLASSES, DIM)
    with torch.inference_mode():
        metric.update(embeddings[:50], labels[:50])
    metric.update(embeddings[50:].requires_grad_(), labels[50:])
    assert metric.compute().item() == pytest.approx(expected(embeddings.detach(), labels)["class_cosine"])
    assert not metric.sums.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float64_whatever_the_embeddings(dtype):
    embeddings, labels = data()
    metric = ClassCosine(NUM_CLASSES, DIM)
    metric.half().update(embeddings.to(dtype), labels)
    assert metric.sums.dtype == torch.float64
    assert metric.compute().item() == pytest.approx(expected(embeddings.to(dtype), labels)["class_cosine"])


def test_float32_sums_for_devices_without_float64():
    """A sum of n terms errs by n units at most, and a spread is what is left of a squared norm: n |e|^2 / s^2 units."""
    embeddings, labels = data()
    metrics = geometry_metrics(NUM_CLASSES, DIM, dtype=torch.float32)
    metrics.update(embeddings, labels)
    found = metrics.compute()
    assert {value.dtype for value in found.values()} == {torch.float32}
    units = len(labels) * embeddings.square().sum(dim=1).mean().item() / 0.3**2
    assert floats(found) == pytest.approx(expected(embeddings, labels), rel=units * UNIT)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        ClassCosine(0, 4)
    with pytest.raises(ValueError, match=r"4 GiB of torch.float64, got \(1000000 \+ 1024\) \* 1024 = 7.6 GiB"):
        ClassCosine(1_000_000, 1024)
    with pytest.raises(
        ValueError, match=r"^SubspaceOverlap requires .* second moments of 1,000 classes in 512 .* 2,097 MB"
    ):
        SubspaceOverlap(1000, 512)
    assert SubspaceOverlap(2, 512, second_budget_mb=5).second.shape == (2, 512, 512)
    metric = ClassCosine(NUM_CLASSES, DIM)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(N, 6\), got \(3, 5\)"):
        metric.update(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        metric.update(torch.zeros(3, 6), [0, 1, 2])
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
        metric.update(torch.zeros(3, 6), torch.tensor([0, 1, 4]))


def test_metrics_above_the_budget_are_left_out_of_the_collection_with_one_line(caplog):
    embeddings, labels = data()
    with caplog.at_level("INFO"):
        metrics = geometry_metrics(NUM_CLASSES, DIM, second_budget_mb=0)
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "not computed: participation_ratio, subspace_ove"
    ]
    metrics.update(embeddings, labels)
    alone = {name: value for name, value in expected(embeddings, labels).items() if name in metrics}
    assert len(alone) == 14
    assert floats(metrics.compute()) == pytest.approx(alone, rel=1e-10)


def test_a_metric_goes_on_after_a_reset_in_inference_mode():
    metric, (embeddings, labels) = EffectiveRank(NUM_CLASSES, DIM), data()
    with torch.inference_mode():
        metric.update(embeddings, labels)
        metric.reset()
    metric.update(embeddings, labels)
    assert metric.compute().item() == pytest.approx(expected(embeddings, labels)["effective_rank"], rel=1e-10)


def test_float32_metrics_do_not_lose_digits_with_the_number_of_batches():
    """Against float64 sums of the same numbers; of 500 batches."""
    embeddings, labels = data(2_000)
    metric, exact = RMSNorm(NUM_CLASSES, DIM, torch.float32), RMSNorm(NUM_CLASSES, DIM)
    for rows in torch.arange(2_000).split(4):
        metric.update(embeddings[rows], labels[rows])
        exact.update(embeddings[rows], labels[rows])
    assert metric.compute().item() == pytest.approx(exact.compute().item(), rel=4 * UNIT)
    assert metric.moments.counts.tolist() == exact.moments.counts.tolist()


def sync(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    embeddings, labels = data()
    own = slice(0, 31) if rank == 0 else slice(31, None)
    metrics = geometry_metrics(NUM_CLASSES, DIM)
    metrics.update(embeddings[own], labels[own])
    found = floats(metrics.compute())
    local = metrics["nc1"].moments.counts.sum().item()
    lone = ClassMomentsMetric(NUM_CLASSES, DIM, second_budget_mb=1)
    if rank == 0:  # the other process has seen nothing
        lone.update(embeddings, labels)
    with lone.sync_context():
        whole = lone.moments
    sample, nearest = Uniformity(DIM, sample_size=40), NearestClassMeanAccuracy(torch.eye(NUM_CLASSES, DIM))
    for metric in (sample, nearest):
        metric.update(embeddings[own], labels[own])
        found[type(metric).__name__] = metric.compute().item()
    assert (len(sample.sample), int(nearest.total)) == (40, len(labels[own]))  # one's own again after the sync
    torch.save((found, local, whole.tensors()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_would(tmp_path):
    assert start_ranks(2, sync, tmp_path) == [0, 0]
    embeddings, labels = data()
    alone = expected(embeddings, labels)
    for metric in (Uniformity(DIM, sample_size=40), NearestClassMeanAccuracy(torch.eye(NUM_CLASSES, DIM))):
        metric.update(embeddings, labels)
        alone[type(metric).__name__] = metric.compute().item()
    for rank, rows in ((0, 31), (1, 70)):
        found, local, whole = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(alone, rel=1e-10)
        assert local == rows
        for name, value in class_moments(embeddings, labels, NUM_CLASSES).tensors().items():
            torch.testing.assert_close(whole[name], value)
