"""Metrics that are not of class moments: uniformity on a sample, nearest class mean, and NC3 with its head."""

import pickle

import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import nn
from torchmetrics import MetricCollection

from simo_lightning.functional.geometry import nc3, uniformity
from simo_lightning.functional.moments import class_moments
from simo_lightning.functional.sketch import empty_sample, merge_samples, sample_entries, sampled_embeddings
from simo_lightning.metrics import NC3, ClassCosine, NearestClassMeanAccuracy, Uniformity
from tests.bounds import UNIT

DIM = 6


def data(n: int = 500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    centers = torch.randn(4, DIM, generator=generator)
    return centers[labels] + torch.randn(n, DIM, generator=generator), labels


def filled(metric, embeddings, batch_size: int):
    for rows in embeddings.split(batch_size):
        metric.update(rows)
    return metric


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniformity_is_exact_while_all_fit_into_the_sample(dtype):
    embeddings, _ = data(n=512)
    found = filled(Uniformity(DIM, sample_size=512, dtype=dtype), embeddings, 100).compute()
    assert found.dtype == dtype
    assert found.item() == pytest.approx(uniformity(embeddings).item(), rel=UNIT if dtype == torch.float32 else 1e-12)


def test_copies_take_one_place_and_are_counted():
    embeddings = data(n=10)[0].repeat_interleave(torch.arange(1, 11), dim=0)  # 55 rows, 10 of them different
    metric = filled(Uniformity(DIM, sample_size=10), embeddings, 7)
    assert metric.compute().item() == pytest.approx(uniformity(embeddings).item(), rel=1e-12)
    assert metric.sample[:, 1].sum() == 55


@pytest.mark.parametrize("batch_size", [1, 64, 500])
def test_the_sample_depends_on_neither_order_nor_batches_nor_merges(batch_size):
    embeddings, _ = data()
    whole = filled(Uniformity(DIM, sample_size=50), embeddings, 500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    parts = [filled(Uniformity(DIM, sample_size=50), embeddings[half], batch_size) for half in order.split(137)]
    merged = merge_samples(torch.stack([part.sample for part in parts]), 50)  # as when processes sync
    assert torch.equal(merged, whole.sample)
    assert merged.shape == (50, DIM + 2)


def test_forward_gives_the_value_of_the_batch_and_keeps_the_whole():
    embeddings, _ = data()
    metric = Uniformity(DIM, sample_size=50)
    for rows in embeddings.split(40):
        assert metric(rows).item() == pytest.approx(uniformity(rows).item())
    assert torch.equal(metric.sample, filled(Uniformity(DIM, sample_size=50), embeddings, 500).sample)
    metric.reset()
    metric.update(embeddings[:1])
    assert metric.compute().isnan()


def test_of_a_sample_it_is_near_the_value_of_all():
    embeddings, _ = data(n=5000)
    whole = uniformity(embeddings).item()
    errors = [abs(filled(Uniformity(DIM, size), embeddings, 1000).compute().item() / whole - 1) for size in (500, 2000)]
    print(f"\nuniformity of 500 and of 2,000 among 5,000: off by {errors[0]:.1%} and {errors[1]:.1%} of its value")
    assert max(errors) < 0.05


def test_the_sample_is_drawn_evenly():
    """Of rows from two clusters, also of ones whose low bits are all zero, each gives its share: within four sigma."""
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(40000, 3, generator=torch.Generator().manual_seed(0))
        rows[30000:] += 10
        kept, counts = sampled_embeddings(merge_samples(sample_entries(rows.to(dtype).double()), 2000), torch.float64)
        assert (counts.sum(), len(kept)) == (pytest.approx(2000, rel=0.05), 2000)
        assert abs((kept[:, 0] > 5).double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_come_back_as_they_went_in(dtype):
    rows = torch.tensor([[-0.0, 1.5], [0.0, 1.5], [-2e-38, 3e38]], dtype=dtype)
    kept, counts = sampled_embeddings(merge_samples(sample_entries(rows), 5), dtype)
    found = {tuple(row): count for row, count in zip(kept.tolist(), counts.tolist(), strict=True)}
    assert found == {(0.0, 1.5): 2, tuple(rows[2].tolist()): 1}  # -0.0 is 0.0
    assert sampled_embeddings(empty_sample(5, 2), dtype)[0].shape == (0, 2)


def test_one_row_that_is_not_finite_is_never_lost():
    embeddings, _ = data()
    embeddings[3, 1] = float("nan")
    assert filled(Uniformity(DIM, sample_size=20), embeddings, 50).compute().isnan()


def test_pickle_keeps_the_sample_and_a_collection_takes_labels():
    embeddings, labels = data()
    metrics = MetricCollection({"uniformity": Uniformity(DIM, 50), "class_cosine": ClassCosine(4, DIM)})
    metrics.update(embeddings[:200], labels[:200])
    again = pickle.loads(pickle.dumps(metrics))
    again.update(embeddings[200:], labels[200:])
    whole = filled(Uniformity(DIM, 50), embeddings, 500)
    assert again.compute()["uniformity"].item() == whole.compute().item()


def test_uniformity_errors_name_the_argument():
    for arguments, message in (
        ({"embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
        ({"embedding_dim": 2, "sample_size": 1}, "sample_size must be at least 2, got 1"),
        ({"embedding_dim": 2, "t": -1.0}, "t must be positive, got -1.0"),
        (
            {"embedding_dim": 2, "dtype": torch.float16},
            "dtype must be torch.float64 or torch.float32, got",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Uniformity(**arguments)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(N, 6\), got \(3, 5\)"):
        Uniformity(6).update(torch.zeros(3, 5))


@pytest.mark.parametrize("batch_size", [1, 500])
def test_nearest_mean_accuracy_is_scikit_learns(batch_size):
    (train, train_labels), (embeddings, labels) = data(), data(seed=0, n=300)
    means = class_moments(train, train_labels, 4).means
    metric = NearestClassMeanAccuracy(means)
    for rows in torch.arange(300).split(batch_size):
        metric.update(embeddings[rows], labels[rows])
    expected = NearestCentroid().fit(train.double().numpy(), train_labels.numpy())
    assert metric.compute().item() == pytest.approx(expected.score(embeddings.double().numpy(), labels.numpy()))
    assert (metric.compute().dtype, metric.means.dtype) == (torch.float64, torch.float64)
    metric.reset()
    assert metric.total == 0


def test_nearest_mean_accuracy_of_nothing_is_undefined_and_errors_name_the_argument():
    metric = NearestClassMeanAccuracy(torch.eye(3), distance="cosine", dtype=torch.float32)
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert metric.compute().isnan()
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) to match embeddings, got \(3,\)"):
        metric.update(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        metric.update(torch.zeros(2, 3), [0, 1])
    with pytest.raises(ValueError, match="means must be a tensor, got list"):
        NearestClassMeanAccuracy([[1.0]])
    with pytest.raises(ValueError, match="means must have a finite row"):
        NearestClassMeanAccuracy(torch.full((3, 2), float("nan")))
    with pytest.raises(ValueError, match="distance must be"):
        NearestClassMeanAccuracy(torch.eye(3), distance="dot")


def test_nc3_follows_the_head_and_is_no_part_of_it():
    embeddings, labels = data()
    head = nn.Linear(DIM, 4)
    metric = NC3(head)
    for rows in torch.arange(500).split(99):
        metric.update(embeddings[rows], labels[rows])
    moments = class_moments(embeddings, labels, 4)
    before = metric.compute().item()
    assert before == pytest.approx(nc3(moments, head.weight).item())
    nn.init.ones_(head.weight)
    assert metric.compute().item() == pytest.approx(nc3(moments, torch.ones(4, DIM)).item())
    assert metric.compute().item() != pytest.approx(before)
    assert list(metric.parameters()) == []
    assert metric.state_dict() == {}
    assert not metric.compute().requires_grad
    with pytest.raises(ValueError, match=r"head must have a weight of shape \(C, D\), got ReLU with None"):
        NC3(nn.ReLU())
