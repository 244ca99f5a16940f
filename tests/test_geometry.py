"""Geometry against explicit NumPy loops over the embeddings themselves, and against other libraries."""

import time
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from simo_lightning.functional import geometry
from simo_lightning.functional.geometry import (
    GEOMETRY,
    computable_metrics,
    geometry_metric,
    means,
    not_computed,
    spectrum,
)
from simo_lightning.functional.moments import ClassMoments, class_moments
from tests import reference_geometry
from tests.bounds import assert_float32_error
from tests.reference_geometry import LOOPS, OTHERS


def data(n: int = 60, dim: int = 4, num_classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy classes of unequal sizes; class 3 has no rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 1, 2, 4])[torch.randint(5, (n,), generator=generator)] % num_classes
    centers = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    return centers[labels] + 0.3 * torch.randn(n, dim, generator=generator, dtype=torch.float64), labels


def values(embeddings: Tensor, labels: Tensor, num_classes: int = 5) -> dict[str, float]:
    moments = class_moments(embeddings, labels, num_classes)
    return {name: function(moments).item() for name, function in GEOMETRY.items()}


@pytest.mark.parametrize("name", sorted(GEOMETRY))
@pytest.mark.parametrize("dim", [1, 4, 12])
def test_equals_the_loop(name, dim):
    embeddings, labels = data(dim=dim)
    expected = LOOPS[name](embeddings.numpy(), labels.numpy())
    assert values(embeddings, labels)[name] == pytest.approx(expected, rel=1e-9, nan_ok=name == "variance_across")


@pytest.mark.parametrize("budget", [256, 0])
@pytest.mark.parametrize("block", [1, 13, 2**21])
def test_pooled_sums_and_blocks_give_the_numbers_of_the_loops(monkeypatch, budget, block):
    """With and without the second moments of each class, and however few pairs of classes are computed at a time."""
    monkeypatch.setattr(means, "_BLOCK", block)
    monkeypatch.setattr(spectrum, "_BLOCK", block)
    labels = torch.arange(120) % 23
    rows = draw_classes(labels, 6)
    moments = class_moments(rows, labels, 25, second_budget_mb=budget)
    metrics = computable_metrics(moments)
    left_out = {"participation_ratio", "subspace_overlap", "variance_across", "variance_along"}
    assert GEOMETRY.keys() - metrics.keys() == (set() if budget else left_out)
    for name, metric in metrics.items():
        assert metric(moments).item() == pytest.approx(LOOPS[name](rows.numpy(), labels.numpy()), rel=1e-10), name


def draw_classes(labels: Tensor, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(int(labels.max()) + 1, dim, generator=generator, dtype=torch.float64)
    return centers[labels] + 0.3 * torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)


def test_what_requires_more_than_the_budget_says_so_in_one_line():
    moments = ClassMoments.zeros(10_000, 512)
    for name in ("subspace_overlap", "class_participation_ratio", "class_variance_along", "class_variance_across"):
        with pytest.raises(
            ValueError, match="requires moments with second, got None: the second moments of 10,000 classes"
        ):
            getattr(geometry, name)(moments)
    assert not_computed(moments, 256) == (
        "not computed: participation_ratio, subspace_overlap, variance_across, variance_along: the second moments of "
        "10,000 classes in 512 dimensions take 20,972 MB, above second_budget_mb=256"
    )


def test_equal_angles_have_no_spread_in_blocks(monkeypatch):
    """Squares of cosines would cancel to 1e-8."""
    monkeypatch.setattr(means, "_BLOCK", 50)
    simplex = class_moments(torch.eye(40, dtype=torch.float64), torch.arange(40), 40)
    assert geometry.equiangularity(simplex).item() < 1e-15
    assert geometry.simplex_deviation(simplex).item() < 1e-15


@pytest.mark.parametrize("name", sorted(GEOMETRY))
def test_fewer_rows_than_dimensions(name):
    embeddings, labels = data(n=7, dim=20)
    expected = LOOPS[name](embeddings.numpy(), labels.numpy())
    assert values(embeddings, labels)[name] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_equals_other_libraries(name):
    embeddings, labels = data(dim=12, seed=1)
    expected = OTHERS[name][1](embeddings.numpy(), labels.numpy())
    assert values(embeddings, labels)[name] == pytest.approx(expected, rel=1e-9)


def test_agreement():
    """Largest relative error of each metric: ``pytest tests/test_geometry.py -k agreement -rP``."""
    references = [(name, "loops", loop) for name, loop in LOOPS.items()]
    references += [(name, *other) for name, other in OTHERS.items()]
    draws = [data(dim=dim, seed=seed) for dim, seed in product((6, 12), range(5))]
    print()
    for name, source, reference in sorted(references, key=lambda each: (each[0], each[1] != "loops")):
        expected = [reference(embeddings.numpy(), labels.numpy()) for embeddings, labels in draws]
        found = [values(*draw)[name] for draw in draws]
        error = max(abs(mine / theirs - 1) for mine, theirs in zip(found, expected, strict=True))
        print(f"{name:20} {source:42} {error:.0e}")
        assert error < 1e-9


