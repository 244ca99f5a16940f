import torch

from simo_lightning.functional.prototypes import class_prototypes
from tests import reference
from tests.bounds import UNIT


def test_axes_are_those_of_the_reference_for_any_label() -> None:
    labels = [0, 3, 7, 8, 100, -1, 10**12, -(2**62), 2**62]
    expected = torch.stack([reference.axis(label, 8) for label in labels])
    torch.testing.assert_close(class_prototypes(torch.tensor(labels), 8, torch.float64), expected, rtol=1e-15, atol=0)


def test_as_many_classes_as_dimensions_are_orthogonal() -> None:
    torch.testing.assert_close(class_prototypes(torch.arange(16), 16), torch.eye(16), rtol=0, atol=0)


def test_more_classes_than_dimensions_stay_apart() -> None:
    axes = class_prototypes(torch.arange(1000), 128)
    assert (axes.norm(dim=1) - 1).abs().max() <= 128 * UNIT  # of a sum of 128 squares
    cosines = (axes @ axes.T)[~torch.eye(1000, dtype=torch.bool)]
    # Of independent random signs: standard deviation 1 / sqrt(D), the largest of a million under 6 of these
    assert abs(float(cosines.square().mean().sqrt()) * 128**0.5 - 1) < 0.03
    assert float(cosines.abs().max()) < 6 / 128**0.5
