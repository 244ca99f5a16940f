"""Geometry against explicit NumPy loops over the embeddings themselves, scikit-learn and SciPy."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from sklearn.metrics import calinski_harabasz_score
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from simo_lightning.functional import geometry
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import class_moments

Floats = NDArray[np.float64]


def data(n: int = 60, dim: int = 4, num_classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy classes of unequal sizes; class 3 has no rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 1, 2, 4])[torch.randint(5, (n,), generator=generator)] % num_classes
    centers = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    return centers[labels] + 0.3 * torch.randn(n, dim, generator=generator, dtype=torch.float64), labels


def class_means(rows: Floats, labels: NDArray[np.int64]) -> list[Floats]:
    return [np.mean([row for row, label in zip(rows, labels, strict=True) if label == c], axis=0) for c in set(labels)]


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def loop_orthogonality(rows, labels):
    return np.mean([abs(cosine(a, b)) for a, b in combinations(class_means(rows, labels), 2)])


def loop_orthogonality_max(rows, labels):
    return max(abs(cosine(a, b)) for a, b in combinations(class_means(rows, labels), 2))


def loop_effective_rank(rows, labels):
    singular = np.linalg.svd(rows, compute_uv=False)
    return np.exp(scipy.stats.entropy(singular / singular.sum()))


def loop_within_between(rows, labels):
    num_classes = len(set(labels))
    return (len(rows) - num_classes) / (num_classes - 1) / calinski_harabasz_score(rows, labels)


def loop_nc1(rows, labels):
    means = dict(zip(set(labels), class_means(rows, labels), strict=True))
    center = np.mean(list(means.values()), axis=0)
    within = sum(np.outer(row - means[label], row - means[label]) for row, label in zip(rows, labels, strict=True))
    between = sum(np.outer(mean - center, mean - center) for mean in means.values())
    return np.trace(within / len(rows) @ np.linalg.pinv(between / len(means), rcond=1e-10)) / len(means)


def loop_equinorm(rows, labels):
    means = class_means(rows, labels)
    norms = [np.linalg.norm(mean - np.mean(means, axis=0)) for mean in means]
    return np.std(norms) / np.mean(norms)


def loop_equiangularity(rows, labels):
    means = class_means(rows, labels)
    centered = [mean - np.mean(means, axis=0) for mean in means]
    return np.std([cosine(a, b) for a, b in combinations(centered, 2)])


def loop_alignment(rows, labels):
    pairs = [(i, j) for i, j in combinations(range(len(rows)), 2) if labels[i] == labels[j]]
    return np.mean([((rows[i] - rows[j]) ** 2).sum() for i, j in pairs])


def loop_rms_norm(rows, labels):
    return np.sqrt(np.mean([row @ row for row in rows]))


def values(embeddings: Tensor, labels: Tensor, num_classes: int = 5) -> dict[str, float]:
    moments = class_moments(embeddings, labels, num_classes)
    return {name: function(moments).item() for name, function in GEOMETRY.items()}


@pytest.mark.parametrize("name", sorted(GEOMETRY))
@pytest.mark.parametrize("dim", [1, 4, 12])
def test_equals_the_loop(name, dim):
    embeddings, labels = data(dim=dim)
    expected = globals()[f"loop_{name}"](embeddings.numpy(), labels.numpy())
    assert values(embeddings, labels)[name] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", sorted(GEOMETRY))
def test_fewer_rows_than_dimensions(name):
    embeddings, labels = data(n=7, dim=20)
    expected = globals()[f"loop_{name}"](embeddings.numpy(), labels.numpy())
    assert values(embeddings, labels)[name] == pytest.approx(expected, rel=1e-6)


def test_names_are_those_of_the_functions_in_order():
    assert list(GEOMETRY) == sorted(GEOMETRY)
    assert all(getattr(geometry, name) is function for name, function in GEOMETRY.items())


def test_cosines_are_scikit_learns():
    embeddings, labels = data()
    means = np.stack(class_means(embeddings.numpy(), labels.numpy()))
    off = np.abs(cosine_similarity(means))[np.triu_indices(len(means), 1)]
    found = values(embeddings, labels)
    assert (found["orthogonality"], found["orthogonality_max"]) == pytest.approx((off.mean(), off.max()))


def test_orthogonal_points_are_the_best_there_is():
    embeddings, labels = 3 * torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    assert values(embeddings, labels, 4) == pytest.approx(
        {
            "alignment": 0,
            "effective_rank": 4,
            "equiangularity": 0,
            "equinorm": 0,
            "nc1": 0,
            "orthogonality": 0,
            "orthogonality_max": 0,
            "rms_norm": 3,
            "within_between": 0,
        },
        abs=1e-12,
    )


def test_full_collapse_is_told_and_never_flattered():
    embeddings, labels = torch.tensor([0.1, 0.7, -0.3]).repeat(1000, 1), torch.arange(1000) % 7 % 5
    found = values(embeddings, labels)
    exact = {name: found.pop(name) for name in ("alignment", "effective_rank", "orthogonality", "orthogonality_max")}
    assert exact == pytest.approx({"alignment": 0, "effective_rank": 1, "orthogonality": 1, "orthogonality_max": 1})
    assert found.pop("rms_norm") == pytest.approx(0.59**0.5)
    assert all(np.isnan(value) for value in found.values()), found


def test_merged_classes_with_spread_have_infinite_within_between():
    embeddings = torch.tensor([[1.0, 1.0], [3.0, 5.0]]).repeat(2, 1)
    found = values(embeddings, torch.tensor([0, 0, 1, 1]), 2)
    assert found["within_between"] == np.inf
    assert np.isnan([found[name] for name in ("nc1", "equinorm", "equiangularity")]).all()


def test_one_class_leaves_what_compares_classes_undefined():
    found = values(data()[0], torch.zeros(60, dtype=torch.long))
    assert {name for name, value in found.items() if np.isnan(value)} == set(GEOMETRY) - {
        "alignment",
        "effective_rank",
        "rms_norm",
    }


def test_nothing_is_undefined_everywhere():
    assert np.isnan(list(values(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).values())).all()


def test_zeros_have_no_direction():
    found = values(torch.zeros(6, 3), torch.arange(6) % 3)
    assert {name for name, value in found.items() if not np.isnan(value)} == {"alignment", "rms_norm"}


def test_singletons_have_no_pair():
    assert np.isnan(values(*data(n=5), num_classes=5)["alignment"]) == (len(set(data(n=5)[1].tolist())) == 5)
    assert np.isnan(values(torch.eye(3), torch.arange(3))["alignment"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan(bad):
    embeddings, labels = data()
    embeddings[3, 1] = bad
    found = values(embeddings, labels)
    assert not any(np.isfinite(value) for value in found.values()), found


def test_rotation_permutation_and_scale():
    embeddings, labels = data()
    expected = values(embeddings, labels)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64))[0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(9))
    found = values(10 * embeddings[order] @ rotation, labels[order])
    expected["alignment"] *= 100
    expected["rms_norm"] *= 10
    assert found == pytest.approx(expected)


def test_effective_rank_of_one_line_in_many_dimensions_is_one():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(300, 1, generator=generator) * torch.randn(1, 256, generator=generator)
    assert values(line.double(), torch.zeros(300, dtype=torch.long))["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_far_from_the_origin_the_spread_is_still_seen():
    embeddings, labels = data()
    near, far = values(embeddings, labels), values(embeddings + 1e3, labels)
    for name in ("alignment", "within_between", "nc1", "equinorm", "equiangularity"):
        assert far[name] == pytest.approx(near[name], rel=1e-6)
