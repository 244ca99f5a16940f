"""Confusions, worst queries, labels that look wrong, near duplicates and headline numbers, against loops in float64."""

import math
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from simo_lightning.functional import knn_predict, most_confused, retrieval_scores
from simo_lightning.report import analysis
from simo_lightning.report.analysis import Neighbors, find_neighbors


def blobs(per_class: int, num_classes: int, dim: int = 16, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points round random directions, in no order."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, dim, generator=generator)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return centers[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels


def loop_cosines(embeddings: Tensor) -> np.ndarray:
    rows = embeddings.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def loop_order(embeddings: Tensor) -> list[list[int]]:
    """All others of each image, by rounded cosine and then by index."""
    cosines = np.round(loop_cosines(embeddings) * 2**22)
    return [sorted((j for j in range(len(row)) if j != i), key=lambda j: (-row[j], j)) for i, row in enumerate(cosines)]


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_neighbors_are_those_of_scikit_learn(chunk_size, monkeypatch):
    monkeypatch.setattr(analysis, "_COLUMNS", 13)
    embeddings, _ = blobs(12, 4)
    found = find_neighbors(embeddings, k=5, chunk_size=chunk_size)
    theirs = NearestNeighbors(n_neighbors=5, metric="cosine").fit(embeddings.double().numpy())
    distances, index = theirs.kneighbors()
    assert np.array_equal(found.indices.numpy(), index)
    np.testing.assert_allclose(found.cosines.numpy(), 1 - distances, rtol=0, atol=2**-21)


def test_equal_neighbors_are_in_the_order_of_their_index():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(5, 3, generator=generator)[torch.randint(5, (40,), generator=generator)]
    assert find_neighbors(embeddings, k=39, chunk_size=3).indices.tolist() == loop_order(embeddings)


def test_fewer_images_than_k():
    assert find_neighbors(torch.eye(3)).indices.tolist() == [[1, 2], [0, 2], [0, 1]]
    with pytest.raises(ValueError, match="embeddings must have at least 2 rows to have neighbours, got 1"):
        find_neighbors(torch.ones(1, 2))


def test_confused_pairs_are_those_of_a_loop():
    embeddings, labels = blobs(6, 8, dim=4, noise=0.9)
    labels[labels == 7] = 6  # classes of different size
    labels[:1] = 9  # the only one of its class, and class 8 has none
    order, classes = loop_order(embeddings), labels.tolist()
    sizes = Counter(classes)
    wrong: dict[tuple[int, int], list[int]] = {}
    for image, nearest in enumerate(order):
        if sizes[classes[image]] > 1 and classes[nearest[0]] != classes[image]:
            pair = tuple(sorted((classes[image], classes[nearest[0]])))
            wrong.setdefault(pair, []).append(image)
    out_of = {pair: sum(sizes[each] for each in pair if sizes[each] > 1) for pair in wrong}
    rates = {pair: len(images) / out_of[pair] for pair, images in wrong.items()}
    expected = sorted(wrong, key=lambda pair: (-rates[pair], -len(wrong[pair]), pair))
    found = analysis.confused_pairs(find_neighbors(embeddings), labels, count=100, num_images=100)
    assert len(expected) > 10
    assert [pair.classes for pair in found] == expected
    cosines = loop_cosines(embeddings)
    for pair in found:
        assert (pair.rate, pair.confused, pair.out_of) == (
            rates[pair.classes],
            len(wrong[pair.classes]),
            out_of[pair.classes],
        )
        assert {(image, order[image][0]) for image in wrong[pair.classes]} == set(map(tuple, pair.images.tolist()))
        shown = [cosines[one, other] for one, other in pair.images.tolist()]
        assert all(one >= other - 2**-21 for one, other in pairwise(shown))
    assert [pair.classes for pair in analysis.confused_pairs(find_neighbors(embeddings), labels, count=3)] == expected[
        :3
    ]


def test_separate_classes_have_no_confused_pairs():
    neighbors = find_neighbors(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]))
    assert analysis.confused_pairs(neighbors, torch.tensor([0, 0, 1, 1])) == []


def test_worst_queries_are_those_of_lowest_average_precision():
    embeddings, labels = blobs(6, 8, dim=4, noise=0.9)
    labels[3] = 8  # the only one of its class is no query
    neighbors, precision = find_neighbors(embeddings, k=4), retrieval_scores(embeddings, labels).average_precision
    order = [image for image in range(len(labels)) if image != 3]
    order.sort(key=lambda image: (float(precision[image]), -float(neighbors.cosines[image, 0]), image))
    found = analysis.worst_queries(neighbors, labels, precision, count=100, most_per_class=None)
    assert found.images.tolist() == order
    assert torch.equal(found.average_precision, precision[order])
    assert torch.equal(found.neighbors, neighbors.indices[order])
    few = analysis.worst_queries(neighbors, labels, precision, count=9, most_per_class=1).images.tolist()
    seen: set[int] = set()
    firsts = [image for image in order if not (int(labels[image]) in seen or seen.add(int(labels[image])))]
    assert few == firsts


