"""What the views of an unlabelled image say of each other: the class that some are sure of is the others' target.

Shapes: M rows, U images, D dimensions, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from simo_lightning.functional.moments import class_sums, compact_labels
from simo_lightning.functional.simo import Exchange, mean_distances


def class_logits(rows: Tensor, centers: Tensor, exchange: Exchange) -> Tensor:
    """Log-odds of each row with each class centre: log(eps + o) - log(eps + d), up to a constant of the row.

    Args:
        rows: ``(M, D)``.
        centers: ``(C, D)``.
        exchange: eps and leaning.

    Returns:
        ``(M, C)``; their softmax over C is the softmax form's probability of each class.
    """
    return exchange.logit(mean_distances(rows, centers), (rows @ centers.T).square())


def pseudo_label_term(
    rows: Tensor, images: Tensor, centers: Tensor, exchange: Exchange, confidence: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each view with the class that the image's other views are sure of.

    Args:
        rows: ``(M, D)``, the views of the unlabelled images.
        images: Image of each row, ``(M,)``, any integers.
        centers: ``(C, D)``; they carry no gradient from here.
        exchange: eps and leaning.
        confidence: In 0..1: a view counts where the mean probability of the other views has a class at or above it.
        label_smoothing: Share of the target spread over all classes, in 0..1.

    Returns:
        The term: a mean over all M rows, to which a row that does not count gives nothing. And which rows count,
        ``(M,)`` bool; a row whose image has no other view never does.

    Source:
        The target from confident predictions: Sohn et al., arXiv 2001.07685 (FixMatch). There a weakly augmented view
        is the teacher and a strong one the learner; here each view is taught by the others. That classes are centres
        of the batch and not of a classifier is ours.
    """
    logits = class_logits(rows, centers.detach(), exchange)
    index, views = compact_labels(images)
    with torch.no_grad():
        odds = logits.softmax(dim=1)
        others = (class_sums(odds, index, len(views))[index] - odds) / (views[index] - 1).clamp(min=1).unsqueeze(1)
        sure, target = others.max(dim=1)
        counts = (sure >= confidence) & (views[index] > 1)
    losses = cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
    return (losses * counts).mean(), counts
