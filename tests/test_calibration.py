"""Reliability against a loop in float64 and torchmetrics' own bins, and the figures of shares and reliability."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from simo_lightning.functional import OrthogonalShares, orthogonal_shares, reliability
from simo_lightning.plotting import (
    class_shares_figure,
    describe_class_shares,
    describe_reliability,
    describe_shares,
    reliability_figure,
    share_rows,
    shares_figure,
)


def answers(count: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(count, generator=generator).double()
    return confidence, torch.rand(count, generator=generator).double() < confidence**2


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_reliability_is_that_of_a_loop(bins: int):
    confidence, correct = answers()
    confidence[:3] = torch.tensor([0.0, 1.0, 1.0])
    result, error = reliability(confidence, correct, bins), 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [
            (value, right)
            for value, right in zip(confidence.tolist(), correct.tolist(), strict=True)
            if low <= value < high or (value == 1 and index == bins - 1)
        ]
        assert result.counts[index] == len(inside)
        mean, accuracy = (sum(values) / len(inside) for values in zip(*inside, strict=True))
        assert result.confidence[index].item() == pytest.approx(mean, abs=1e-12)
        assert result.accuracy[index].item() == pytest.approx(accuracy, abs=1e-12)
        error += len(inside) / len(confidence) * abs(mean - accuracy)
    assert result.error.item() == pytest.approx(error, abs=1e-12)


def test_the_error_is_that_of_torchmetrics_and_zero_for_a_calibrated_confidence():
    confidence, correct = answers()
    assert reliability(confidence, correct, 15).error == binary_calibration_error(confidence, correct.long(), 15)
    calibrated = torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0])
    assert reliability(calibrated, torch.tensor([True, False, True, True, False])).error.item() < 1e-12
    wrong = reliability(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert wrong.error.item() == pytest.approx(1)
    nothing = reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert math.isnan(nothing.error)
    assert nothing.counts.sum() == 0
    assert nothing.accuracy.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": torch.tensor([0.5, 1.5])}, r"in \[0, 1\], got 1 of 2 values that are not, such as 1.5"),
        ({"confidence": torch.tensor([0.5, torch.nan])}, "got 1 of 2 values that are not, such as nan"),
        ({"confidence": torch.ones(2, 1)}, r"confidence must be floats of shape \(N,\)"),
        ({"correct": torch.ones(2)}, r"correct must be bool of shape \(2,\), got torch.float32"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"confidence": torch.ones(2), "correct": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        reliability(**{**arguments, **change})


def test_the_diagram_shows_the_numbers(tmp_path):
    confidence, correct = answers()
    confidence = confidence.clamp(min=0.2)  # two bins are empty
    result = reliability(confidence, correct)
    figure = reliability_figure(result)
    bars = figure.axes[0].patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], result.accuracy[2:])
    np.testing.assert_allclose([bar.get_x() for bar in bars], result.edges[2:-1])
    np.testing.assert_array_equal([bar.get_height() for bar in figure.axes[1].patches], result.counts)
    share, mean = 100 * correct.double().mean(), 100 * confidence.mean()
    expected = f"accuracy {share:.1f} %, mean confidence {mean:.1f} %, ECE {result.error:.3f}"
    assert figure.axes[0].get_title().endswith(expected)
    assert describe_reliability(result) == f"Accuracy by largest share of 500 images: {expected}."
    figure.savefig(tmp_path / "reliability.png")
    empty = reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    reliability_figure(empty).savefig(tmp_path / "empty.png")
    assert describe_reliability(empty) == "Accuracy by largest share of 0 images."


def test_the_bars_of_one_image_sum_to_one(tmp_path):
    shares = torch.softmax(torch.randn(12, generator=torch.Generator().manual_seed(0)).double(), dim=0) * 0.75
    names = [f"$class {index}" for index in range(12)]
    found = share_rows(shares, 0.25, names)
    assert [row.name for row in found[:8]] == [names[index] for index in shares.argsort(descending=True)[:8]]
    assert found[8].name == "4 other classes"
    assert found[8].value == pytest.approx(float(shares.sort().values[:4].sum()))
    assert sum(row.value for row in found) == pytest.approx(1)
    figure = shares_figure(shares, 0.25, names, title="$a")
    np.testing.assert_allclose([bar.get_width() for bar in figure.axes[0].patches], [row.value for row in found])
    figure.savefig(tmp_path / "shares.png")  # a name read as a formula would be an error
    assert describe_shares(shares, 0.25, names).endswith("no class 25.0 %.")
    with pytest.raises(ValueError, match="class_names must name 12 classes, got 2 names"):
        share_rows(shares, 0.25, ["a", "b"])


def test_mean_shares_of_classes_are_those_of_a_loop(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)  # class 4 has no images
    means = torch.randn(5, 9, generator=generator)
    decomposed = orthogonal_shares(means[labels] + torch.randn(60, 9, generator=generator), means)
    names = ["a", "$b", "c", "d", "e"]
    figure = class_shares_figure(decomposed, labels, names)
    axes = figure.axes[0]
    own, expected = [], {}
    for label in range(4):
        rows = [decomposed.shares[index].tolist() for index in range(60) if labels[index] == label]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        others = {index: value for index, value in enumerate(mean) if index != label}
        following = max(others, key=others.get)
        rest = 1 - sum(mean)
        expected[names[label]] = (mean[label], others[following], sum(mean) - mean[label] - others[following], rest)
        own.append((mean[label], names[label], names[following]))
    own.sort()
    assert [text.get_text() for text in axes.get_yticklabels()] == [name for _, name, _ in own]
    assert [text.get_text() for text in axes.texts] == [name for *_, name in own]
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(4, 4).T  # parts of each class
    np.testing.assert_allclose(widths, [expected[name] for _, name, _ in own], atol=1e-12)
    figure.savefig(tmp_path / "classes.png")
    text = describe_class_shares(decomposed, labels, names)
    assert f"smallest own share {100 * own[0][0]:.1f} %, of {own[0][1]}, whose next class is {own[0][2]}" in text
    with pytest.raises(ValueError, match="shares, rest and labels must have shapes"):
        class_shares_figure(decomposed, labels[:3], names)


def test_of_many_classes_those_with_the_smallest_own_shares_are_shown():
    shares = torch.linspace(0.1, 0.9, 40).diag()
    figure = class_shares_figure(
        OrthogonalShares(shares, 1 - shares.sum(dim=1)), torch.arange(40), [f"class {index}" for index in range(40)]
    )
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [f"class {index}" for index in range(25)]
    assert "25 of 40 classes" in figure.axes[0].get_title()