def loop_wrong_labels(order: list[list[int]], labels: list[int], most: int) -> dict[int, tuple[int, float, float]]:
    """Suggested class, its share and that of the own class, of each image on the list."""
    voters = {label: min(most, math.ceil(size / 2)) for label, size in Counter(labels).items()}
    found = {}
    for image, row in enumerate(order):
        shares = {label: sum(labels[other] == label for other in row[:k]) / k for label, k in voters.items()}  # float64
        largest = max(shares.values())
        first = next(labels[other] for other in row if shares[labels[other]] == largest)
        if first != labels[image] and largest >= 0.5 and largest > shares[labels[image]]:
            found[image] = (first, largest, shares[labels[image]])
    return found


@pytest.mark.parametrize("k", [2, 10])
def test_likely_wrong_labels_are_those_of_a_loop(k):
    embeddings, labels = blobs(11, 9, dim=4, noise=0.8)
    labels[labels == 8] = 0  # classes of different size
    labels[:3] = torch.tensor([9, 10, 10])
    expected = loop_wrong_labels(loop_order(embeddings), labels.tolist(), k)
    found = analysis.likely_wrong_labels(find_neighbors(embeddings), labels, k)
    assert 5 < len(expected) < len(labels) // 2
    values = list(zip(found.suggested.tolist(), found.share.tolist(), found.own_share.tolist(), strict=True))
    assert dict(zip(found.images.tolist(), values, strict=True)) == {
        image: (label, pytest.approx(share), pytest.approx(own)) for image, (label, share, own) in expected.items()
    }
    margins = (found.share - found.own_share).tolist()
    assert margins == sorted(margins, reverse=True)


def test_planted_wrong_labels_are_found():
    embeddings, labels = blobs(20, 30, noise=0.6)
    generator = torch.Generator().manual_seed(1)
    planted = torch.randperm(len(labels), generator=generator)[:40]
    given = labels.clone()
    given[planted] = (labels[planted] + torch.randint(1, 30, (40,), generator=generator)) % 30
    found = analysis.likely_wrong_labels(find_neighbors(embeddings), given)
    right = [image for image in planted.tolist() if image in set(found.images.tolist())]
    assert len(right) >= 36
    assert set(found.images[:30].tolist()) <= set(planted.tolist())  # the first of the list are planted ones
    suggested = dict(zip(found.images.tolist(), found.suggested.tolist(), strict=True))
    assert sum(suggested[image] == int(labels[image]) for image in right) >= 36


def test_a_wrong_label_of_a_small_class_is_found():
    embeddings, labels = blobs(5, 20, noise=0.2)
    given = labels.clone()
    given[11] = (labels[11] + 1) % 20  # only four others have its class
    found = analysis.likely_wrong_labels(find_neighbors(embeddings), given)
    assert (int(found.images[0]), int(found.suggested[0])) == (11, int(labels[11]))


def test_near_duplicates_are_those_of_a_loop():
    embeddings, labels = blobs(10, 5, dim=3, noise=0.6)
    for chunk_size in (7, 1024):
        found = analysis.near_duplicates(embeddings, labels, threshold=0.98, max_pairs=1000, chunk_size=chunk_size)
        cosines = np.round(loop_cosines(embeddings) * 2**22) / 2**22
        for pairs, same in ((found.within, True), (found.across, False)):
            expected = [
                (i, j)
                for i, j in combinations(range(len(labels)), 2)
                if cosines[i, j] >= 0.98 and (labels[i] == labels[j]) == same
            ]
            expected.sort(key=lambda pair: (-cosines[pair], pair))
            assert len(expected) > 3
            assert list(map(tuple, pairs.images.tolist())) == expected
            assert pairs.cosines.tolist() == [float(np.float32(cosines[pair])) for pair in expected]
            assert pairs.total == len(expected)
            assert pairs.correlations.isnan().all()
    few = analysis.near_duplicates(embeddings, labels, threshold=0.98, max_pairs=3, chunk_size=7)
    assert few.within.total == found.within.total
    assert torch.equal(few.within.images, found.within.images[:3])


