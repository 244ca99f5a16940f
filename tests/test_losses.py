import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simo_lightning import SimOLoss
from simo_lightning.functional import class_moments, simo
from tests import reference
from tests.bounds import assert_stable

FORMS = [
    *((level, form) for level in ("group", "class", "centroid", "pair") for form in ("ratio", "log")),
    ("centroid", "softmax"),
    ("pair", "softmax"),
]
LABELS = {
    "balanced": [0, 1, 2] * 5,
    "ragged": [7, 7, -3, 100, 7, 7, 100, 7, 5, 7, 7, 100, 7, 7],  # sizes 9, 3, 1, 1
    "far apart": [10**12, 0, 10**12, 0, -(10**9)],
    "one class": [4] * 6,
    "all different": [3, 1, 2],
}


def draw(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss: Tensor, embeddings: Tensor) -> Tensor:
    return torch.autograd.grad(loss, embeddings, retain_graph=True)[0]


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize(
    ("level", "form", "prototype_weight"),
    [
        *((*each, 0.0) for each in FORMS),
        *(("centroid", form, weight) for form in ("ratio", "log", "softmax") for weight in (0.3, None)),
    ],
)
def test_value_and_gradient_equal_the_loops(
    level: str, form: str, prototype_weight: float | None, dim: int, labels: list[int]
) -> None:
    embeddings = draw(len(labels), dim).requires_grad_()
    smoothing = 0.2 if form == "softmax" else 0.0
    loss = SimOLoss(
        level,
        form,
        eps=0.05,
        orthogonality_leaning=0.7,
        normalize=False,
        similar_weight=2.0,
        dissimilar_weight=2.0 if form == "softmax" else 3.0,
        mean_weight=0.5,
        label_smoothing=smoothing,
        prototype_weight=prototype_weight,
    )
    expected = reference.simo(
        embeddings, labels, level, form, eps=0.05, leaning=0.7, smoothing=smoothing, prototype_weight=prototype_weight
    )
    weights = {"similar": 2.0, "dissimilar": 3.0, "softmax": 2.0, "mean": 0.5}
    expected = {name: weights[name] * term for name, term in expected.items()}
    terms = loss.terms(embeddings, torch.tensor(labels))
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(
            gradient(term, embeddings), gradient(expected[name], embeddings), rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(loss(embeddings, torch.tensor(labels)), sum(expected.values()), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("level", "form"), FORMS)
def test_normalize_divides_by_the_length(level: str, form: str) -> None:
    embeddings, labels = draw(9, 4), [0, 1, 2] * 3
    unit = torch.stack([row / math.sqrt(float(row @ row)) for row in embeddings])
    value = SimOLoss(
        level, form, eps=0.01, dissimilar_weight=1.0, mean_weight=0.0, label_smoothing=0.0, prototype_weight=0.0
    )(embeddings, torch.tensor(labels))
    expected = reference.simo(unit, labels, level, form)
    expected.pop("mean")
    torch.testing.assert_close(value, sum(expected.values()), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("level", "form"), FORMS)
def test_gradcheck(level: str, form: str) -> None:
    embeddings = draw(10, 3, seed=3).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3])
    loss = SimOLoss(level, form, eps=0.1, mean_weight=1.0)
    assert torch.autograd.gradcheck(lambda rows: loss(rows, labels), (embeddings,))
    assert torch.autograd.gradgradcheck(lambda rows: loss(rows, labels), (embeddings,))


@pytest.mark.parametrize(("level", "form"), [("centroid", "log"), ("pair", "softmax")])
def test_chunks_have_second_derivatives(level: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simo, "_CHUNK_ENTRIES", 12)
    loss, labels = SimOLoss(level, form), torch.tensor([0, 1, 1, 0, 2])
    embeddings = draw(5, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda rows: loss(rows, labels), (embeddings,))


