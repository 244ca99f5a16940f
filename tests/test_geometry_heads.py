"""Class means as classifiers, and uniformity, against NumPy, scikit-learn and SciPy."""

import numpy as np
import pytest
import scipy.spatial
import torch
from sklearn.neighbors import NearestCentroid

from simo_lightning.functional.geometry import nc3, nearest_class_mean_predict, uniformity
from simo_lightning.functional.moments import class_moments
from tests.reference_geometry import self_duality


def data(n: int = 90, dim: int = 6, num_classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    centers = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    return centers[labels] + torch.randn(n, dim, generator=generator, dtype=torch.float64), labels


def loop_uniformity(rows, t: float) -> float:
    """The paper's own lines, on normalised rows: pdist(x).pow(2).mul(-t).exp().mean().log()."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.log(np.mean(np.exp(-t * scipy.spatial.distance.pdist(unit) ** 2)))


def test_nc3_is_the_published_one():
    worst = 0.0
    for seed in range(5):
        embeddings, labels = data(seed=seed)
        weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = nc3(class_moments(embeddings, labels, 5), weight).item()
        worst = max(worst, abs(found / self_duality(embeddings.numpy(), labels.numpy(), weight.numpy()) - 1))
    print(f"\nnc3                  Han, Papyan & Donoho, ||W^T - M_||          {worst:.0e}")
    assert worst < 1e-9


def test_nc3_is_0_for_a_dual_head_and_4_for_its_negative():
    embeddings, labels = data()
    moments = class_moments(embeddings, labels, 5)
    head = 7 * (moments.means - moments.means.mean(dim=0))
    assert (nc3(moments, head).item(), nc3(moments, -head).item()) == pytest.approx((0, 4), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned = nc3(class_moments(3 * embeddings @ rotation, labels, 5), weight @ rotation)
    assert turned.item() == pytest.approx(nc3(moments, weight).item())


def test_nc3_leaves_out_classes_without_rows():
    embeddings, labels = data(num_classes=4)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = self_duality(embeddings.numpy(), labels.numpy(), weight[:4].numpy())
    assert nc3(class_moments(embeddings, labels, 5), weight).item() == pytest.approx(expected)


def test_nc3_is_undefined_without_two_different_means_or_with_a_head_of_zeros():
    embeddings, labels = data()
    moments = class_moments(embeddings, labels, 5)
    assert nc3(moments, torch.zeros(5, 6)).isnan()
    assert nc3(class_moments(embeddings, labels * 0, 5), torch.ones(5, 6)).isnan()
    assert nc3(class_moments(torch.full((90, 6), 0.1), labels, 5), torch.ones(5, 6)).isnan()
    assert nc3(class_moments(embeddings[:0], labels[:0], 5), torch.ones(5, 6)).isnan()
    with pytest.raises(ValueError, match=r"weight must have shape \(5, 6\), the moments' \(C, D\), got \(6, 5\)"):
        nc3(moments, torch.ones(6, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nearest_mean_is_scikit_learns_nearest_centroid(dtype):
    embeddings, labels = data()
    queries = data(n=300, seed=1)[0].to(dtype)
    means = class_moments(embeddings, labels, 5).means
    expected = NearestCentroid().fit(embeddings.numpy(), labels.numpy()).predict(queries.numpy())
    found = nearest_class_mean_predict(queries, means)
    different = int((found.numpy() != expected).sum())
    whose = f"scikit-learn NearestCentroid, {str(dtype).removeprefix('torch.')}"
    print(f"\nnearest mean         {whose:42} {different} of {len(expected)} differ")
    assert different == 0


def test_nearest_mean_by_cosine_is_the_largest_cosine():
    embeddings, labels = data()
    means = class_moments(embeddings, labels, 5).means * torch.arange(1, 6).unsqueeze(1)  # lengths do not matter
    lengths = np.linalg.norm(embeddings, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    expected = (embeddings.numpy() @ means.numpy().T / lengths).argmax(axis=1)
    assert nearest_class_mean_predict(embeddings, means, "cosine").tolist() == expected.tolist()
    assert nearest_class_mean_predict(embeddings, means).tolist() != expected.tolist()


def test_nearest_mean_passes_over_classes_without_mean_and_takes_the_lowest_of_equals():
    means = torch.tensor([[float("nan")] * 2, [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest_class_mean_predict(torch.tensor([[1.0, 0.1], [0.0, 2.0]]), means).tolist() == [1, 3]
    assert nearest_class_mean_predict(torch.zeros(1, 2), means, "cosine").tolist() == [1]
    assert nearest_class_mean_predict(torch.zeros(0, 2), means).shape == (0,)


def test_nearest_mean_tells_tight_means_far_from_the_origin_apart():
    """|a|^2 + |b|^2 - 2 a.b would lose the difference in float32."""
    means = torch.tensor([[1000.0, 0.0], [1000.1, 0.0]])
    assert nearest_class_mean_predict(torch.tensor([[1000.02, 0.0], [1000.08, 0.0]]), means).tolist() == [0, 1]


def test_nearest_mean_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"\(N, D\) and \(C, D\), got \(3, 2\) and \(4, 3\)"):
        nearest_class_mean_predict(torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match='distance must be "euclidean" or "cosine", got \'l1\''):
        nearest_class_mean_predict(torch.zeros(3, 2), torch.zeros(4, 2), "l1")
    with pytest.raises(ValueError, match="embeddings must be finite, got nan or inf in 1 of 2 embeddings"):
        nearest_class_mean_predict(torch.tensor([[1.0], [float("nan")]]), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="means must have a finite row, got none in 2"):
        nearest_class_mean_predict(torch.zeros(3, 1), torch.full((2, 1), float("nan")))


@pytest.mark.parametrize("n", [2, 90, 1500])  # more than one chunk of rows
def test_uniformity_is_the_papers(n):
    errors = []
    for t in (2.0, 0.5):
        rows = data(n=n)[0]
        errors.append(abs(uniformity(rows, t).item() / loop_uniformity(rows.numpy(), t) - 1))
    print(f"\nuniformity, N = {n:<4} scipy pdist, Wang & Isola's lines          {max(errors):.0e}")
    assert max(errors) < 1e-9


def test_uniformity_of_copies_is_that_of_the_rows_repeated():
    rows = data(n=20)[0]
    counts = torch.arange(20) % 4 + 1
    found = uniformity(rows, counts=counts).item()
    assert found == pytest.approx(loop_uniformity(rows.repeat_interleave(counts, dim=0).numpy(), 2.0))


def test_uniformity_of_known_points():
    assert uniformity(torch.tensor([[1.0, 2.0]]).repeat(5, 1)).item() == 0
    assert uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).item() == pytest.approx(-8)
    assert uniformity(torch.eye(2), t=400.0).item() == pytest.approx(-800)  # exp(-800) itself is 0 in float64
    assert uniformity(torch.zeros(3, 2)).item() == 0
    tiny = torch.tensor([[1e-30, 0.0], [0.0, 1e30]])
    assert uniformity(tiny).item() == pytest.approx(-4)


@pytest.mark.parametrize("rows", [[], [[1.0, 0.0]], [[1.0, float("nan")], [0.0, 1.0]], [[1.0, float("inf")]] * 2])
def test_uniformity_is_undefined_for_less_than_two_or_what_is_not_finite(rows):
    assert uniformity(torch.tensor(rows).view(-1, 2)).isnan()


def test_uniformity_does_not_change_with_order_rotation_and_lengths():
    rows = data()[0]
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    lengths = torch.rand(90, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert uniformity((rows * lengths @ rotation).flip(0)).item() == pytest.approx(uniformity(rows).item())


def test_uniformity_errors_name_the_argument():
    with pytest.raises(
        ValueError, match=r"embeddings must be floats of shape \(N, D\), got torch.float32 of shape \(3,\)"
    ):
        uniformity(torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts must have shape \(3,\), one for each embedding, got \(2,\)"):
        uniformity(torch.zeros(3, 2), counts=torch.ones(2))
    with pytest.raises(ValueError, match="t must be positive, got 0"):
        uniformity(torch.zeros(3, 2), t=0)
