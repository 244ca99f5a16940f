"""Nearest neighbours against scikit-learn where no vote ties, and against explicit loops where votes do."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from simo_lightning.functional.knn import knn_accuracy, knn_predict


def rows(n: int, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(n: int, num_classes: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(num_classes, (n,), generator=torch.Generator().manual_seed(seed))


def loop(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> list[int]:
    predicted = []
    for query in queries.numpy():
        cosine = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank.numpy()]
        nearest = sorted(range(len(cosine)), key=lambda row: -cosine[row])[:k]
        ballot: dict[int, tuple[int, float]] = {}
        for row in nearest:
            votes, weight = ballot.get(int(labels[row]), (0, 0.0))
            ballot[int(labels[row])] = (votes + 1, weight + cosine[row])
        predicted.append(max(ballot, key=lambda label: ballot[label]))
    return predicted


@pytest.mark.parametrize("k", [1, 2, 4, 7, 20, 120])
def test_equals_the_loop(k):
    queries, bank, labels = rows(40), rows(120, seed=2), classes(120)
    assert knn_predict(queries, bank, labels, k=k).tolist() == loop(queries, bank, labels, k)


def own_k_loop(queries: Tensor, bank: Tensor, labels: Tensor) -> list[int]:
    """The class with the largest share of its own min(20, ceil(n / 3)) nearest neighbours."""
    predicted = []
    for query in queries.numpy():
        cosine = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank.numpy()]
        nearest = sorted(range(len(cosine)), key=lambda row: -cosine[row])
        ballot = {}
        for label in sorted(set(labels.tolist())):
            k = min(20, math.ceil(int((labels == label).sum()) / 3))
            own = [cosine[row] for row in nearest[:k] if labels[row] == label]
            ballot[label] = (Fraction(len(own), k), sum(own) / k)
        predicted.append(max(ballot, key=lambda label: ballot[label]))
    return predicted


def test_without_a_k_each_class_has_as_many_voters_as_its_size_allows():
    sizes = torch.tensor([200, 1, 57, 9, 3, 30, 10])
    labels = torch.arange(7).repeat_interleave(sizes)
    centers = 1.5 * rows(7, seed=4)
    bank, queries = centers[labels] + rows(310, seed=2), centers.repeat(20, 1) + rows(140)
    predicted = knn_predict(queries, bank, labels)
    assert predicted.tolist() == own_k_loop(queries, bank, labels)
    truth = torch.arange(7).repeat(20)
    small = sizes[truth] < 58
    plain = knn_predict(queries, bank, labels, k=20)
    assert (predicted == truth)[small].sum() > (plain == truth)[small].sum()


def test_without_a_k_large_classes_have_twenty_voters():
    queries, bank, labels = rows(200), rows(58 * 4, seed=2), torch.arange(4).repeat(58)
    assert torch.equal(knn_predict(queries, bank, labels), knn_predict(queries, bank, labels, k=20))
    assert not torch.equal(knn_predict(queries, bank[4:], labels[4:]), knn_predict(queries, bank[4:], labels[4:], k=20))


def test_without_a_k_a_bank_of_one_image_suffices():
    assert knn_predict(rows(3), rows(1), torch.tensor([4])).tolist() == [4, 4, 4]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_scikit_learn_where_one_class_leads(k):
    queries, bank, labels = rows(300), rows(400, seed=2), classes(400)
    theirs = KNeighborsClassifier(k, metric="cosine").fit(bank.numpy(), labels.numpy())
    share = np.sort(theirs.predict_proba(queries.numpy()), axis=1)
    clear = share[:, -1] > share[:, -2]
    assert clear.sum() > 150
    ours = knn_predict(queries, bank, labels, k=k).numpy()
    np.testing.assert_array_equal(ours[clear], theirs.predict(queries.numpy())[clear])


def test_accuracy_equals_scikit_learns_score_with_one_neighbour():
    queries, bank, labels = rows(300), rows(400, seed=2), classes(400)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(bank.numpy(), labels.numpy())
    score = theirs.score(queries.numpy(), classes(300, seed=3).numpy())
    assert knn_accuracy(queries, classes(300, seed=3), bank, labels, k=1).item() == pytest.approx(score)


@pytest.mark.parametrize("chunk_bytes", [1, 300, 20_000, 1_000_000])
def test_chunks_do_not_change_the_result(chunk_bytes):
    queries, bank, labels = rows(300), rows(400, seed=2), classes(400)
    whole = knn_predict(queries, bank, labels, k=9)
    assert torch.equal(knn_predict(queries, bank, labels, k=9, chunk_bytes=chunk_bytes), whole)


def test_a_tied_vote_goes_to_the_more_similar_class():
    angles = torch.tensor([0.1, 0.2, 0.15, 0.3])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([4, 4, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(query, bank, labels, k=4).tolist() == [4]
    assert knn_predict(query, bank, torch.tensor([1, 1, 4, 4]), k=4).tolist() == [1]


def test_a_tie_in_everything_goes_to_the_lowest_class():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert knn_predict(torch.tensor([[1.0, 1.0]]), bank, torch.tensor([3, 2]), k=2).tolist() == [2]


def test_lengths_do_not_matter_however_large_or_small():
    queries, bank, labels = rows(50).float(), rows(100, seed=2).float(), classes(100)
    expected = knn_predict(queries, bank, labels, k=5)
    for scale in (1e-36, 1e36):
        assert torch.equal(knn_predict(queries * scale, bank * scale, labels, k=5), expected)


def test_queries_and_bank_of_different_dtypes():
    queries, bank, labels = rows(50), rows(100, seed=2), classes(100)
    expected = knn_predict(queries, bank.float().double(), labels, k=20)
    assert torch.equal(knn_predict(queries, bank.float(), labels, k=20), expected)


def test_half_precision_is_computed_in_float32():
    queries, bank, labels = rows(50).bfloat16(), rows(100, seed=2).bfloat16(), classes(100)
    assert torch.equal(knn_predict(queries, bank, labels, k=5), knn_predict(queries.float(), bank.float(), labels, k=5))


def test_zero_rows_are_neighbours_of_similarity_zero():
    bank = torch.tensor([[0.0, 0.0], [-1.0, 0.0]])
    assert knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1]), k=1).tolist() == [0]


def test_no_query_gives_no_prediction_and_no_accuracy():
    bank, labels = rows(5), classes(5)
    assert knn_predict(rows(0), bank, labels, k=1).shape == (0,)
    assert knn_accuracy(rows(0), classes(0), bank, labels, k=1).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, r"k must be in 1\.\.5, the size of the bank, got k=6"),
        ({"k": 0}, r"k must be in 1\.\.5, .* got k=0"),
        ({"bank": rows(5, dim=3)}, r"\(M, D\) and \(N, D\), got \(4, 6\) and \(5, 3\)"),
        ({"queries": rows(4)[0]}, r"queries must be floats of shape \(N, D\), got torch.float64 of shape \(6,\)"),
        ({"bank_labels": classes(4)}, r"bank_labels must have shape \(5,\) to match bank, got \(4,\)"),
        ({"bank_labels": torch.tensor([0, 1, -1, 0, 0])}, r"bank_labels must be in 0\.\.1, got -1\.\.1"),
        ({"num_classes": 2, "bank_labels": torch.arange(5)}, r"bank_labels must be in 0\.\.1, got 0\.\.4"),
        ({"bank_labels": [0] * 5}, "bank_labels must be a tensor, got list"),
        ({"bank_labels": np.zeros(5, int)}, "bank_labels must be a tensor, got ndarray"),
        ({"bank_labels": torch.zeros(5)}, "bank_labels must be integers, got torch.float32"),
        ({"bank": rows(5).numpy()}, "bank must be a tensor, got ndarray"),
        ({"queries": rows(4).tolist()}, "queries must be a tensor, got list"),
        ({"queries": None}, "queries must be a tensor, got NoneType"),
        ({"bank": rows(0), "bank_labels": classes(0)}, "bank must have at least 1 embedding, got none"),
        ({"chunk_bytes": 0}, "chunk_bytes must be at least 1, got 0"),
        ({"queries": rows(4) / 0}, "queries must be finite, got nan or inf in 4 of 4 embeddings"),
        ({"bank": torch.full((5, 6), float("nan"))}, "bank must be finite, got nan or inf in 5 of 5 embeddings"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"queries": rows(4), "bank": rows(5, seed=2), "bank_labels": classes(5), "k": 2}
    with pytest.raises(ValueError, match=message):
        knn_predict(**{**arguments, **change})


def test_accuracy_needs_a_label_per_query():
    with pytest.raises(ValueError, match=r"query_labels must have shape \(4,\) to match queries, got \(3,\)"):
        knn_accuracy(rows(4), classes(3), rows(5), classes(5), k=1)
    with pytest.raises(ValueError, match="query_labels must be a tensor, got list"):
        knn_accuracy(rows(4), [0] * 4, rows(5), classes(5), k=1)