def test_a_declaration_holds_everything_about_a_metric():
    metric = GEOMETRY["class_cosine"]
    assert metric.function is geometry.class_cosine
    assert (metric.class_name, metric.better) == ("ClassCosine", "lower")
    assert metric.best == "0: all class means are orthogonal"
    assert metric.meaning == "Mean absolute cosine between class means"
    assert metric.formula == "mean_{a<b} |cos(m_a, m_b)|"
    docstring = geometry.class_cosine.__doc__
    assert "    Scalar, [0, 1]; lower is better (0: all class means are orthogonal). ``nan`` for" in docstring
    assert docstring.index("Args:") < docstring.index("Returns:") < docstring.index("Example:")


def test_every_metric_has_a_loop():
    assert LOOPS.keys() == GEOMETRY.keys()


def test_a_declaration_is_checked():
    declare = geometry_metric(interval="[0, 1]", better="lower", undefined="nothing")

    def wordless(moments):
        """No formula."""

    def class_cosine(moments):
        """Cosine once more: ``cos``."""

    with pytest.raises(ValueError, match=r"docstring of wordless must begin with 'Meaning: .*got 'No form"):
        declare(wordless)
    with pytest.raises(ValueError, match="name of a metric must be new, got 'class_cosine' again"):
        declare(class_cosine)
    assert "wordless" not in GEOMETRY


def test_orthogonal_points_have_the_best_values():
    embeddings, labels = 3 * torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    expected = dict.fromkeys(GEOMETRY, 0.0) | {"effective_rank": 4, "stable_rank": 4, "rms_norm": 3}
    expected |= {"centered_cosine": 1 / 3, "centered_cosine_max": 1 / 3, "participation_ratio": np.nan}
    assert values(embeddings, labels, 4) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_simplex_has_the_cosines_of_a_simplex():
    corners = (torch.eye(5, dtype=torch.float64) - 1 / 5).repeat(2, 1)
    found = values(corners, torch.arange(5).repeat(2))
    names = ("centered_cosine", "centered_cosine_max", "class_cosine", "class_cosine_max")
    assert [found[name] for name in names] == pytest.approx([1 / 4] * 4)
    for name in ("simplex_deviation", "equinorm", "equiangularity"):
        assert found[name] == pytest.approx(0, abs=1e-12)


def test_full_collapse_has_the_worst_values():
    embeddings, labels = torch.tensor([0.1, 0.7, -0.3]).repeat(1000, 1), torch.arange(1000) % 7 % 5
    found = values(embeddings, labels)
    assert found.pop("rms_norm") == pytest.approx(0.59**0.5)
    ones = {"effective_rank", "stable_rank", "class_cosine", "class_cosine_max", "subspace_overlap"}
    zeros = {"alignment", "norm_spread", "variance_across", "variance_along"}
    exact = {name: found.pop(name) for name in ones | zeros}
    assert exact == pytest.approx({name: float(name in ones) for name in exact}, abs=1e-12)
    assert all(np.isnan(value) for value in found.values()), found


def test_two_merged_classes_show_in_the_largest_cosine():
    embeddings, labels = torch.eye(4)[torch.tensor([0, 1, 2, 2])], torch.arange(4)
    found = values(embeddings, labels, 4)
    assert (found["class_cosine_max"], found["centered_cosine_max"]) == pytest.approx((1, 1))
    assert (found["class_cosine"], found["subspace_overlap"]) == pytest.approx((1 / 6, 1 / 6))  # one of six pairs


def test_merged_classes_with_spread_have_an_infinite_scatter_ratio():
    embeddings = torch.tensor([[1.0, 1.0], [3.0, 5.0]]).repeat(2, 1)
    found = values(embeddings, torch.tensor([0, 0, 1, 1]), 2)
    assert found["scatter_ratio"] == np.inf
    assert np.isnan([found[name] for name in ("nc1", "equinorm", "equiangularity")]).all()