def test_planted_duplicates_are_found_among_tight_classes():
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = blobs(30, 4, noise=0.01)  # embeddings alone would call every pair of a class a duplicate
    images = torch.randint(256, (120, 3, 8, 8), generator=generator).float()
    images = torch.nn.functional.interpolate(images, scale_factor=8, mode="bilinear").byte()  # (120, 3, 64, 64)
    first, second = 5, int((labels == labels[5]).nonzero()[-1])
    other = int((labels != labels[5]).nonzero()[-1])
    noise = torch.randint(-8, 9, images[first].shape, generator=generator)
    images[second] = (images[first].int() + noise).clamp(0, 255).byte()  # as saved again with loss
    images[other], embeddings[other] = images[first], embeddings[first]
    found = analysis.near_duplicates(embeddings, labels, images)
    assert found.within.images.tolist() == [sorted((first, second))]
    assert {tuple(pair) for pair in found.across.images.tolist()} == {
        tuple(sorted((first, other))),
        tuple(sorted((second, other))),
    }
    assert found.across.images[0].tolist() == sorted((first, other))  # equal to the last bit comes first
    assert found.across.correlations[0] == 1
    small = [image.float().mean(dim=0).double().numpy() for image in images[[first, second]]]
    small = [image.reshape(16, 4, 16, 4).mean(axis=(1, 3)).ravel() for image in small]
    assert float(found.within.correlations) == pytest.approx(np.corrcoef(*small)[0, 1], abs=1e-6)
    without = analysis.near_duplicates(embeddings, labels)
    assert without.within.total > 1000
    part = analysis.near_duplicates(embeddings, labels, images[:6])  # the first six only
    assert part.within.total == part.across.total == 0


def test_knn_leave_one_out_is_knn_predict_without_the_image():
    embeddings, labels = blobs(9, 7, dim=4, noise=0.5)
    labels[labels == 6] = 5
    found = analysis.knn_leave_one_out(find_neighbors(embeddings.double()), labels)
    for image in range(len(labels)):
        others = torch.arange(len(labels)) != image
        bank, bank_labels = embeddings[others].double(), labels[others]
        size = int((bank_labels == labels[image]).sum())
        if (size + 2) // 3 == (size + 3) // 3:  # its class has as many voters with the image as without
            assert found[image] == knn_predict(embeddings[image : image + 1].double(), bank, bank_labels)
    assert (found == labels).float().mean() > 0.3


def test_scores_per_class_are_those_of_a_loop():
    embeddings, labels = blobs(6, 6, dim=4, noise=0.9)
    labels[labels == 2] = 3  # class 2 has no image
    labels[0] = 6  # class 6 has one
    scores, predicted = (
        retrieval_scores(embeddings, labels),
        analysis.knn_leave_one_out(find_neighbors(embeddings), labels),
    )
    found = analysis.scores_per_class(labels, predicted, scores, num_classes=8)
    for label in range(8):
        own = labels == label
        assert int(found.images[label]) == int(own.sum())
        wrong = Counter(each for each in predicted[own].tolist() if each != label)
        best = max(sorted(wrong), key=wrong.__getitem__) if wrong else -1
        assert (int(found.confused_with[label]), int(found.confused[label])) == (best, wrong[best])
        for name, values in (
            ("knn", (predicted == labels).double()),
            ("recall_at_1", scores.recall[:, 0].double()),
            ("r_precision", scores.r_precision.double()),
            ("map_at_r", scores.average_precision.double()),
        ):
            mean = sum(values[own].tolist()) / int(own.sum()) if own.any() else math.nan
            assert float(getattr(found, name)[label]) == pytest.approx(mean, abs=1e-7, nan_ok=True)
    assert found.map_at_r[[2, 6, 7]].isnan().all()
    assert not found.knn[6].isnan()


def test_most_confused_refuses_other_classes():
    with pytest.raises(ValueError, match=r"predicted must be in 0\.\.1, got 0\.\.2"):
        most_confused(torch.tensor([0, 1]), torch.tensor([0, 2]), num_classes=2)
    with pytest.raises(ValueError, match=r"the same shape \(N,\), got \(2,\) and \(1,\)"):
        most_confused(torch.tensor([0, 1]), torch.tensor([0]), num_classes=2)


def test_the_order_of_a_matrix_has_its_blocks_together():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(5).repeat_interleave(6)[torch.randperm(30, generator=generator)]
    means = torch.randn(5, 16, generator=generator)[groups] + 0.3 * torch.randn(30, 16, generator=generator)
    means = means / means.norm(dim=1, keepdim=True)
    cosines = means @ means.mT
    cosines[[4, 17]] = cosines[:, [4, 17]] = float("nan")
    order = analysis.cluster_order(cosines)
    assert sorted(order.tolist()) == list(range(30))
    assert order[-2:].tolist() == [4, 17]
    assert int((groups[order[:-2]].diff() != 0).sum()) == 4  # five blocks
    kept = torch.tensor([index for index in range(30) if index not in (4, 17)])
    tree = linkage(pdist(means[kept].double().numpy(), "cosine"), "average")
    clusters = dict(zip(kept.tolist(), fcluster(tree, 5, "maxclust"), strict=True))
    assert len({int(clusters[index]) for index in order[:-2].tolist()[:6] if index in clusters}) <= 2
    assert torch.equal(order, analysis.cluster_order(cosines))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_order_of_few_classes(count):
    assert analysis.cluster_order(torch.eye(count)).tolist() == list(range(count))


