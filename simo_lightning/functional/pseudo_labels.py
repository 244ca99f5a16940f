"""Pseudo-label consistency: a class predicted confidently from some views of an image is the target of the others.

Shapes: M embeddings of views, D dimensions, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from simo_lightning.functional.moments import class_sums, compact_labels
from simo_lightning.functional.simo import Similarity, squared_distances


def class_logits(embeddings: Tensor, centers: Tensor, similarity: Similarity) -> Tensor:
    """Log-odds of each embedding with each class center: log(eps + o) - log(eps + d), up to a constant per embedding.

    Args:
        embeddings: ``(M, D)``.
        centers: ``(C, D)``.
        similarity: eps and leaning.

    Returns:
        ``(M, C)``; their softmax over C is the softmax form's probability of each class.
    """
    origin = centers.mean(dim=0).detach()
    d = squared_distances(embeddings - origin, centers - origin)
    return similarity.logit(d, similarity.o((embeddings @ centers.T).square()))


def pseudo_label_term(
    embeddings: Tensor,
    images: Tensor,
    centers: Tensor,
    similarity: Similarity,
    confidence: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each view with the class predicted confidently from the image's other views.

    Args:
        embeddings: ``(M, D)``, of the views of the unlabelled images.
        images: Image of each view, ``(M,)``, any integers.
        centers: Class centers ``(C, D)``; no gradient flows to them from here.
        similarity: eps and leaning.
        confidence: In 0..1: a view counts where the mean probability of the other views has a class at or above it.
        label_smoothing: Share of the target spread over all classes, in 0..1.

    Returns:
        The term: a mean over all M views, to which a view that does not count contributes 0. And the mask of the
        views that count, ``(M,)`` bool; a view whose image has no other view never counts.

    Source:
        The target from confident predictions: Sohn et al., arXiv 2001.07685 (FixMatch). There a weakly augmented view
        gives the target of a strongly augmented one; here the other views give the target of each view, and the class
        centers of the batch take the place of a classifier, which is ours.
    """
    logits = class_logits(embeddings, centers.detach(), similarity)
    index, views = compact_labels(images)
    with torch.no_grad():
        odds = logits.softmax(dim=1)
        others = (class_sums(odds, index, len(views))[index] - odds) / (views[index] - 1).clamp(min=1).unsqueeze(1)
        highest, target = others.max(dim=1)
        counts = (highest >= confidence) & (views[index] > 1)
    losses = cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
    return (losses * counts).mean(), counts
