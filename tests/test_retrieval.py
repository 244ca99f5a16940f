"""Retrieval against pytorch-metric-learning's AccuracyCalculator and against explicit loops in float64."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection
from torchmetrics.retrieval import RetrievalRPrecision

from simo_lightning.functional import average_scores, map_at_r, r_precision, recall_at_k, retrieval_scores
from simo_lightning.metrics import MAPAtR, RecallAtK, RPrecision
from tests.rank_processes import saved, start_ranks

NAMES = {"precision_at_1": 0, "r_precision": 1, "mean_average_precision_at_r": 2}


def ragged(seed: int = 0, dim: int = 12) -> tuple[Tensor, Tensor]:
    """Classes of 1 to 24 images that overlap, shuffled; classes 3 and 9 have one image each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([24, 2, 7, 1, 15, 3, 11, 5, 2, 1, 18, 9])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    centers = torch.randn(len(sizes), dim, generator=generator)
    embeddings = 0.6 * centers[labels] + torch.randn(len(labels), dim, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return normalize(embeddings[order], dim=1), labels[order]


def ours(*data: Tensor, **options) -> list[Tensor]:
    return [recall_at_k(*data, k=1, **options), r_precision(*data, **options), map_at_r(*data, **options)]


def theirs(*data: Tensor, **options) -> list:
    options |= {"include": tuple(NAMES), "device": torch.device("cpu"), "knn_func": CustomKNN(CosineSimilarity())}
    found = AccuracyCalculator(**options).get_accuracy(*data)
    return [found[name] for name in NAMES]


def loop(embeddings: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, alone: bool, k: int) -> list:
    """Recall at k, R-precision and average precision of each query; ties put the irrelevant images first."""
    scores = []
    for i, query in enumerate(embeddings.double().numpy()):
        ranking = []
        for j, image in enumerate(gallery.double().numpy()):
            if not (alone and i == j):
                cosine = query @ image / max(np.linalg.norm(query) * np.linalg.norm(image), 1e-300)
                ranking.append((-round(float(cosine), 6), int(labels[i]) == int(gallery_labels[j])))
        hits = [hit for _, hit in sorted(ranking)]
        relevant = sum(hits)
        if relevant == 0:
            scores.append([np.nan] * 3)
            continue
        precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank in range(relevant) if hits[rank]]
        scores.append([float(any(hits[:k])), sum(hits[:relevant]) / relevant, sum(precisions) / relevant])
    return scores


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("average", "option"), [("micro", {}), ("macro", {"avg_of_avgs": True})])
def test_leave_one_out_equals_the_accuracy_calculator(seed, average, option):
    data = ragged(seed)
    assert ours(*data, average=average) == pytest.approx(theirs(*data, **option), abs=1e-6)


@pytest.mark.parametrize(("average", "option"), [("micro", {}), ("macro", {"avg_of_avgs": True})])
def test_query_against_gallery_equals_the_accuracy_calculator(average, option):
    embeddings, labels = ragged()
    queries, gallery = labels[:40] != 4, labels[40:] != 6  # classes that only one of the two has
    data = embeddings[:40][queries], labels[:40][queries], embeddings[40:][gallery], labels[40:][gallery]
    assert ours(*data, average=average) == pytest.approx(theirs(*data, **option), abs=1e-6)


def test_each_class_equals_the_accuracy_calculator():
    data = ragged()
    for mine, other in zip(ours(*data, average="none"), theirs(*data, return_per_class=True), strict=True):
        assert mine[[3, 9]].isnan().all()  # theirs leaves out the classes without a pair
        assert mine[~mine.isnan()].tolist() == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_equals_the_loop(k):
    embeddings, labels = ragged()
    scores = retrieval_scores(3 * embeddings, labels, ks=(k,))
    expected = np.array(loop(embeddings, labels, embeddings, labels, alone=True, k=k))
    found = torch.stack((scores.recall[:, 0], scores.r_precision, scores.average_precision), dim=1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert recall_at_k(embeddings, labels, k=k).item() == pytest.approx(np.nanmean(expected[:, 0]))


def test_ties_put_irrelevant_images_first_in_any_order():
    generator = torch.Generator().manual_seed(3)
    points = normalize(torch.randn(5, 4, generator=generator), dim=1)
    embeddings = points[torch.randint(5, (60,), generator=generator)]  # many copies, of several classes
    labels = torch.randint(6, (60,), generator=generator)
    expected = np.array(loop(embeddings, labels, embeddings, labels, alone=True, k=4))
    for seed in range(3):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        scores = retrieval_scores(embeddings[order], labels[order], ks=(4,), chunk_bytes=4000 + seed)
        found = torch.stack((scores.recall[:, 0], scores.r_precision, scores.average_precision), dim=1)
        np.testing.assert_allclose(found.numpy(), expected[order], atol=1e-6)


def test_a_query_is_left_out_also_among_its_copies():
    embeddings = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2)
    labels = torch.tensor([0, 0, 0, 1, 1])
    scores = retrieval_scores(embeddings, labels)
    assert scores.relevant.tolist() == [2, 2, 2, 1, 1]
    assert ours(embeddings, labels) == [1, 1, 1]


