"""Which class each class is most often predicted as."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MostConfused", "most_confused"]


class MostConfused(NamedTuple):
    """The most common wrong prediction of each class.

    Attributes:
        classes: Index of the class that is predicted, int64 ``(C,)``; -1 where no image is misclassified.
        counts: Images so predicted, int64 ``(C,)``.
    """

    classes: Tensor
    counts: Tensor


def most_confused(labels: Tensor, predicted: Tensor, num_classes: int) -> MostConfused:
    """The wrong class that is predicted most often for the images of each class; of equals the lowest.

    Time and memory grow with the number of images, not with the square of C.

    Args:
        labels: Class of each image, integers ``(N,)`` in 0..C-1.
        predicted: Predicted class, integers ``(N,)`` in 0..C-1.
        num_classes: C.

    Returns:
        Classes and counts, on the device of the labels.

    Raises:
        ValueError: If the shapes differ or a class is not in 0..C-1.

    Example:
        >>> most_confused(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 2, 1]), num_classes=3)
        MostConfused(classes=tensor([ 2, -1, -1]), counts=tensor([2, 0, 0]))
    """
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise ValueError(
            f"labels and predicted must have the same shape (N,), got {tuple(labels.shape)} and "
            f"{tuple(predicted.shape)}"
        )
    for name, values in (("labels", labels), ("predicted", predicted)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(f"{name} must be in 0..{num_classes - 1}, got {int(values.min())}..{int(values.max())}")
    labels, predicted = labels.long(), predicted.long()
    wrong = labels != predicted
    pairs, counts = (labels[wrong] * num_classes + predicted[wrong]).unique(return_counts=True)  # sorted
    order = counts.argsort(stable=True, descending=True)
    order = order[(pairs[order] // num_classes).argsort(stable=True)]  # by class, then the most common first
    of_class = pairs[order] // num_classes
    first = torch.ones_like(of_class, dtype=torch.bool)
    first[1:] = of_class[1:] != of_class[:-1]
    chosen = order[first]
    classes, most = labels.new_full((num_classes,), -1), labels.new_zeros(num_classes)
    classes[of_class[first]], most[of_class[first]] = pairs[chosen] % num_classes, counts[chosen]
    return MostConfused(classes, most)
