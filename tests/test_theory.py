"""Each claim of docs/theory.md: by loops over pairs and autograd in float64, or by free embeddings that descend."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import theory
from benchmarks.theory import minimise
from simo_lightning import SimOLoss
from simo_lightning.functional.decomposition import orthogonal_shares
from simo_lightning.functional.prototypes import class_prototypes
from tests import reference

PAGE = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()
FORMS = [
    *((level, form) for level in ("group", "class", "centroid", "pair") for form in ("ratio", "log")),
    ("centroid", "softmax"),
    ("pair", "softmax"),
]
TINY = 1e-12  # rounding of sums of a few dozen numbers of order 1 in float64
EPS = 0.01


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(x: Tensor, labels: list[int], level: str, form: str, eps: float = EPS) -> Tensor:
    """The loss without prototypes, each term with weight 1, by loops over pairs."""
    terms = reference.simo(x, labels, level, form, eps)
    return sum(term for name, term in terms.items() if name != "mean")


def plain(level: str, form: str, eps: float = EPS, **arguments: float) -> SimOLoss:
    return SimOLoss(level, form, eps, **{"mean_weight": 0.0, "prototype_weight": 0.0, **arguments})


def odds(cosine: float, eps: float) -> float:
    return (eps + cosine**2) / (eps + 2 - 2 * cosine)


# ---- the page


@pytest.mark.parametrize("name", theory.TABLES)
def test_the_page_has_the_table_that_its_command_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    theory.main([name])
    assert f"    python -m benchmarks.theory {name}\n\n{capsys.readouterr().out.strip()}\n" in PAGE


def test_the_page_names_tests_that_exist() -> None:
    words = re.findall(r'tests/test_theory\.py -k "?([\w ]+)"?', PAGE)
    names = [name for name in globals() if name.startswith("test_")]
    assert len(words) >= 10
    for word in " or ".join(words).split(" or "):
        assert any(word.strip() in name for name in names), word


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    theory.main(["--figure", str(tmp_path / "theory.png")])
    assert (tmp_path / "theory.png").stat().st_size > 10_000


def test_an_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        theory.main(["saddles"])
    assert "tables are saddle" in capsys.readouterr().err


# ---- merged classes are saddles


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("level, form", FORMS)
def test_merged_gradient_is_the_same_for_both_classes(level: str, form: str, normalize: bool) -> None:
    merged, others = randn(3, 4), randn(6, 4, seed=1)
    x = torch.cat([merged, merged, others]).requires_grad_()
    labels = torch.arange(4).repeat_interleave(3)
    rows = F.normalize(x, dim=1) if normalize else x
    loops = torch.autograd.grad(by_loops(rows, labels.tolist(), level, form), x)[0]
    ours = torch.autograd.grad(plain(level, form, normalize=normalize, dissimilar_weight=1.0)(x, labels), x)[0]
    for gradient in (loops, ours):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient[:3], gradient[3:6], rtol=1e-9, atol=TINY)


@pytest.mark.parametrize("level, form", FORMS)
def test_merged_gradient_of_classes_of_different_sizes(level: str, form: str) -> None:
    point, others = F.normalize(randn(1, 4), dim=1), randn(4, 4, seed=1)
    x = torch.cat([point.repeat(5, 1), others]).requires_grad_()
    gradient = torch.autograd.grad(by_loops(F.normalize(x, dim=1), [0, 0, 1, 1, 1, 2, 2, 3, 3], level, form), x)[0]
    difference = (gradient[:2].mean(dim=0) - gradient[2:5].mean(dim=0)).norm()
    if level in ("group", "pair"):
        assert difference < TINY
    else:
        assert difference > 1e-4


@pytest.mark.parametrize("eps", [0.1, 0.01])
@pytest.mark.parametrize("level, form", [pair for pair in FORMS if pair != ("pair", "softmax")])
def test_merged_curvature(level: str, form: str, eps: float) -> None:
    classes = 4
    pairs, theta = classes * (classes - 1) // 2, torch.zeros((), dtype=torch.float64, requires_grad=True)
    labels = torch.arange(classes).repeat_interleave(2).tolist()
    loss = by_loops(theory.at_angle(theta, classes), labels, level, form, eps)
    (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
    curvature = float(torch.autograd.grad(slope, theta, retain_graph=True)[0]) * (
        classes / 2 if form == "softmax" else pairs
    )
    whole = pairs * eps + 2 * (pairs - 1)
    expected = {
        ("group", "ratio"): -2 * (1 + 1 / whole) * pairs / whole,
        ("group", "log"): -2 * pairs / whole,
        ("centroid", "softmax"): -(1 + 2 * eps)
        / (eps * (1 + eps))
        * 2
        / (2 + (classes - 2) * eps**2 / ((2 + eps) * (1 + eps))),
    }.get((level, form), -2 * (1 + eps) / eps**2 if form == "ratio" else -2 / eps)
    assert abs(float(slope.detach())) < 1e-10
    assert curvature == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["ratio", "log"])
def test_merged_curvature_steepest_slope(form: str) -> None:
    eps = 1e-6
    angle, expected = {
        "log": (eps**0.5, eps**-0.5),
        "ratio": ((eps / 3) ** 0.5, 9 / (8 * 3**0.5) * eps**-1.5),
    }[form]

    def push(theta: float) -> float:
        return -theory.slope(theory.of_one_pair("pair", form, eps, 2), theta, 2)

    assert push(angle) == pytest.approx(expected, rel=1e-4)
    assert push(angle) > max(push(1.05 * angle), push(angle / 1.05))


@pytest.mark.parametrize("level, form", FORMS)
def test_merged_minimum_is_a_critical_point_with_negative_curvature(level: str, form: str) -> None:
    """Three classes, two of them merged: the lowest loss of points, and the Hessian of all six embeddings there."""
    labels, loss = [0, 0, 1, 1, 2, 2], plain(level, form, dissimilar_weight=None if form == "softmax" else 1.0)
    rows = torch.tensor([0, 0, 0, 0, 1, 1])
    _, points = minimise(lambda x: loss(x[rows], torch.tensor(labels)), 2, 3, starts=2)

    def of_all(flat: Tensor) -> Tensor:
        return by_loops(F.normalize(flat.view(6, 3), dim=1), labels, level, form)

    x = points[rows].flatten().requires_grad_()
    gradient = torch.autograd.grad(of_all(x), x)[0]
    hessian = torch.autograd.functional.hessian(of_all, x.detach())
    # the gradient at the end of the descent is 1e-10, times the curvature of the ratio, which is 2e4
    assert gradient.abs().max() < 1e-6
    swap = torch.eye(18, dtype=torch.float64).view(6, 3, 18)[[2, 3, 0, 1, 4, 5]].reshape(18, 18)
    apart = (torch.eye(18, dtype=torch.float64) - swap) / 2  # projection on what exchanging the classes reverses
    lowest = torch.linalg.eigvalsh(apart @ hessian @ apart)[0]
    assert lowest < -0.1


@pytest.mark.parametrize("form, scale", [("log", 2 / EPS), ("ratio", 2 / EPS**2), ("softmax", 1 / EPS)])
def test_prototypes_leave_the_saddle(form: str, scale: float) -> None:
    weight, labels = 1e-6, [0, 0, 1, 1]
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).unsqueeze(1)
    axes = torch.eye(4, dtype=torch.float64)
    for x in (F.normalize(axes[0] + axes[1], dim=0), axes[2], F.normalize(randn(4), dim=0)):
        rows = x.repeat(4, 1).requires_grad_()
        terms = reference.simo(F.normalize(rows, dim=1), labels, "centroid", form, EPS, prototype_weight=weight)
        loss = sum(term for name, term in terms.items() if name != "mean")
        gradient = (torch.autograd.grad(loss, rows)[0] * signs).sum(dim=0)  # by v, of rows x + v and x - v
        apart = axes[0] - axes[1]
        expected = -scale * weight * (apart - (apart @ x) * x)
        # relative corrections of order eps, and of order weight^2 / eps
        assert (gradient - expected).norm() < 2 * EPS * expected.norm()
    x = F.normalize(axes[0] - axes[1], dim=0)
    rows = x.repeat(4, 1).requires_grad_()
    terms = reference.simo(F.normalize(rows, dim=1), labels, "centroid", form, EPS, prototype_weight=weight)
    gradient = torch.autograd.grad(sum(term for name, term in terms.items() if name != "mean"), rows)[0]
    assert (gradient * signs).sum(dim=0).norm() < 2 * EPS * scale * weight


# ---- batch means


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_batch_means_have_this_noise_and_this_distance(weight: float) -> None:
    """All 4^3 draws of three embeddings from four equally likely vectors."""
    values, prototype, count = randn(4, 2), randn(2, seed=1), 3
    mean = values.mean(dim=0)
    variance = float((values - mean).square().sum(dim=1).mean())
    distances, other, centers = [], [], []
    for draw in itertools.product(range(4), repeat=count):
        batch = values[list(draw)]
        center = (1 - weight) * batch.mean(dim=0) + weight * prototype
        centers.append(center)
        distances.append(float((batch[0] - center).square().sum()))
        other += [float((value - batch.mean(dim=0)).square().sum()) for value in values]  # one that is not in it
    spread = torch.stack(centers) - torch.stack(centers).mean(dim=0)
    assert float(spread.square().sum(dim=1).mean()) == pytest.approx((1 - weight) ** 2 * variance / count, abs=TINY)
    own = (1 - weight) / count
    factor = (1 - own) ** 2 + (1 - weight) ** 2 * (count - 1) / count**2
    bias = weight**2 * float((prototype - mean).square().sum())
    assert sum(distances) / len(distances) == pytest.approx(factor * variance + bias, rel=TINY)
    if weight == 0:
        assert factor == pytest.approx(1 - 1 / count)
        assert sum(other) / len(other) == pytest.approx((1 + 1 / count) * variance, rel=TINY)


# ---- likelihoods


@pytest.mark.parametrize("eps", [0.001, 0.1])
def test_likelihood_of_a_pair(eps: float) -> None:
    for cosine in torch.linspace(-1, 1, 21).tolist():
        pair = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
        o, d = cosine**2, 2 - 2 * cosine
        similar = float(plain("pair", "log", eps)(pair, torch.tensor([0, 0])))
        different = float(plain("pair", "log", eps, dissimilar_weight=1.0)(pair, torch.tensor([0, 1])))
        p, q = (eps + o) / (eps + o + d), (eps + d) / (eps + o + d)
        assert o + d == pytest.approx(1 + (1 - cosine) ** 2)
        assert (similar, different) == pytest.approx((-math.log(p), -math.log(q)), abs=1e-7 if cosine == 1 else 1e-9)
        gap = eps / (eps + o + d)
        assert p + q - 1 == pytest.approx(gap, abs=TINY)
        assert eps / (5 + eps) - TINY <= gap <= eps / (1 + eps) + TINY
        logit = torch.tensor(math.log(eps + o) - math.log(eps + d), dtype=torch.float64)
        for target, loss in ((1.0, similar), (0.0, different)):
            entropy = F.binary_cross_entropy_with_logits(logit, torch.tensor(target, dtype=torch.float64))
            assert float(entropy) - loss == pytest.approx(math.log1p(gap), abs=1e-7)
            assert math.log1p(gap) < eps


def test_likelihood_of_an_embedding_is_that_of_one_classifier_per_class() -> None:
    labels, x = torch.arange(5).repeat_interleave(3), F.normalize(randn(15, 4), dim=1)
    centers = torch.stack([x[labels == label].mean(dim=0) for label in range(5)])
    total = 0.0
    for row, own in zip(x, labels.tolist(), strict=True):
        for label, center in enumerate(centers):
            o, d = float(row @ center) ** 2, float((row - center).square().sum())
            total -= math.log((EPS + (o if label == own else d)) / (EPS + o + d))
    assert float(plain("centroid", "log")(x, labels)) == pytest.approx(total / 15, rel=1e-12)


def test_opposite_similar_embeddings_are_a_local_minimum() -> None:
    def similar(cosine: Tensor) -> Tensor:
        return torch.log1p((2 - 2 * cosine) / (EPS + cosine**2))

    top = torch.tensor(1 - math.sqrt(1 + EPS), dtype=torch.float64, requires_grad=True)
    assert abs(float(torch.autograd.grad(similar(top), top)[0])) < 1e-9
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    steps = similar(cosines).diff()
    assert (steps[cosines[1:] < top] > 0).all()
    assert (steps[cosines[:-1] > top] < 0).all()
    assert float(similar(cosines[0])) == pytest.approx(math.log1p(4 / (1 + EPS)))
    angle = torch.tensor(2.0, dtype=torch.float64)  # more than 90 degrees: descends to 180
    x = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.tensor([1.0, 0.0], dtype=torch.float64)])
    for _ in range(200):
        x = F.normalize(x, dim=1).requires_grad_()
        gradient = torch.autograd.grad(plain("pair", "log")(x, torch.tensor([4, 4])), x)[0]
        x = (x - 0.1 * gradient).detach()
    assert float(F.cosine_similarity(x[0], x[1], dim=0)) == pytest.approx(-1, abs=1e-6)


def test_softmax_is_the_likelihood_given_that_exactly_one_class_is_right() -> None:
    labels, x = torch.arange(4).repeat_interleave(2), F.normalize(randn(8, 3), dim=1)
    centers = torch.stack([x[labels == label].mean(dim=0) for label in range(4)])
    losses = []
    for row, own in zip(x, labels.tolist(), strict=True):
        r = [(EPS + float(row @ center) ** 2) / (EPS + float((row - center).square().sum())) for center in centers]
        b = [each / (1 + each) for each in r]
        outcomes = {
            answers: math.prod(p if yes else 1 - p for yes, p in zip(answers, b, strict=True))
            for answers in itertools.product((True, False), repeat=4)
        }
        exactly_one = {answers.index(True): p for answers, p in outcomes.items() if sum(answers) == 1}
        posterior = exactly_one[own] / sum(exactly_one.values())
        assert posterior == pytest.approx(r[own] / sum(r), rel=1e-12)
        binary = -math.log(b[own]) - sum(math.log(1 - p) for label, p in enumerate(b) if label != own)
        assert -math.log(posterior) == pytest.approx(binary + math.log(sum(exactly_one.values())), rel=1e-12)
        assert -math.log(posterior) < binary
        losses.append(-math.log(posterior))
    assert float(plain("centroid", "softmax")(x, labels)) == pytest.approx(sum(losses) / 8, rel=1e-12)


def test_softmax_of_two_classes_is_another_loss_than_log() -> None:
    labels, x = torch.tensor([0, 0, 1, 1]), F.normalize(randn(4, 3), dim=1)
    eps = 1e-12
    centers = torch.stack([x[:2].mean(dim=0), x[2:].mean(dim=0)])
    r = (x @ centers.T).square() / (x.unsqueeze(1) - centers).square().sum(dim=2)
    own, other = r[range(4), labels], r[range(4), 1 - labels]
    softmax, log = float(plain("centroid", "softmax", eps)(x, labels)), float(plain("centroid", "log", eps)(x, labels))
    assert softmax == pytest.approx(float((other / own).log1p().mean()), rel=1e-6)
    assert log == pytest.approx(float(((1 / own).log1p() + other.log1p()).mean()), rel=1e-6)
    assert softmax < log


# ---- as many dimensions as classes


@pytest.mark.parametrize("form", ["ratio", "log"])
@pytest.mark.parametrize("level", ["group", "class", "centroid", "pair"])
def test_zero_loss_of_orthogonal_points(level: str, form: str) -> None:
    points = torch.linalg.qr(randn(5, 5))[0][:4]
    labels = torch.arange(4).repeat_interleave(3)
    x = points[labels]
    assert float(by_loops(x, labels.tolist(), level, form)) < TINY
    assert float(plain(level, form, mean_weight=1.0)(x, labels)) < 1e-9
    for seed in range(20):  # anything else is above 0
        moved = F.normalize(x + 1e-3 * randn(12, 5, seed=seed), dim=1)
        assert float(by_loops(moved, labels.tolist(), level, form)) > 1e-9


def test_zero_loss_bounds_distances_and_cosines() -> None:
    labels, loss = torch.arange(4).repeat_interleave(3), plain("centroid", "log")
    start = F.normalize(1 + 0.5 * randn(12, 5), dim=1)
    x, values = start, []
    for _ in range(60):
        x = F.normalize(x, dim=1).requires_grad_()
        value = loss(x, labels)
        centers = torch.stack([x[labels == label].mean(dim=0) for label in range(4)])
        own = labels.unsqueeze(1) == torch.arange(4)
        factor = math.expm1(12 * float(value.detach()))
        assert (x.unsqueeze(1) - centers).square().sum(dim=2)[own].max() <= (1 + EPS) * factor
        assert (x @ centers.T).square()[~own].max() <= (4 + EPS) * factor
        values.append(float(value.detach()))
        x = (x - 0.05 * torch.autograd.grad(value, x)[0]).detach()
    assert values[-1] < 0.1 * values[0]


def test_zero_loss_without_normalisation_also_at_the_origin() -> None:
    labels = torch.arange(3).repeat_interleave(2)
    x = torch.zeros(6, 4, dtype=torch.float64)
    for level, form in FORMS[:8]:
        assert float(plain(level, form, normalize=False)(x, labels)) == 0
    scaled = [float(SimOLoss.paper()(scale * randn(6, 4), labels)) for scale in (1.0, 1e-2, 1e-4)]
    assert scaled[2] < 1e-5 < scaled[1] < scaled[0]


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_prototype_optimum_is_the_prototypes(weight: float) -> None:
    labels = torch.tensor([0, 0, 2, 2, 3, 3])
    axes = class_prototypes(labels, 4, torch.float64)
    loss = SimOLoss(prototype_weight=weight)
    assert float(loss(axes, labels)) < TINY
    for seed in range(20):
        turned = axes @ torch.linalg.qr(torch.eye(4, dtype=torch.float64) + 0.1 * randn(4, 4, seed=seed))[0].abs()
        assert float(loss(turned, labels)) > 1e-4
    beyond = torch.tensor([0, 0, 5, 5])  # a prototype of signs
    assert minimise(lambda x: loss(x, beyond), 4, 4)[0] > 1e-4


@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_softmax_optimum_has_slightly_obtuse_angles(eps: float) -> None:
    best = theory.best_cosine(eps)
    assert best**2 - (2 + eps) * best - eps == pytest.approx(0, abs=TINY)
    assert best == pytest.approx(-eps / 2, rel=eps)
    cosines = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    values = [odds(cosine, eps) for cosine in cosines.tolist()]
    assert min(values) >= odds(best, eps)
    assert float(cosines[values.index(min(values))]) == pytest.approx(best, abs=1e-3)
    labels = torch.arange(5).repeat_interleave(2)
    value, x = minimise(lambda x: plain("centroid", "softmax", eps)(x, labels), 10, 5)
    lowest = math.log1p(4 * odds(best, eps) * eps / (1 + eps))
    assert value == pytest.approx(lowest, rel=1e-6)
    torch.testing.assert_close(x[::2], x[1::2], rtol=0, atol=1e-4)
    assert (theory.off_diagonal(x[::2]) - best).abs().max() < 1e-3


def test_softmax_optimum_of_a_fixed_temperature_is_the_simplex() -> None:
    labels = torch.arange(4).repeat_interleave(2)
    _, x = minimise(lambda x: theory.normalised_softmax(x, labels), 8, 4)
    assert (theory.off_diagonal(x[::2]) + 1 / 3).abs().max() < 1e-3


def test_smoothing_makes_class_means_shorter() -> None:
    classes, eps, smoothing = 4, 0.1, 0.1
    wrong = smoothing / classes
    right = 1 - smoothing + wrong
    entropy = -right * math.log(right) - (classes - 1) * wrong * math.log(wrong)

    def ratio(length: float) -> float:  # odds of a wrong class over those of the own
        return eps / (eps + 1 + length**2) * (eps + 1 - length**2) / (eps + length**4)

    low, high = 0.5, 1.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if ratio((low + high) / 2) > wrong / right else (low, (low + high) / 2)
    labels = torch.arange(classes).repeat_interleave(2)
    axes = torch.eye(2 * classes, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(classes).unsqueeze(1)
    x = low * axes[labels] + signs * math.sqrt(1 - low**2) * axes[classes + labels]
    loss = plain("centroid", "softmax", eps, label_smoothing=smoothing, mean_weight=0.2)
    assert float(loss(x, labels)) == pytest.approx(entropy, rel=1e-12)
    for seed in range(20):
        assert float(loss(randn(8, 8, seed=seed), labels)) > entropy
    assert float(loss(axes[labels], labels)) > entropy  # of points


# ---- more classes than dimensions


def frame(classes: int, dim: int) -> Tensor:
    """The tight frame of mean zero of the page, for even D, or odd D and even C."""
    steps = torch.arange(classes, dtype=torch.float64)
    angles = 2 * math.pi / classes * steps.unsqueeze(1) * torch.arange(1, dim // 2 + 1)
    x = torch.cat([angles.cos(), angles.sin()], dim=1) * (2 / dim) ** 0.5
    return x if dim % 2 == 0 else torch.cat([x, (1 - 2 * (steps % 2)).unsqueeze(1) / dim**0.5], dim=1)


@pytest.mark.parametrize("classes, dim", [(3, 2), (5, 2), (5, 4), (10, 4), (4, 3), (6, 3), (8, 5)])
def test_welch_bound_is_the_optimum_of_the_group_level(classes: int, dim: int) -> None:
    x, labels = frame(classes, dim), torch.arange(classes).repeat_interleave(2)
    bound = theory.welch(classes, dim) / (EPS + 2 * classes / (classes - 1))
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(x.T @ x, classes / dim * eye, rtol=0, atol=TINY)
    assert x.sum(dim=0).norm() < TINY
    assert float(theory.off_diagonal(x).square().mean()) == pytest.approx(theory.welch(classes, dim), rel=1e-12)
    assert float(by_loops(x[labels], labels.tolist(), "group", "ratio")) == pytest.approx(bound, rel=1e-12)
    assert float(plain("group", "ratio")(x[labels], labels)) == pytest.approx(bound, rel=1e-9)
    for seed in range(50):  # dissimilar side of embeddings that need not be points
        spread = F.normalize(x[labels] + 0.3 * (seed % 5) * randn(len(labels), dim, seed=seed), dim=1)
        terms = plain("group", "ratio").terms(spread, labels)
        assert float(terms["dissimilar"]) >= bound * (1 - 1e-12)


@pytest.mark.parametrize("classes, dim", [(7, 3), (9, 3), (8, 5), (9, 5)])
def test_welch_bound_is_reached_by_descent(classes: int, dim: int) -> None:
    value, x = minimise(lambda x: plain("group", "ratio")(x, torch.arange(classes)), classes, dim)
    assert value == pytest.approx(theory.welch(classes, dim) / (EPS + 2 * classes / (classes - 1)), rel=1e-8)
    assert x.mean(dim=0).norm() < 1e-3


@pytest.mark.parametrize("classes, dim", [(5, 3), (7, 5)])
def test_welch_bound_is_not_reached_by_two_more_classes_than_an_odd_dimension(classes: int, dim: int) -> None:
    value, _ = minimise(lambda x: plain("group", "ratio")(x, torch.arange(classes)), classes, dim)
    assert value > 1.001 * theory.welch(classes, dim) / (EPS + 2 * classes / (classes - 1))


@pytest.mark.parametrize("form", ["ratio", "log"])
@pytest.mark.parametrize("dim", [2, 3, 5])
def test_opposite_pairs_are_the_optimum_of_twice_as_many_classes(dim: int, form: str) -> None:
    classes, labels = 2 * dim, torch.arange(2 * dim)
    factor = reference.shape(form)(torch.tensor(1 / (EPS + 4), dtype=torch.float64))
    bound = theory.welch(classes, dim) * float(factor)
    axes = torch.eye(dim, dtype=torch.float64)
    loss = plain("pair", form, dissimilar_weight=1.0)
    assert float(loss(torch.cat([axes, -axes]), labels)) == pytest.approx(bound, rel=1e-12)
    value, x = minimise(lambda x: loss(x, labels), classes, dim)
    assert value == pytest.approx(bound, rel=1e-6)
    assert float(theory.off_diagonal(x).max()) < 1e-2
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    ratios = cosines**2 / (EPS + 2 - 2 * cosines)
    assert (reference.shape(form)(ratios) >= cosines**2 * factor - TINY).all()
    for count in range(dim + 1, classes):  # fewer pairs: above the bound by 2D / C
        some = float(loss(torch.cat([axes, -axes[: count - dim]]), labels[:count]))
        assert some == pytest.approx(theory.welch(count, dim) * float(factor) * 2 * dim / count, rel=1e-12)


def test_opposite_pairs_or_a_simplex_by_the_form() -> None:
    axes, labels = torch.eye(2, dtype=torch.float64), torch.arange(3)
    pair = torch.cat([axes, -axes[:1]])
    ratio, log = (plain("pair", form, dissimilar_weight=1.0) for form in ("ratio", "log"))
    assert float(ratio(frame(3, 2), labels)) < float(ratio(pair, labels))
    assert float(log(pair, labels)) < float(log(frame(3, 2), labels))


@pytest.mark.parametrize("form", ["ratio", "log"])
def test_pentagons_in_orthogonal_planes(form: str) -> None:
    pentagons = torch.block_diag(frame(5, 2), frame(5, 2))
    loss, labels = plain("pair", form, dissimilar_weight=1.0), torch.arange(10)
    value, x = minimise(lambda x: loss(x, labels), 10, 4, starts=8)
    assert value >= float(loss(pentagons, labels)) * (1 - 1e-9)  # none is lower
    found, expected = (theory.off_diagonal(each).sort().values for each in (x, pentagons))
    if form == "log":  # which most starts reach
        assert (found - expected).abs().max() < 1e-2
    assert float(found.square().mean()) == pytest.approx(theory.welch(10, 4), abs=1e-4)
    assert float(expected.square().mean()) == pytest.approx(theory.welch(10, 4), rel=1e-12)


def test_points_are_not_the_optimum_of_many_classes() -> None:
    for classes, dim in ((6, 2), (20, 2), (12, 4)):
        labels, loss = torch.arange(classes).repeat_interleave(2), plain("centroid", "log")
        x = frame(classes, dim)[labels]
        bound = (classes / dim - 1) * math.log1p(1 / (EPS + 4))
        assert float(loss(x, labels)) >= bound
        for seed in range(10):
            assert float(loss(randn(classes, dim, seed=seed)[labels], labels)) >= bound
        x[::2] *= -1  # all class means are 0
        assert float(loss(x, labels)) == pytest.approx(math.log1p(1 / EPS), rel=1e-9)


# ---- orthogonal shares


def test_shares_are_a_distribution_and_near_the_probability_of_the_pair() -> None:
    means, eps = torch.linalg.qr(randn(6, 6))[0][:4], 1e-3
    x = F.normalize(randn(200, 6, seed=1), dim=1)
    shares, rest = orthogonal_shares(x, means)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(dim=1) + rest, torch.ones(200, dtype=torch.float64), rtol=0, atol=TINY)
    cosines = x @ means.T
    torch.testing.assert_close(shares, cosines.square(), rtol=0, atol=TINY)
    o, d = cosines.square(), 2 - 2 * cosines
    without, same = o / (o + d), (eps + o) / (eps + o + d)
    gap = (cosines * (1 - cosines)).square() / (1 + (1 - cosines).square())
    torch.testing.assert_close(shares - without, gap, rtol=0, atol=TINY)
    assert (gap[cosines >= 0] <= 1 / 16).all()
    assert ((same - without) >= 0).all()
    assert ((same - without) < eps).all()
    assert float(orthogonal_shares(torch.linalg.qr(randn(6, 6))[0][4:5], means).rest) == pytest.approx(1)


def test_shares_and_softmax_order_classes_alike_where_cosines_are_positive() -> None:
    means = torch.eye(4, dtype=torch.float64)
    x = F.normalize(randn(100, 4).abs(), dim=1)

    def probabilities(x: Tensor) -> Tensor:
        o, d = (x @ means.T).square(), (x.unsqueeze(1) - means).square().sum(dim=2)
        return ((EPS + o) / (EPS + d)).log().softmax(dim=1)

    assert torch.equal(probabilities(x).argsort(dim=1), orthogonal_shares(x, means).shares.argsort(dim=1))
    roots = orthogonal_shares(x, means).shares.sqrt()
    formula = (EPS + roots**2) / (EPS + 2 - 2 * roots)
    torch.testing.assert_close(probabilities(x), formula / formula.sum(dim=1, keepdim=True), rtol=1e-9, atol=0)
    negative = torch.tensor([[-0.8, 0.5, math.sqrt(1 - 0.89), 0.0]], dtype=torch.float64)
    shares = orthogonal_shares(negative, means).shares[0]
    assert shares[:2].tolist() == pytest.approx([0.64, 0.25])
    assert probabilities(negative)[0, 0] < probabilities(negative)[0, 1]


def test_shares_are_the_softmax_at_a_temperature_of_about_two() -> None:
    middle = (3 + 2**0.5) / 2
    found = [theory.temperature(degrees) for degrees in [0.001, *range(1, 45), 44.999]]
    assert found == sorted(found)
    assert 2 < found[0] < found[-1] < middle
    assert found[-1] == pytest.approx(middle, abs=1e-6)
    for degrees in (5, 30, 44, 60):
        angle = math.radians(degrees)
        logits = [2 * math.log(math.cos(angle)) - math.log(2 - 2 * math.cos(angle))]
        logits.append(2 * math.log(math.sin(angle)) - math.log(2 - 2 * math.sin(angle)))
        cooled = torch.tensor(logits, dtype=torch.float64) / theory.temperature(degrees)
        assert float(cooled.softmax(dim=0)[0]) == pytest.approx(math.cos(angle) ** 2, rel=1e-9)