def test_collapsed_and_zero_embeddings_score_zero():
    labels = torch.arange(60) % 3
    for embeddings in (torch.ones(60, 4), torch.zeros(60, 4)):
        assert ours(embeddings, labels) == [0, 0, 0]
        assert recall_at_k(embeddings, labels, k=40) == 0  # 40 images have another class
        assert recall_at_k(embeddings, labels, k=41) == 1


def test_perfect_embeddings_score_one():
    labels = torch.arange(60) % 3
    assert ours(torch.eye(3)[labels], labels) == [1, 1, 1]


@pytest.mark.parametrize("chunk_bytes", [1, 300, 3000, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_result(chunk_bytes, dtype):
    embeddings, labels = ragged()
    whole = retrieval_scores(embeddings.to(dtype), labels)
    found = retrieval_scores(embeddings.to(dtype), labels, chunk_bytes=chunk_bytes)
    for mine, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def test_queries_of_a_subset_score_as_in_the_whole():
    embeddings, labels = ragged()
    chosen = torch.arange(0, len(labels), 3)
    part = retrieval_scores(embeddings[chosen], labels[chosen], embeddings, labels, self_index=chosen)
    whole = retrieval_scores(embeddings, labels)
    for mine, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(mine, expected[chosen], rtol=0, atol=0, equal_nan=True)


def test_memory_is_bounded_by_chunks():
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.nbytes)
            return result

    embeddings, labels = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)), torch.arange(2000) % 50
    with Largest():
        retrieval_scores(embeddings, labels, chunk_bytes=2**16)
    assert 2**16 <= largest <= 3 * 2**16  # 16 MB would be all similarities in float32


def test_without_a_pair_nothing_is_defined():
    embeddings, labels = torch.eye(3), torch.arange(3)
    assert all(value.isnan() for value in ours(embeddings, labels))
    assert all(value.isnan() for value in ours(torch.zeros(0, 3), labels[:0], average="macro"))
    assert all(value.isnan() for value in ours(embeddings, labels, torch.zeros(0, 3), labels[:0]))
    assert all(
        value.isnan().all() and value.shape == (5,) for value in ours(embeddings, labels, average="none", num_classes=5)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (0, 1)}, r"k must be at least 1, got \[0, 1\]"),
        ({"chunk_bytes": 0}, "chunk_bytes must be at least 1, got 0"),
        ({"gallery": torch.ones(3, 2)}, "gallery and gallery_labels must be given both or neither, got one"),
        ({"gallery": torch.ones(3, 3), "gallery_labels": torch.ones(3).long()}, r"got \(4, 2\) and \(3, 3\)"),
        ({"gallery": torch.ones(3, 2), "gallery_labels": torch.ones(3)}, "gallery_labels must be integers"),
        ({"labels": torch.ones(3).long()}, r"labels must have shape \(4,\) to match embeddings, got \(3,\)"),
        ({"embeddings": torch.full((4, 2), float("nan"))}, "embeddings must be finite, got nan or inf in 4 of 4"),
        ({"self_index": torch.arange(4)}, "gallery and gallery_labels must be given both or neither"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"embeddings": torch.ones(4, 2), "labels": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=message):
        retrieval_scores(**{**arguments, **change})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 1, 2, 4]), r"self_index must be in -1\.\.3, got 0\.\.4"),
        (torch.tensor([0, 1, 3, 2]), "with the label of the query"),
        (torch.tensor([0, 1]), r"integers of shape \(4,\) to match embeddings, got torch.int64 of shape \(2,\)"),
    ],
)
def test_positions_are_checked(index, message):
    embeddings, labels = torch.ones(4, 2), torch.arange(4)
    with pytest.raises(ValueError, match=message):
        retrieval_scores(embeddings, labels, embeddings, labels, self_index=index)


