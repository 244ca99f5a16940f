"""Reliability diagram: accuracy against confidence."""

from matplotlib.figure import Figure

from simo_lightning.functional.calibration import Reliability
from simo_lightning.plotting import canvas


def reliability_figure(result: Reliability, confidence_name: str = "largest share") -> Figure:
    """Accuracy of the answers by their confidence, and how many there are.

    Above the diagonal the answers are more often right than the confidence says, below it less often.

    Args:
        result: Of :func:`~simo_lightning.functional.reliability`.
        confidence_name: What the confidence is, for the axis.

    Returns:
        Figure of two panels: the accuracy of each bin as a bar and its mean confidence as a point on the diagonal; and
        the number of answers in each bin. The title gives the accuracy, the mean confidence and the expected
        calibration error.

    Example:
        >>> import torch
        >>> from simo_lightning.functional import reliability
        >>> result = reliability(torch.tensor([0.25, 0.75]), torch.tensor([False, True]), bins=2)
        >>> reliability_figure(result).axes[0].get_title().splitlines()[1]
        'accuracy 50.0 %, mean confidence 50.0 %, ECE 0.250'
    """
    edges, counts, confidence, accuracy = (values.detach().cpu().double().numpy() for values in result[:4])
    left, width = edges[:-1], edges[1:] - edges[:-1]
    filled = counts > 0
    figure = canvas.new_figure(5.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    style = {"align": "edge", "edgecolor": "white", "linewidth": 1.0}
    upper.bar(left[filled], accuracy[filled], width[filled], color="#0072B2", label="accuracy", **style)
    upper.plot([0, 1], [0, 1], color="0.35", linestyle="--", linewidth=1.2)
    upper.plot(
        confidence[filled], confidence[filled], "o", color="#E69F00", markeredgecolor="0.2", label="mean confidence"
    )
    upper.set_ylim(0, 1.02)
    upper.set_ylabel("accuracy")
    canvas.set_title(upper, f"Accuracy by {confidence_name}\n{_numbers(result)}")
    lower.bar(left, counts, width, color="0.6", **style)
    lower.set_ylabel("images")
    lower.set_xlabel(confidence_name, **canvas.LITERAL)
    lower.set_xlim(0, 1)
    lower.locator_params(axis="y", nbins=3, integer=True)
    for axes in (upper, lower):
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def describe_reliability(result: Reliability, confidence_name: str = "largest share") -> str:
    """Alternative text of :func:`reliability_figure`.

    Args:
        result: As for the figure.
        confidence_name: As for the figure.

    Returns:
        One sentence: accuracy, mean confidence and expected calibration error.

    Example:
        >>> import torch
        >>> from simo_lightning.functional import reliability
        >>> describe_reliability(reliability(torch.tensor([0.25, 0.75]), torch.tensor([False, True]), bins=2))
        'Accuracy by largest share of 2 images: accuracy 50.0 %, mean confidence 50.0 %, ECE 0.250.'
    """
    count = int(result.counts.sum())
    head = f"Accuracy by {canvas.printable(confidence_name)} of {count:,} image{'s' * (count != 1)}"
    return f"{head}: {_numbers(result)}." if count else f"{head}."


def _numbers(result: Reliability) -> str:
    """Accuracy, mean confidence and calibration error over all bins."""
    count = int(result.counts.sum())
    if not count:
        return "no images"
    weights = result.counts / count
    accuracy, confidence = (float((weights * values).nansum()) for values in (result.accuracy, result.confidence))
    return f"accuracy {100 * accuracy:.1f} %, mean confidence {100 * confidence:.1f} %, ECE {float(result.error):.3f}"
