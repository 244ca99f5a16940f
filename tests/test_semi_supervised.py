import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor

from simo_lightning import SimOLoss
from simo_lightning.semi_supervised import SemiSupervisedLoss
from tests import reference

LABELS = [1, 1, 0, 0, 0, 1, *(10 + place for place in (3, 3, 900, 900, 41_000, 41_000, 77, 77))]


def draw() -> Tensor:
    return torch.randn(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_value_and_gradient_equal_the_loops() -> None:
    rows = draw()
    labelled = SimOLoss("centroid", "softmax", eps=0.01, label_smoothing=0.1, prototype_weight=0.0, mean_weight=0.0)
    loss = SemiSupervisedLoss(2, labelled, unlabelled_weight=0.3, pseudo_label_weight=0.0)
    unit = rows / rows.square().sum(1, keepdim=True).sqrt()
    first = reference.simo(unit[:6], LABELS[:6], "centroid", "softmax", eps=0.01, leaning=1.0, smoothing=0.1)
    second = reference.simo(unit[6:], LABELS[6:], "pair", "log", eps=0.01, leaning=1.0)
    terms = loss.terms(rows, torch.tensor(LABELS))
    torch.testing.assert_close(terms["labelled"], first["softmax"], rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["unlabelled"], 0.3 * second["similar"], rtol=1e-10, atol=0)
    value = loss(rows, torch.tensor(LABELS))
    (gradient,) = torch.autograd.grad(value, rows, retain_graph=True)
    (expected,) = torch.autograd.grad(first["softmax"] + 0.3 * second["similar"], rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows, labels = draw(), torch.tensor(LABELS)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    parts = SimOLoss("class", "log"), SimOLoss("pair", "softmax")
    loss = SemiSupervisedLoss(2, *parts, 2.0, confidence=0.4, pseudo_label_loss=SimOLoss.softmax())
    torch.testing.assert_close(loss(rows, labels), loss(rows[order], labels[order]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("prototype_weight", "leaning"), [(0.0, 1.0), (0.5, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize("confidence", [0.0, 0.55, 1.0])
def test_pseudo_label_equals_the_loops(prototype_weight: float, leaning: float, confidence: float) -> None:
    eps, smoothing = 0.05, 0.1
    labelled = SimOLoss(
        form="softmax",
        eps=eps,
        prototype_weight=prototype_weight,
        orthogonality_leaning=leaning,
        label_smoothing=smoothing,
    )
    loss = SemiSupervisedLoss(2, labelled, pseudo_label_weight=0.7, confidence=confidence)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(17, 3, dtype=torch.float64, generator=generator).requires_grad_()
    labels = [*LABELS, 41_000, 5_000_000, 10 + 77]  # two images of one view, one of three
    unit = rows / rows.square().sum(1, keepdim=True).sqrt()
    centers = []
    for label in (0, 1):
        own = torch.stack([unit[place] for place, it in enumerate(labels) if it == label]).mean(0).detach()
        centers.append((1 - prototype_weight) * own + prototype_weight * torch.eye(3, dtype=torch.float64)[label])
    logits, odds = {}, {}
    for place in range(6, 17):
        o = [leaning * (unit[place] @ center) ** 2 + 1 - leaning for center in centers]
        d = [(unit[place] - center).square().sum() for center in centers]
        logits[place] = torch.stack([((eps + up) / (eps + down)).log() for up, down in zip(o, d, strict=True)])
        odds[place] = logits[place].detach().exp() / logits[place].detach().exp().sum()
    total, used = rows.sum() * 0, 0
    for place in range(6, 17):
        others = [odds[other] for other in odds if labels[other] == labels[place] and other != place]
        if others and float(sum(others).max() / len(others)) >= confidence:
            target = int((sum(others) / len(others)).argmax())
            log_odds = logits[place] - logits[place].exp().sum().log()
            total = total - (1 - smoothing) * log_odds[target] - smoothing / 2 * log_odds.sum()
            used += 1
    assert used == {0.0: 9, 1.0: 0}.get(confidence, used)
    assert confidence != 0.55 or 0 < used < 9  # the case tells something
    terms = loss.terms(rows, torch.tensor(labels))
    assert list(terms) == ["labelled", "pseudo_label"]
    torch.testing.assert_close(terms["pseudo_label"], 0.7 * total / 11, rtol=1e-10, atol=1e-14)
    (gradient,) = torch.autograd.grad(terms["pseudo_label"], rows)
    (expected,) = torch.autograd.grad(0.7 * total / 11, rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("part", [slice(0, 6), slice(6, 14)], ids=["labelled", "unlabelled"])
def test_a_part_that_is_not_there_is_zero_with_a_gradient(part: slice) -> None:
    rows, labels = draw(), torch.tensor(LABELS)
    terms = SemiSupervisedLoss(2, unlabelled_weight=1.0).terms(rows[part], labels[part])
    for name in ("unlabelled", "pseudo_label") if part.start == 0 else ("labelled", "pseudo_label"):
        assert terms[name].item() == 0
        (gradient,) = torch.autograd.grad(terms[name], rows, retain_graph=True)
        assert (gradient == 0).all()
    assert sum(terms.values()) > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        SemiSupervisedLoss(0)
    with pytest.raises(ValueError, match="unlabelled_weight must be finite and >= 0, got -1"):
        SemiSupervisedLoss(2, unlabelled_weight=-1)
    with pytest.raises(ValueError, match="pseudo_label_weight must be finite and >= 0, got inf"):
        SemiSupervisedLoss(2, pseudo_label_weight=float("inf"))
    with pytest.raises(ValueError, match=r"confidence must be in 0\.\.1, got 1\.5"):
        SemiSupervisedLoss(2, confidence=1.5)
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        SemiSupervisedLoss(2)(draw(), LABELS)


def test_pseudo_labels_never_take_another_loss_unasked() -> None:
    wanted = r"pseudo_label_loss \(by default labelled\) must be a SimOLoss with level 'centroid' and form 'softmax'"
    with pytest.raises(ValueError, match=wanted + ".* got level 'pair' and form 'log'"):
        SemiSupervisedLoss(2, SimOLoss("pair", "log"))
    with pytest.raises(ValueError, match=wanted + ".* got SupConLoss"):
        SemiSupervisedLoss(2, SupConLoss())
    assert SemiSupervisedLoss(2, SupConLoss(), pseudo_label_weight=0.0)(draw(), torch.tensor(LABELS)) > 0
    given = SemiSupervisedLoss(2, SupConLoss(), pseudo_label_loss=SimOLoss.softmax(), confidence=0.5)
    known = SemiSupervisedLoss(2, confidence=0.5)
    labels = torch.tensor(LABELS)
    value = given.terms(draw(), labels)["pseudo_label"]
    assert value > 0
    assert value == known.terms(draw(), labels)["pseudo_label"]