def test_worst_pairs_are_those_of_a_loop():
    means = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    means[3] = float("nan")
    cosines = np.round(loop_cosines(means) * 2**22) / 2**22
    expected = [pair for pair in combinations(range(12), 2) if 3 not in pair]
    expected.sort(key=lambda pair: (-abs(cosines[pair]), pair))
    found = analysis.worst_pairs(means, count=20, chunk_size=5)
    assert list(map(tuple, found.classes.tolist())) == expected[:20]
    assert found.cosines.tolist() == pytest.approx([cosines[pair] for pair in expected[:20]])
    assert min(found.cosines) < 0


def test_headline_numbers():
    embeddings, labels = torch.eye(4)[[0, 0, 1, 1, 2, 2]], torch.tensor([0, 0, 1, 1, 2, 2])
    embeddings[4:] = torch.tensor([0.0, 0.6, 0.8, 0.0])
    names = ["cat", "dog", "ship", "owl"]  # no owls
    found = analysis.headline(embeddings, labels, names, map_at_r=0.5, recall_at_1=0.9, knn=0.59)
    assert [(each.shown, each.verdict) for each in found[:3]] == [("0.50", "watch"), ("0.90", "good"), ("0.59", "bad")]
    assert found[0].rule == "good from 0.70, bad below 0.40"
    singular = np.linalg.svd(embeddings.double().numpy(), compute_uv=False)
    p = singular[singular > 1e-12] / singular.sum()
    assert found[3].value == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert found[3].sentence.endswith("of 4 dimensions; 3 orthogonal classes use 3.")
    assert (found[4].value, found[4].verdict) == (pytest.approx(0.6), "watch")
    assert "dog and ship, have a cosine of 0.60" in found[4].sentence
    assert found[4].rule == "good up to 0.30, bad above 0.70"


def test_more_classes_than_dimensions_are_judged_by_what_is_possible():
    angles = torch.arange(3) * 2 * math.pi / 3  # the simplex of three directions in the plane reaches Welch's bound
    embeddings = torch.stack((angles.cos(), angles.sin()), dim=1)
    number = analysis.headline(embeddings, torch.arange(3), ["a", "b", "c"], 1.0, 1.0, 1.0)[4]
    assert number.value == pytest.approx(0.5)
    assert number.verdict == "good"
    assert number.sentence.endswith("with 3 classes in 2 dimensions it is at least 0.50.")


def test_undefined_numbers_say_so():
    nan = float("nan")
    found = analysis.headline(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), ["cat"], nan, nan, nan)
    assert [each.verdict for each in found] == ["undefined", "undefined", "undefined", "good", "undefined"]
    assert found[4].sentence == "It is not defined for these images."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, n, y: find_neighbors(x, k=0), "k must be at least 1, got 0"),
        (lambda x, n, y: find_neighbors(x / 0), "embeddings must be finite, got nan or inf in 4 of 4 embeddings"),
        (lambda x, n, y: analysis.confused_pairs(n, y[:3]), r"labels must have shape \(4,\) to match neighbors, got"),
        (lambda x, n, y: analysis.confused_pairs(n, y, count=0), "count must be at least 1, got 0"),
        (lambda x, n, y: analysis.likely_wrong_labels(n, y - 1), "labels must be integers of at least 0, got .* -1"),
        (lambda x, n, y: analysis.likely_wrong_labels(n, y, k=0), "k must be at least 1, got 0"),
        (lambda x, n, y: analysis.worst_queries(n, y, torch.ones(3)), r"average_precision must have shape \(4,\)"),
        (lambda x, n, y: analysis.near_duplicates(x, y, threshold=2), r"threshold must be in \[-1, 1\], got 2"),
        (lambda x, n, y: analysis.near_duplicates(x, y, torch.ones(5, 1, 2, 2)), "with M at most 4, got"),
        (lambda x, n, y: analysis.knn_leave_one_out(Neighbors(*(part[:, :1] for part in n)), 0 * y),
         "neighbors must have k of at least 2 for classes of up to 4 images, got k=1"),
        (lambda x, n, y: analysis.cluster_order(x[:3]), r"cosines must be a square matrix \(C, C\), got \(3, 4\)"),
        (lambda x, n, y: analysis.class_means(x, y, 1), r"labels must be in 0\.\.0, got 0\.\.1"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, message):
    embeddings = torch.eye(4)
    with pytest.raises(ValueError, match=message):
        call(embeddings, find_neighbors(embeddings), torch.tensor([0, 0, 1, 1]))
