import pytest
import torch
from torch import Tensor

from simo_lightning import SimOLoss
from simo_lightning.semi_supervised import SemiSupervisedLoss
from tests import reference

LABELS = [1, 1, 0, 0, 0, 1, *(10 + place for place in (3, 3, 900, 900, 41_000, 41_000, 77, 77))]


def draw() -> Tensor:
    return torch.randn(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_value_and_gradient_equal_the_loops() -> None:
    rows = draw()
    labelled = SimOLoss("centroid", "softmax", eps=0.01, label_smoothing=0.1, frame=0.0, mean_weight=0.0)
    loss = SemiSupervisedLoss(2, labelled, unlabelled_weight=0.3)
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
    loss = SemiSupervisedLoss(2, SimOLoss("class", "log"), SimOLoss("pair", "softmax"), 2.0)
    torch.testing.assert_close(loss(rows, labels), loss(rows[order], labels[order]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("part", [slice(0, 6), slice(6, 14)], ids=["labelled", "unlabelled"])
def test_a_part_that_is_not_there_is_zero_with_a_gradient(part: slice) -> None:
    rows, labels = draw(), torch.tensor(LABELS)
    terms = SemiSupervisedLoss(2).terms(rows[part], labels[part])
    other = terms["unlabelled" if part.start == 0 else "labelled"]
    assert other.item() == 0
    (gradient,) = torch.autograd.grad(other, rows)
    assert (gradient == 0).all()
    assert sum(terms.values()) > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        SemiSupervisedLoss(0)
    with pytest.raises(ValueError, match="unlabelled_weight must be finite and >= 0, got -1"):
        SemiSupervisedLoss(2, unlabelled_weight=-1)