def test_averages_are_checked():
    with pytest.raises(ValueError, match='average must be "micro", "macro" or "none", got \'weighted\''):
        recall_at_k(torch.ones(4, 2), torch.arange(4), average="weighted")
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got 0\.\.3"):
        average_scores(torch.ones(4), torch.arange(4), "none", num_classes=3)
    for options in ({"average": "weighted"}, {"k": 0}, {"num_classes": 0}, {"chunk_bytes": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            RecallAtK(**options)


def metrics(**options) -> MetricCollection:
    return MetricCollection({"recall": RecallAtK(k=2, **options), "r": RPrecision(**options), "map": MAPAtR(**options)})


@pytest.mark.parametrize("average", ["micro", "macro", "none"])
def test_metrics_are_the_functions_of_all_batches(average):
    embeddings, labels = ragged()
    collection = metrics(average=average)
    for rows, row_labels in zip(embeddings.split(17), labels.split(17), strict=True):
        batch = collection(rows, row_labels)
    found = collection.compute()
    assert found["map"].shape == ((12,) if average == "none" else ())
    options = {"average": average}
    torch.testing.assert_close(found["recall"], recall_at_k(embeddings, labels, k=2, **options), equal_nan=True)
    torch.testing.assert_close(found["r"], r_precision(embeddings, labels, **options), equal_nan=True)
    torch.testing.assert_close(found["map"], map_at_r(embeddings, labels, **options), equal_nan=True)
    torch.testing.assert_close(batch["map"], map_at_r(rows, row_labels, **options), equal_nan=True)
    collection.reset()
    assert collection["map"].embeddings == []


def test_metrics_search_a_gallery():
    embeddings, labels = ragged()
    metric = MAPAtR()
    assert metric.num_classes is None
    metric.update(embeddings[:40], labels[:40])
    metric.update(embeddings[40:60], labels[40:60], gallery=True)
    metric.update(embeddings[60:], labels[60:], gallery=True)
    assert metric.compute() == map_at_r(embeddings[:40], labels[:40], embeddings[40:], labels[40:])
    with pytest.raises(ValueError, match=r"embeddings must have shape \(N, 12\), got \(1, 3\)"):
        metric.update(torch.ones(1, 3), torch.zeros(1).long())


def test_r_precision_is_that_of_torchmetrics():
    embeddings, labels = ragged()
    counted = torch.tensor([int((labels == label).sum()) > 1 for label in labels])
    similarity = embeddings.double() @ embeddings.double().T
    others = ~torch.eye(len(labels), dtype=torch.bool)
    query = torch.arange(len(labels)).unsqueeze(1).expand_as(similarity)
    kept = others & counted.unsqueeze(1)
    same = labels.unsqueeze(1) == labels
    theirs = RetrievalRPrecision()(similarity[kept], same[kept], query[kept])
    assert r_precision(embeddings, labels).item() == pytest.approx(theirs.item(), abs=1e-6)


def measure(folder, world: int) -> None:
    """Uneven shares: all but 20 images on rank 0; with three processes the last one has none."""
    rank = 0
    if world > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    embeddings, labels = ragged()
    cuts = {1: [len(labels)], 3: [len(labels) - 20, 20, 0]}[world]
    rows, row_labels = embeddings.split(cuts)[rank], labels.split(cuts)[rank]
    found = {}
    for average in ("micro", "macro", "none"):
        collection, searched = metrics(average=average), MAPAtR(average=average)
        for part, part_labels in zip(rows.split(30), row_labels.split(30), strict=True):
            if len(part):
                collection.update(part, part_labels)
                searched.update(part[::2], part_labels[::2])
                searched.update(part[1::2], part_labels[1::2], gallery=True)
        found |= {f"{average} {name}": value for name, value in collection.compute().items()}
        found[f"{average} searched"] = searched.compute()
        searched.update(embeddings[:1], labels[:1])  # goes on with its own images after a sync
        assert sum(map(len, searched.embeddings)) <= len(rows) + 1
    torch.save(found, folder / f"scores{world}.{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_processes_with_uneven_shares_score_as_one(tmp_path):
    world = 3
    measure(tmp_path, 1)
    assert start_ranks(world, measure, tmp_path, world) == [0] * world
    (one,) = saved(tmp_path, "scores1", 1)
    for found in saved(tmp_path, f"scores{world}", world):
        for name, value in one.items():
            if "searched" not in name:
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, equal_nan=True)
        assert found["micro searched"].isfinite()