@pytest.mark.parametrize(("level", "form"), FORMS)
def test_the_order_of_the_rows_does_not_matter(level: str, form: str) -> None:
    embeddings, labels = draw(12, 4), torch.tensor([0, 1, 2, 2] * 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    loss = SimOLoss(level, form)
    torch.testing.assert_close(loss(embeddings, labels), loss(embeddings[order], labels[order]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("level", "form"), [each for each in FORMS if each[0] != "group"])
def test_chunks_add_up(level: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = draw(40, 16).requires_grad_(), torch.tensor([0] * 21 + [1] * 13 + [2] * 6)
    loss = SimOLoss(level, form)
    whole = loss(embeddings, labels)
    for size in (1, 100, 1000):
        monkeypatch.setattr(simo, "_CHUNK_ENTRIES", size)
        parts = loss(embeddings, labels)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(parts, embeddings), gradient(whole, embeddings), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("level", "form"), FORMS)
@pytest.mark.parametrize("labels", [[], [5], [5, 5], [5, 6]], ids=str)
def test_batches_with_one_class_or_none_are_finite_with_a_gradient(level: str, form: str, labels: list[int]) -> None:
    embeddings = draw(len(labels), 3).requires_grad_()
    value = SimOLoss(level, form, mean_weight=1.0)(embeddings, torch.tensor(labels, dtype=torch.long))
    value.backward()
    assert value.isfinite()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("level", ["group", "class", "centroid", "pair"])
def test_own_class_distances_of_tight_classes_keep_their_digits_in_float32(level: str) -> None:
    """A product of uncentered embeddings would be off by a tenth."""
    labels = torch.arange(4).repeat_interleave(32)
    centres = torch.nn.functional.normalize(draw(4, 16, seed=1), dim=1)
    embeddings = (centres[labels] + 1e-3 / 4 * draw(128, 16, seed=2)).float()  # spread 1e-3 of the norm
    loss = SimOLoss(level, "ratio", normalize=False, prototype_weight=0.0)
    single = loss.terms(embeddings, labels)["similar"]
    assert single.dtype == torch.float32
    assert_stable(single, lambda rows: loss.terms(rows, labels)["similar"], embeddings)


@pytest.mark.parametrize("level", ["centroid", "pair"])
def test_softmax_of_tight_classes_keeps_its_digits_in_float32(level: str) -> None:
    labels = torch.arange(4).repeat_interleave(32)
    centres = torch.nn.functional.normalize(draw(4, 16, seed=1), dim=1)
    embeddings = (centres[labels] + 1e-3 / 4 * draw(128, 16, seed=2)).float()
    loss = SimOLoss(level, "softmax", eps=1e-9, normalize=False, prototype_weight=0.0, label_smoothing=0.1)
    assert_stable(loss(embeddings, labels), lambda rows: loss(rows, labels), embeddings)


@pytest.mark.parametrize(("level", "form"), FORMS)
@pytest.mark.parametrize("classes", [1, 2, 4, 24])
def test_no_term_is_negative_in_float32(level: str, form: str, classes: int) -> None:
    """Of random, of tight and of orthogonal classes: rounding never makes a term less than 0."""
    labels = torch.arange(24) % classes
    turn = torch.linalg.qr(draw(24, 24, seed=9))[0]
    for seed in range(5):
        random, tight = draw(24, 24, seed=seed), draw(classes, 24, seed=seed)[labels]
        orthogonal = torch.zeros(24, 24).double()
        orthogonal[torch.arange(24), labels] = 1
        for embeddings in (random, tight, tight + 1e-6 * random, orthogonal @ turn):
            for normalize in (True, False):
                terms = SimOLoss(level, form, normalize=normalize, mean_weight=1.0).terms(embeddings.float(), labels)
                assert all(term >= 0 for term in terms.values()), terms


def test_the_softmax_over_one_class_is_exactly_zero() -> None:
    for seed in range(5):
        terms = SimOLoss.softmax().terms(draw(24, 24, seed=seed).float(), torch.zeros(24, dtype=torch.long))
        assert all(term == 0 for term in terms.values())


class Largest(TorchDispatchMode):
    """Remembers the numbers in the largest tensor that any operation made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self.entries = max(self.entries, made.untyped_storage().nbytes() // made.element_size())
        return result


@pytest.mark.parametrize("level", ["group", "class", "centroid", "pair"])
def test_wide_embeddings_need_no_tensor_larger_than_themselves(level: str) -> None:
    embeddings, labels = draw(64, 2048).requires_grad_(), torch.arange(64) % 32
    with Largest() as largest:
        SimOLoss(level)(embeddings, labels).backward()
    assert largest.entries == embeddings.numel()


@pytest.mark.parametrize("level", ["class", "pair"])
def test_many_pairs_need_no_tensor_larger_than_a_chunk(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simo, "_CHUNK_ENTRIES", 4096)
    embeddings, labels = draw(512, 8).requires_grad_(), torch.arange(512) % 90  # 512 x 512 pairs
    with Largest() as largest:
        SimOLoss(level)(embeddings, labels).backward()
    assert largest.entries <= 90 * 90


@pytest.mark.parametrize(
    ("level", "form"), [("pair", "log"), ("pair", "softmax"), ("centroid", "log"), ("class", "log")]
)
def test_what_is_kept_for_the_backward_pass_is_linear_in_the_batch(
    level: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simo, "_CHUNK_ENTRIES", 4096)
    kept = []
    for rows in (256, 512):
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023
            return tensor

        embeddings, labels = draw(rows, 8).requires_grad_(), torch.arange(rows) % 40
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = SimOLoss(level, form)(embeddings, labels)
        kept.append(sum(saved.values()))
        assert value.isfinite()
    assert kept[1] <= 2.5 * kept[0], kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("level", "form"), FORMS)
def test_half_precision_is_computed_in_float32(level: str, form: str, dtype: torch.dtype) -> None:
    embeddings, labels = draw(24, 8).to(dtype), torch.tensor([0, 1, 2] * 8)
    loss = SimOLoss(level, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(embeddings, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(embeddings.float(), labels), rtol=0, atol=0)


def test_merged_classes_are_a_saddle_of_the_group_ratio_but_not_of_their_mirror() -> None:
    """Where two classes coincide, nothing in the dissimilar term pushes them apart: its gradient is common to both."""
    rows = torch.nn.functional.normalize(draw(6, 4), dim=1)
    embeddings = torch.cat([rows, rows]).requires_grad_()
    labels = torch.tensor([0] * 6 + [1] * 6)
    push = gradient(SimOLoss("group", "ratio", normalize=False).terms(embeddings, labels)["dissimilar"], embeddings)
    torch.testing.assert_close(push[:6].sum(dim=0), push[6:].sum(dim=0), rtol=1e-10, atol=1e-14)
    step = torch.cat([torch.ones(6, 4), -torch.ones(6, 4)]).double()  # pulls the two classes apart
    assert abs(float((push * step).sum())) < 1e-12


@pytest.mark.parametrize("level", ["centroid", "pair"])
def test_a_small_gap_between_classes_is_pushed_harder_by_a_ratio_per_pair(level: str) -> None:
    """Per unit of gap the fine levels push as 1 / (eps + d); the group's ratio hardly pushes at all."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(1, 4, generator=generator, dtype=torch.float64), dim=1)
    tangent = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    tangent -= (tangent @ base.T) * base
    spread = 0.5 * torch.randn(12, 4, generator=generator, dtype=torch.float64)
    spread -= spread.view(2, 6, 4).mean(dim=1, keepdim=True).expand(2, 6, 4).reshape(12, 4)
    sign = torch.tensor([1.0] * 6 + [-1.0] * 6, dtype=torch.float64)[:, None]
    labels = torch.tensor([0] * 6 + [1] * 6)

    def force(chosen: str) -> float:
        embeddings = (base + 1e-2 * sign * tangent + spread * (chosen == "group")).requires_grad_()
        push = SimOLoss(chosen, "ratio", eps=0.1, normalize=False, prototype_weight=0.0).terms(embeddings, labels)[
            "dissimilar"
        ]
        return -float((gradient(push, embeddings) * sign * tangent).sum())

    assert force(level) > 20 * abs(force("group"))


def test_argument_errors_name_the_argument_and_the_value() -> None:
    for arguments, message in [
        ({"level": "batch"}, "level must be one of group, class, centroid, pair, got 'batch'"),
        ({"form": "square"}, "form must be one of ratio, log, softmax, got 'square'"),
        ({"eps": 0.0}, "eps must be finite and > 0, got 0.0"),
        ({"orthogonality_leaning": 1.5}, r"orthogonality_leaning must be in 0..1, got 1.5"),
        ({"dissimilar_weight": -1.0}, "dissimilar_weight must be finite and >= 0, got -1.0"),
        ({"prototype_weight": -0.1}, r"prototype_weight must be in 0..1, got -0.1"),
        (
            {"level": "pair", "form": "log", "prototype_weight": 0.5},
            "prototype_weight must be 0 or None unless level='centroid', got 0.5",
        ),
        ({"mean_weight": -1.0}, "mean_weight must be finite and >= 0, got -1.0"),
        (
            {"level": "group", "form": "softmax"},
            "form 'softmax' requires level 'centroid' or 'pair', got level 'group'",
        ),
        ({"form": "log", "label_smoothing": 0.1}, "label_smoothing must be 0 unless form='softmax', got 0.1"),
        ({"form": "softmax", "dissimilar_weight": 9.0}, "must be equal, got 1.0 and 9.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            SimOLoss(**arguments)


@pytest.mark.parametrize("level", ["group", "class", "centroid", "pair"])
def test_input_errors_name_the_argument_and_the_value(level: str) -> None:
    loss, rows, labels = SimOLoss(level), torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    for wrong, message in [
        (labels[:3], r"labels must have shape \(4,\) to match embeddings, got \(3,\)"),
        (labels.unsqueeze(1), r"labels must have shape \(4,\) to match embeddings, got \(4, 1\)"),
        (labels.float(), "labels must be integers, got torch.float32"),
        (labels.bool(), "labels must be integers, got torch.bool"),
        (labels.tolist(), "labels must be a tensor, got list"),
        (labels.numpy(), "labels must be a tensor, got ndarray"),
        (labels.to("meta"), "labels must be on cpu, where embeddings are, got meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(rows, wrong)
        with pytest.raises(ValueError, match=message):
            class_moments(rows, wrong, 1)
    for wrong, message in [
        (rows[0], r"embeddings must be floats of shape \(N, D\), got torch.float32 of shape \(2,\)"),
        (rows.long(), r"embeddings must be floats of shape \(N, D\), got torch.int64 of shape \(4, 2\)"),
        (rows.numpy(), "embeddings must be a tensor, got ndarray"),
        (rows.tolist(), "embeddings must be a tensor, got list"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(wrong, labels)
    rows[2, 1] = math.nan
    with pytest.raises(ValueError, match="embeddings must be finite, got nan or inf in 1 of 4 rows, first in row 2"):
        loss(rows, labels)


def test_paper_form() -> None:
    embeddings, labels = draw(12, 5), [0, 1, 2] * 4
    expected = sum(reference.simo(embeddings, labels, "group", "ratio").values())
    torch.testing.assert_close(SimOLoss.paper()(embeddings, torch.tensor(labels)), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_in_the_log_form_each_other_class_counts_as_much_as_the_own(classes: int) -> None:
    embeddings, labels = draw(20, 6), torch.arange(20) % classes
    for level in ("class", "centroid", "pair"):
        for form, others in (("log", classes - 1), ("ratio", 1)):
            loss = SimOLoss(level, form, eps=0.05, similar_weight=2.0)
            known = SimOLoss(level, form, eps=0.05, similar_weight=2.0, dissimilar_weight=2.0 * others)
            torch.testing.assert_close(loss(embeddings, labels), known(embeddings, labels), rtol=0, atol=0)
    alone = SimOLoss("group", "log")
    known = SimOLoss("group", "log", eps=0.01, dissimilar_weight=1.0)
    torch.testing.assert_close(alone(embeddings, labels), known(embeddings, labels), rtol=0, atol=0)


def test_the_default_is_the_form_that_trained_best() -> None:
    """Written out for a batch of 10 classes of 12, where the dissimilar side has the weight 9 and prototypes a half."""
    written = SimOLoss(
        level="centroid", form="log", eps=0.01, orthogonality_leaning=1.0, normalize=True, similar_weight=1.0,
        dissimilar_weight=9.0, mean_weight=0.3, label_smoothing=0.0, prototype_weight=0.5,
    )  # fmt: skip
    embeddings, labels = draw(120, 16), torch.arange(120) % 10
    torch.testing.assert_close(SimOLoss()(embeddings, labels), written(embeddings, labels), rtol=0, atol=0)
    expected = reference.simo(
        torch.nn.functional.normalize(embeddings, dim=1),
        labels.tolist(),
        "centroid",
        "log",
        eps=0.01,
        prototype_weight=None,
    )
    value = expected["similar"] + 9 * expected["dissimilar"] + 0.3 * expected["mean"]
    torch.testing.assert_close(SimOLoss()(embeddings, labels), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("level", "form", "classes", "eps"),
    [
        ("centroid", "log", 5, 0.01),
        ("centroid", "log", 20, 0.04),
        ("centroid", "log", 40, 0.1),
        ("centroid", "log", 90, 0.1),
        ("centroid", "ratio", 40, 0.01),
        ("centroid", "softmax", 40, 0.01),
        ("pair", "log", 40, 0.01),
    ],
)
def test_eps_follows_from_the_classes_of_a_batch(level: str, form: str, classes: int, eps: float) -> None:
    embeddings, labels = draw(3 * classes, 16), torch.arange(3 * classes) % classes
    value = SimOLoss(level, form)(embeddings, labels)
    torch.testing.assert_close(value, SimOLoss(level, form, eps=eps)(embeddings, labels), rtol=0, atol=0)
    other = SimOLoss(level, form, eps=1.5 * eps)(embeddings, labels)
    assert not torch.isclose(value, other)


def test_prototypes_lead_out_of_merged_classes() -> None:
    """Classes at one point: no gradient separates them without prototypes; with them each moves to its own."""
    embeddings = torch.full((6, 3), 3**-0.5, dtype=torch.float64).requires_grad_()
    labels = torch.arange(6) % 3
    still = gradient(SimOLoss(prototype_weight=0.0)(embeddings, labels), embeddings)
    assert still.abs().max() < 1e-12
    moved = embeddings.detach() - 1e-3 * gradient(SimOLoss()(embeddings, labels), embeddings)
    assert moved.argmax(dim=1).tolist() == labels.tolist()