def test_one_class_leaves_what_compares_classes_undefined():
    found = values(data()[0], torch.zeros(60, dtype=torch.long))
    assert {name for name, value in found.items() if np.isnan(value)} == set(GEOMETRY) - {
        *("alignment", "effective_rank", "norm_spread", "participation_ratio", "rms_norm", "stable_rank"),
        *("variance_across", "variance_along"),
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
def test_embeddings_that_are_not_finite_give_nan(bad):
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
    for name, factor in (("alignment", 100), ("rms_norm", 10), ("variance_across", 100), ("variance_along", 100)):
        expected[name] *= factor
    assert found == pytest.approx(expected)


def test_effective_rank_of_one_line_in_many_dimensions_is_one():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(300, 1, generator=generator) * torch.randn(1, 256, generator=generator)
    assert values(line.double(), torch.zeros(300, dtype=torch.long))["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_far_from_the_origin_the_spread_is_still_seen():
    embeddings, labels = data()
    near, far = values(embeddings, labels), values(embeddings + 1e3, labels)
    for name in (
        "alignment",
        "scatter_ratio",
        "nc1",
        "equinorm",
        "equiangularity",
        "simplex_deviation",
        "participation_ratio",
    ):
        assert far[name] == pytest.approx(near[name], rel=1e-6)


def test_spread_along_and_across_the_class_direction():
    """A class on a ray spreads along alone, a class on a sphere around a far point in all directions alike."""
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    ray = lengths.unsqueeze(1) * torch.tensor([[0.6, 0.8, 0.0]], dtype=torch.float64)
    found = values(ray, torch.zeros(4, dtype=torch.long), 1)
    assert (found["variance_along"], found["variance_across"]) == pytest.approx((1.25, 0), abs=1e-12)
    around = torch.cat((torch.eye(3), -torch.eye(3))).double() + torch.tensor([2.0, 5.0, 1.0])
    found = values(around, torch.zeros(6, dtype=torch.long), 1)
    assert (found["variance_along"], found["variance_across"], found["participation_ratio"]) == pytest.approx(
        (1 / 3, 1 / 3, 3)
    )


def summed_one_by_one(rows: Tensor, labels: Tensor, num_classes: int) -> ClassMoments:
    """Class moments in the dtype of the rows, an embedding at a time."""
    moments = ClassMoments.zeros(num_classes, rows.shape[1], rows.dtype)
    for row, label in zip(rows, labels.tolist(), strict=True):
        outer, square = torch.outer(row, row), row @ row
        per_class = {"counts": 1, "sums": row, "squared_norms": square, "fourth": square**2, "second": outer}
        for name, value in per_class.items():
            moments.tensors()[name][label] += value
        moments.second_moment.add_(outer)
    return moments


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.02])
def test_float32_sums_see_spreads_above_a_hundredth_of_the_norm(spread):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 4
    centers = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=1)
    rows = centers[labels] + spread / 4 * torch.randn(1000, 16, generator=generator)
    names = ["alignment", "scatter_ratio", "variance_across", "participation_ratio"]
    if spread / 4 > 0.01:  # along one direction
        names.append("subspace_overlap")
    exact, found = (class_moments(rows, labels, 4, dtype) for dtype in (torch.float64, torch.float32))
    plain = summed_one_by_one(rows, labels, 4)
    exact, found, plain = (torch.stack([GEOMETRY[name](sums) for name in names]) for sums in (exact, found, plain))
    # the order of a sum changes each value by a few times its error; the largest of few values is the measure
    assert_float32_error(found / exact, plain / exact, torch.ones(len(names)), factor=16)


@pytest.mark.parametrize("directions", [1, 3])
def test_subspace_overlap_compares_as_many_directions_as_asked(directions):
    embeddings, labels = data(dim=8)
    found = geometry.subspace_overlap(class_moments(embeddings, labels, 5), directions).item()
    bases = [
        np.linalg.svd(own)[2][:directions] for own in reference_geometry.members(embeddings.numpy(), labels.numpy())
    ]
    pairs = [((a @ b.T) ** 2).sum() / directions for i, a in enumerate(bases) for b in bases[:i]]
    assert found == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        geometry.subspace_overlap(class_moments(embeddings, labels, 5), 0)


def test_per_class_values_average_to_the_metric():
    embeddings, labels = data()  # class 3 has no rows
    moments = class_moments(embeddings, labels, 5)
    for name in ("participation_ratio", "variance_across", "variance_along"):
        each = getattr(geometry, f"class_{name}")(moments)
        assert each.isnan().tolist() == [False, False, False, True, False]
        assert each.nanmean().item() == pytest.approx(values(embeddings, labels)[name])
    for c in (0, 1, 2, 4):
        squares = embeddings[labels == c].square().sum(dim=1).numpy()
        assert geometry.class_rms_norm(moments)[c].item() == pytest.approx(np.sqrt(squares.mean()))
        assert geometry.class_norm_spread(moments)[c].item() == pytest.approx(squares.std() / squares.mean())


@pytest.mark.parametrize(("n", "dim"), [(60, 4), (5, 20)])
def test_singular_values_are_those_of_the_rows(n, dim):
    embeddings, labels = data(n=n, dim=dim)
    found = geometry.singular_values(class_moments(embeddings, labels, 5)).numpy()
    expected = np.linalg.svd(embeddings.numpy(), compute_uv=False)
    assert found == pytest.approx(np.pad(expected, (0, dim - len(expected))), rel=1e-9, abs=1e-9)
    assert (found > 0).sum() == np.linalg.matrix_rank(embeddings.numpy())


def test_all_metrics_cost_little():
    """Processor time of the whole table: ``pytest tests/test_geometry.py -k cost -rP``."""
    print()
    for num_classes, dim, repeats, most in ((10, 16, 30, 0.05), (100, 128, 3, 2.0)):
        labels = torch.arange(3000) % num_classes
        moments = class_moments(torch.randn(3000, dim, generator=torch.Generator().manual_seed(0)), labels, num_classes)
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            for function in GEOMETRY.values():
                function(moments)
            times.append(time.thread_time() - start)
        print(f"{num_classes} classes, {dim} dimensions: {1000 * min(times):.1f} ms for {len(GEOMETRY)} metrics")
        assert min(times) < most
