import pytest
import torch

from simo_lightning.functional.prototypes import class_prototypes
from tests import reference
from tests.bounds import UNIT


@pytest.mark.parametrize("dim", [1, 4, 8, 12, 16, 32])
def test_prototypes_are_those_of_the_reference_for_any_label(dim: int) -> None:
    labels = [0, 3, 7, 8, 9, 40, 71, 72, 100, 271, 272, 1000, 1055, 1056, -1, 10**12, -(2**62), 2**62]
    expected = torch.stack([reference.axis(label, dim) for label in labels])
    torch.testing.assert_close(class_prototypes(torch.tensor(labels), dim, torch.float64), expected, rtol=1e-15, atol=0)


def test_as_many_classes_as_dimensions_are_orthogonal() -> None:
    torch.testing.assert_close(class_prototypes(torch.arange(16), 16), torch.eye(16), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [8, 16, 32])
def test_axes_and_gold_sequences_reach_welchs_bound(dim: int) -> None:
    count = dim + dim**2
    prototypes = class_prototypes(torch.arange(count), dim, torch.float64)
    cosines = (prototypes @ prototypes.T)[~torch.eye(count, dtype=torch.bool)]
    bound = (count - dim) / (dim * (count - 1))
    assert float(cosines.square().mean()) == pytest.approx(bound, rel=1e-12)
    largest = (2 if dim.bit_length() % 2 == 0 else 4) / dim  # of an odd and an even power of two, squared
    assert float(cosines.square().max()) == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize("dim", [64, 128, 256, 512, 8192])
def test_gold_sequences_of_every_power_of_two_stay_apart(dim: int) -> None:
    labels = torch.cat([torch.arange(40), dim + torch.arange(200), dim**2 - torch.arange(100)])
    prototypes = class_prototypes(labels, dim, torch.float64)
    cosines = (prototypes @ prototypes.T)[~torch.eye(len(labels), dtype=torch.bool)]
    assert float(cosines.square().max()) <= (2 if dim.bit_length() % 2 == 0 else 4) / dim * (1 + 1e-12)


def test_random_signs_stay_apart_where_there_are_no_gold_sequences() -> None:
    axes = class_prototypes(torch.arange(1000), 130)
    assert (axes.norm(dim=1) - 1).abs().max() <= 130 * UNIT  # of a sum of 130 squares
    cosines = (axes @ axes.T)[~torch.eye(1000, dtype=torch.bool)]
    # Of independent random signs: standard deviation 1 / sqrt(D), the largest of a million under 6 of these
    assert abs(float(cosines.square().mean().sqrt()) * 130**0.5 - 1) < 0.03
    assert float(cosines.abs().max()) < 6 / 130**0.5
