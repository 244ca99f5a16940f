"""What embeddings with labels show: confusions, retrieval that fails, labels that look wrong, near duplicates.

Pure functions of tensors on the CPU. Shapes: N images with embeddings of D dimensions, C classes, labels 0..C-1. All
pairs of images are compared in chunks, so memory grows with N, not with its square. Similarities are cosines, computed
in float64 and rounded to multiples of 2**-22 (2.4e-7); of equal ones the image with the lower index comes first. So a
result depends neither on the size of the chunks nor on the order of additions.

The neighbours are searched once, with :func:`find_neighbors`, and passed to the functions that need them::

    neighbors = find_neighbors(embeddings)
    scores = retrieval_scores(embeddings, labels)
    pairs = confused_pairs(neighbors, labels)
    queries = worst_queries(neighbors, labels, scores.average_precision)
    wrong = likely_wrong_labels(neighbors, labels)
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn.functional import interpolate

from simo_lightning.functional.confusion import most_confused
from simo_lightning.functional.geometry import effective_rank
from simo_lightning.functional.knn import check_finite, class_voters, vote
from simo_lightning.functional.moments import check_embeddings, class_moments, class_sums
from simo_lightning.functional.neighbors import unit_vectors
from simo_lightning.functional.retrieval import RetrievalScores, average_scores

__all__ = [
    "ClassScores",
    "ConfusedPair",
    "Headline",
    "ImagePairs",
    "MeanPairs",
    "NearDuplicates",
    "Neighbors",
    "WorstQueries",
    "WrongLabels",
    "class_means",
    "cluster_order",
    "confused_pairs",
    "find_neighbors",
    "headline",
    "knn_leave_one_out",
    "likely_wrong_labels",
    "near_duplicates",
    "scores_per_class",
    "worst_pairs",
    "worst_queries",
]

_GRID = 2.0**22  # cosines are multiples of 1 / _GRID
_COLUMNS = 8192  # images compared with a chunk at a time
_THUMBNAIL = 16  # side in pixels of the grey images that near duplicates are compared by
_MOST_ORDERED = 1000  # classes whose leaves are ordered optimally: about four seconds


class Neighbors(NamedTuple):
    """The nearest other images of each image.

    Attributes:
        indices: int64 ``(N, k)``, nearest first, without the image itself.
        cosines: float32 ``(N, k)``.
    """

    indices: Tensor
    cosines: Tensor


@torch.no_grad()
def find_neighbors(embeddings: Tensor, k: int = 20, chunk_size: int = 1024) -> Neighbors:
    """The k images with the largest cosine with each image.

    Args:
        embeddings: Floats ``(N, D)``, N at least 2.
        k: Neighbours; all others where there are fewer. 20 is what :func:`knn_leave_one_out` needs at most.
        chunk_size: Images searched for at a time. Memory is ``O(chunk_size * 8192)`` besides the inputs in float64.

    Returns:
        Indices and cosines ``(N, min(k, N - 1))``.

    Raises:
        ValueError: If there are fewer than two embeddings, one is not finite, or a number is below 1.

    Example:
        >>> find_neighbors(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]), k=1).indices.tolist()
        [[2], [2], [0]]
    """
    _check_numbers(k=k, chunk_size=chunk_size)
    unit = _unit(embeddings)
    count = len(unit)
    if count < 2:
        raise ValueError(f"embeddings must have at least 2 rows to have neighbours, got {count}")
    k = min(k, count - 1)
    index = torch.empty(count, k, dtype=torch.long)
    cosines = torch.empty(count, k)
    for start in range(0, count, chunk_size):
        rows = torch.arange(start, min(start + chunk_size, count))
        best = unit.new_empty(len(rows), 0)
        for left in range(0, count, _COLUMNS):
            columns = torch.arange(left, min(left + _COLUMNS, count))
            # cosine and index in one number, an integer below 2**53: equal cosines are ordered by index
            keys = (unit[rows] @ unit[columns].mT).mul_(_GRID).round_().mul_(count).sub_(columns)
            inside = (rows >= left) & (rows < left + len(columns))
            keys[inside, rows[inside] - left] = float("-inf")
            best = torch.cat((best, keys), dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        keys = best.long()
        index[rows] = (-keys).remainder(count)
        cosines[rows] = ((keys + index[rows]) // count / _GRID).float()
    return Neighbors(index, cosines)


class ConfusedPair(NamedTuple):
    """Two classes that are mixed up.

    Attributes:
        classes: The two classes, the lower first.
        rate: Share of the images of both whose nearest image is of the other class.
        confused: Their number.
        out_of: Images of both classes, without those that are the only ones of their class.
        images: Confused images and their nearest image, int64 ``(n, 2)``, the most similar first.
    """

    classes: tuple[int, int]
    rate: float
    confused: int
    out_of: int
    images: Tensor


def confused_pairs(neighbors: Neighbors, labels: Tensor, count: int = 10, num_images: int = 6) -> list[ConfusedPair]:
    """The pairs of classes whose images have each other as nearest neighbours most often.

    Args:
        neighbors: Of all images.
        labels: Class of each image, integers ``(N,)``.
        count: Largest number of pairs.
        num_images: Largest number of confused images of a pair.

    Returns:
        Pairs by rate, then by the number of confused images, then by class. An image that is the only one of its class
        cannot have a neighbour of its class and does not count.

    Raises:
        ValueError: If the labels do not match or a number is below 1.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.2], [0.0, 1.0]])
        >>> (pair,) = confused_pairs(find_neighbors(embeddings), torch.tensor([0, 1, 0, 1]))
        >>> pair.classes, pair.rate, pair.images.tolist()
        ((0, 1), 1.0, [[1, 2], [2, 1], [0, 1], [3, 2]])
    """
    labels = _check_labels(labels, neighbors)
    _check_numbers(count=count, num_images=num_images)
    num_classes = int(labels.max()) + 1
    nearest = neighbors.indices[:, 0]
    counts = torch.bincount(labels)
    counts[counts == 1] = 0  # the only image of its class
    wrong = ((labels[nearest] != labels) & (counts[labels] > 0)).nonzero().squeeze(1)
    low = torch.minimum(labels[wrong], labels[nearest[wrong]])
    high = torch.maximum(labels[wrong], labels[nearest[wrong]])
    pairs, pair_of, confused = (low * num_classes + high).unique(return_inverse=True, return_counts=True)
    out_of = counts[pairs // num_classes] + counts[pairs % num_classes]
    rates = confused / out_of.double()
    order = confused.argsort(descending=True, stable=True)
    order = order[rates[order].argsort(descending=True, stable=True)]
    found = []
    for pair in order[:count].tolist():
        images = wrong[pair_of == pair]
        images = images[neighbors.cosines[images, 0].argsort(descending=True, stable=True)][:num_images]
        both = (int(pairs[pair]) // num_classes, int(pairs[pair]) % num_classes)
        shown = torch.stack((images, nearest[images]), dim=1)
        found.append(ConfusedPair(both, float(rates[pair]), int(confused[pair]), int(out_of[pair]), shown))
    return found


class WorstQueries(NamedTuple):
    """Images whose nearest images are of other classes.

    Attributes:
        images: int64 ``(n,)``, the worst first.
        average_precision: Average precision at R, ``(n,)``.
        neighbors: Their nearest images, int64 ``(n, k)``.
        cosines: ``(n, k)``.
    """

    images: Tensor
    average_precision: Tensor
    neighbors: Tensor
    cosines: Tensor


def worst_queries(
    neighbors: Neighbors,
    labels: Tensor,
    average_precision: Tensor,
    count: int = 10,
    most_per_class: int | None = 2,
) -> WorstQueries:
    """The images with the lowest average precision at R, with their neighbours.

    Args:
        neighbors: Of all images.
        labels: Class of each image, integers ``(N,)``.
        average_precision: Of each image as a query, ``(N,)``, as
            :func:`~simo_lightning.functional.retrieval_scores` gives it; ``nan`` does not count.
        count: Largest number of images.
        most_per_class: Largest number of images of one class; None: any.

    Returns:
        The images. Of equal ones those with the more similar nearest image come first.

    Raises:
        ValueError: If shapes do not match or a number is below 1.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> precision = torch.tensor([1.0, 0.0, 1.0, 0.5])
        >>> worst_queries(find_neighbors(embeddings), torch.tensor([0, 1, 0, 1]), precision, count=2).images
        tensor([1, 3])
    """
    labels = _check_labels(labels, neighbors)
    _check_numbers(count=count, most_per_class=1 if most_per_class is None else most_per_class)
    if average_precision.shape != labels.shape:
        raise ValueError(
            f"average_precision must have shape ({len(labels)},) to match labels, got {tuple(average_precision.shape)}"
        )
    order = neighbors.cosines[:, 0].argsort(descending=True, stable=True)
    order = order[average_precision[order].argsort(stable=True)]  # nan comes last
    order = order[~average_precision[order].isnan()]
    if most_per_class is not None:
        order = order[_rank_in_class(labels[order]) < most_per_class]
    order = order[:count]
    return WorstQueries(order, average_precision[order], neighbors.indices[order], neighbors.cosines[order])


class WrongLabels(NamedTuple):
    """Images whose label looks wrong.

    Attributes:
        images: int64 ``(n,)``, the most suspicious first.
        suggested: Class of their neighbours, int64 ``(n,)``.
        share: Share of the neighbours that are of that class, ``(n,)``.
        own_share: Share of the neighbours that are of the class of the label, ``(n,)``.
    """

    images: Tensor
    suggested: Tensor
    share: Tensor
    own_share: Tensor


def likely_wrong_labels(neighbors: Neighbors, labels: Tensor, k: int = 10) -> WrongLabels:
    """Images whose nearest images agree on another class.

    A class of ``n_c`` images is judged by the ``k_c = min(k, ceil(n_c / 2))`` nearest other images: its share is the
    part of them that has its label. An image is listed if the class with the largest share is not its own, that share
    is at least one half, and the share of its own class is smaller. The list is ordered by the difference of the two
    shares.

    Embeddings that were trained with a wrong label may have learned it: a list made from the training images is shorter
    than it should be.

    Args:
        neighbors: Of all images; with k neighbours, or as many as the largest class requires.
        labels: Class of each image, integers ``(N,)``.
        k: Largest number of neighbours that vote.

    Returns:
        All images that match the rule.

    Raises:
        ValueError: If the labels do not match, k is below 1 or there are too few neighbours.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.0, 1.0], [1.0, 0.15]])
        >>> likely_wrong_labels(find_neighbors(embeddings), torch.tensor([0, 0, 0, 1, 1, 1]))[:2]
        (tensor([5]), tensor([0]))

    Source:
        Wilson, IEEE Trans. Syst. Man Cybern. 2(3), 1972, edited nearest neighbours: images whose label the vote of the
        others contradicts. With embeddings of a network: Zhu, Dong & Liu, ICML 2022 (arXiv 2110.06283). Ours: at least
        half of the votes, and neighbours by the size of the class.
    """
    labels = _check_labels(labels, neighbors)
    _check_numbers(k=k)
    voters = ((labels.bincount() + 1) // 2).clamp(min=1, max=k)  # (C,)
    _check_reach(neighbors, labels, voters)
    reach = int(voters.max())
    rank, voted = torch.arange(reach), labels[neighbors.indices[:, :reach]]  # (k,), (N, k)
    counted = rank < voters[voted]
    votes = torch.cat(  # (N, k) for the class of each neighbour
        [_votes(*parts) for parts in zip(voted.split(_COLUMNS), counted.split(_COLUMNS), strict=True)]
    )
    share, place = _first_largest(votes / voters[voted])  # of equal classes that of the nearest neighbour
    suggested = voted.gather(1, place.unsqueeze(1)).squeeze(1)
    own = ((voted == labels.unsqueeze(1)) & counted).sum(dim=1) / voters[labels]
    images = ((share >= 0.5) & (share > own) & (suggested != labels)).nonzero().squeeze(1)
    images = images[(share - own)[images].argsort(descending=True, stable=True)]
    return WrongLabels(images, suggested[images], share[images], own[images])


class ImagePairs(NamedTuple):
    """Pairs of images, the most similar first.

    Attributes:
        images: int64 ``(n, 2)``, the lower index first.
        cosines: Of their embeddings, ``(n,)``.
        correlations: Of their pixels, ``(n,)``; ``nan`` if no pixels were given.
        total: Number of pairs that were found; n is at most ``max_pairs``.
    """

    images: Tensor
    cosines: Tensor
    correlations: Tensor
    total: int


class NearDuplicates(NamedTuple):
    """Pairs of nearly equal images.

    Attributes:
        within: Pairs of one class.
        across: Pairs of two classes: one of the labels is wrong, or the classes overlap.
    """

    within: ImagePairs
    across: ImagePairs


@torch.no_grad()
def near_duplicates(
    embeddings: Tensor,
    labels: Tensor,
    images: Tensor | None = None,
    threshold: float = 0.99,
    min_correlation: float = 0.95,
    max_pairs: int = 50,
    chunk_size: int = 1024,
) -> NearDuplicates:
    """Pairs of images with nearly the same embedding and, where images are given, nearly the same pixels.

    Training brings all images of a class together, so embeddings alone show near duplicates only where the classes are
    not tight. Pixels are compared as grey images of 16 x 16, by their correlation; this misses copies that are mirrored
    or cropped by much. An image of one grey value has correlation 0 with all.

    Args:
        embeddings: Floats ``(N, D)``.
        labels: Class of each image, integers ``(N,)``.
        images: uint8 or floats ``(M, C, H, W)`` of the first M embeddings: only these are compared. None: no pixels.
        threshold: Least cosine of the embeddings, in [-1, 1].
        min_correlation: Least correlation of the pixels, in [-1, 1].
        max_pairs: Largest number of pairs within classes, and of pairs across.
        chunk_size: Images compared at a time. Memory is ``O(chunk_size ** 2)`` besides the inputs in float64.

    Returns:
        Pairs within and across classes, ordered by correlation or, without images, by cosine.

    Raises:
        ValueError: If shapes do not match, a value is not finite or a number is out of range.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
        >>> found = near_duplicates(embeddings, torch.tensor([0, 1, 1, 1]))
        >>> found.within.images.tolist(), found.across.images.tolist()
        ([[1, 3]], [[0, 2]])

    Source:
        Small images compared pixel by pixel: Torralba, Fergus & Freeman, IEEE TPAMI 30(11), 2008, there in colour, with
        32 x 32 pixels.
    """
    check_embeddings(embeddings, labels)
    _check_numbers(max_pairs=max_pairs, chunk_size=chunk_size)
    for name, value in (("threshold", threshold), ("min_correlation", min_correlation)):
        if not -1 <= value <= 1:
            raise ValueError(f"{name} must be in [-1, 1], got {value}")
    unit = _unit(embeddings)
    pixels = None
    if images is not None:
        if images.ndim != 4 or len(images) > len(embeddings):
            raise ValueError(
                f"images must have shape (M, C, H, W) with M at most {len(embeddings)}, got {tuple(images.shape)}"
            )
        pixels = _thumbnails(images)
        unit, labels = unit[: len(images)], labels[: len(images)]
    kinds = [_BestPairs(len(unit), max_pairs), _BestPairs(len(unit), max_pairs)]
    for top in range(0, len(unit), chunk_size):
        rows = slice(top, top + chunk_size)
        for left in range(top, len(unit), chunk_size):
            columns = slice(left, left + chunk_size)
            cosines = _rounded(unit[rows] @ unit[columns].mT)
            near = cosines >= threshold
            if left == top:
                near = near.triu(diagonal=1)
            score = cosines
            if pixels is not None:
                score = _rounded(pixels[rows] @ pixels[columns].mT)
                near &= score >= min_correlation
            first, second = near.nonzero(as_tuple=True)
            cosines, score = cosines[first, second], score[first, second]
            first, second = first + top, second + left
            same = labels[first] == labels[second]
            for best, chosen in zip(kinds, (same, ~same), strict=True):
                best.add(first[chosen], second[chosen], cosines[chosen], score[chosen])
    return NearDuplicates(*(best.pairs(pixels is not None) for best in kinds))


class _BestPairs:
    """The pairs with the largest scores so far, and the number of all."""

    def __init__(self, num_images: int, max_pairs: int) -> None:
        self.num_images, self.max_pairs, self.total = num_images, max_pairs, 0
        self.place = torch.zeros(0, dtype=torch.long)  # first * N + second
        self.cosines = self.score = torch.zeros(0, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor, cosines: Tensor, score: Tensor) -> None:
        self.total += len(first)
        if len(score) > self.max_pairs:  # sort few
            kept = score >= score.topk(self.max_pairs).values[-1]
            first, second, cosines, score = first[kept], second[kept], cosines[kept], score[kept]
        place = torch.cat((self.place, first * self.num_images + second))
        cosines, score = torch.cat((self.cosines, cosines)), torch.cat((self.score, score))
        order = place.argsort()
        order = order[score[order].argsort(descending=True, stable=True)][: self.max_pairs]
        self.place, self.cosines, self.score = place[order], cosines[order], score[order]

    def pairs(self, correlated: bool) -> ImagePairs:
        images = torch.stack((self.place // self.num_images, self.place % self.num_images), dim=1)
        cosines, score = self.cosines.float(), self.score.float()
        return ImagePairs(images, cosines, score if correlated else torch.full_like(score, float("nan")), self.total)


class ClassScores(NamedTuple):
    """How well each class is found; ``nan`` for a class without images or without a second one.

    Attributes:
        images: int64 ``(C,)``.
        knn: Share of the images that the neighbours' vote predicts right, ``(C,)``.
        recall_at_1: ``(C,)``.
        r_precision: ``(C,)``.
        map_at_r: ``(C,)``.
        confused_with: The wrong class predicted most often, int64 ``(C,)``; -1: none.
        confused: Images so predicted, int64 ``(C,)``.
    """

    images: Tensor
    knn: Tensor
    recall_at_1: Tensor
    r_precision: Tensor
    map_at_r: Tensor
    confused_with: Tensor
    confused: Tensor


def knn_leave_one_out(neighbors: Neighbors, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """Class of each image by the vote of the other images, as :func:`~simo_lightning.functional.knn_predict` votes.

    Args:
        neighbors: Of all images, with k = 20, or as many as the largest class requires: a third of its images.
        labels: Class of each image, integers ``(N,)``.
        num_classes: C; None: the largest label plus one.

    Returns:
        Predicted classes ``(N,)``, int64.

    Raises:
        ValueError: If the labels do not match or there are too few neighbours.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> knn_leave_one_out(find_neighbors(embeddings), torch.tensor([0, 0, 1, 1]))
        tensor([0, 0, 1, 1])
    """
    labels = _check_labels(labels, neighbors)
    voters = class_voters(labels, None, int(labels.max()) + 1 if num_classes is None else num_classes)
    _check_reach(neighbors, labels, voters)
    parts = zip(neighbors.cosines.split(1024), neighbors.indices.split(1024), strict=True)
    return torch.cat([vote(cosines, labels[index], voters) for cosines, index in parts])


def scores_per_class(labels: Tensor, predicted: Tensor, scores: RetrievalScores, num_classes: int) -> ClassScores:
    """Accuracy of kNN and retrieval scores of each class, and what it is most often taken for.

    Args:
        labels: Class of each image, integers ``(N,)`` in 0..C-1.
        predicted: By kNN, from training images or :func:`knn_leave_one_out`, ``(N,)``.
        scores: Of each image as a query, the first k of recall being 1.
        num_classes: C.

    Returns:
        Values of each class.

    Raises:
        ValueError: If shapes do not match or a label is not in 0..C-1.

    Example:
        >>> from simo_lightning.functional import retrieval_scores
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> found = scores_per_class(labels, torch.tensor([0, 1, 1]), retrieval_scores(embeddings, labels), 2)
        >>> found.knn, found.map_at_r, found.confused_with
        (tensor([0.5000, 1.0000]), tensor([1., nan]), tensor([ 1, -1]))
    """
    confused = most_confused(labels, predicted, num_classes)
    values = torch.stack((scores.recall[:, 0], scores.r_precision, scores.average_precision), dim=1)
    means = average_scores(values, labels, "none", num_classes)  # (C, 3)
    knn = average_scores((predicted == labels).float(), labels, "none", num_classes)
    images = torch.bincount(labels, minlength=num_classes)
    return ClassScores(images, knn, means[:, 0], means[:, 1], means[:, 2], *confused)


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean embedding of each class.

    Args:
        embeddings: Floats ``(N, D)``.
        labels: Class of each embedding, integers ``(N,)`` in 0..C-1.
        num_classes: C.

    Returns:
        float64 ``(C, D)``; ``nan`` for a class without embeddings.

    Raises:
        ValueError: If shapes do not match or a label is not in 0..C-1.

    Example:
        >>> class_means(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 1]), num_classes=2).tolist()
        [[nan, nan], [2.0, 0.0]]
    """
    check_embeddings(embeddings, labels)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    counts = torch.bincount(labels.long(), minlength=num_classes)
    return class_sums(embeddings.double(), labels.long(), num_classes) / counts.unsqueeze(1)


def cluster_order(cosines: Tensor) -> Tensor:
    """An order of the classes in which similar ones are neighbours, so that a matrix of their cosines shows blocks.

    Hierarchical clustering with average linkage of the distances ``1 - cosine``; the leaves of up to 1,000 classes are
    ordered so that neighbours are as similar as the tree allows, which takes about four seconds for 1,000.

    Args:
        cosines: Of the class means, ``(C, C)``, symmetric; ``nan`` in the row of a class without images.

    Returns:
        A permutation of the classes, int64 ``(C,)``; those without cosines come last.

    Raises:
        ValueError: If the matrix is not square.

    Example:
        >>> cluster_order(torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.9, 0.1, 1.0]])).tolist()
        [0, 2, 1]

    Source:
        Bar-Joseph, Gifford & Jaakkola, Bioinformatics 17, 2001 (the order of the leaves), as SciPy has it. The order is
        turned round where that puts the class with the lowest index first.
    """
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1]:
        raise ValueError(f"cosines must be a square matrix (C, C), got {tuple(cosines.shape)}")
    known = cosines.diagonal().isfinite()
    classes, others = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)
    if len(classes) > 2:
        distances = (1 - cosines[known][:, known].double()).clamp(min=0)
        distances = ((distances + distances.mT) / 2).fill_diagonal_(0)
        tree = linkage(
            squareform(distances.numpy(), checks=False),
            method="average",
            optimal_ordering=len(classes) <= _MOST_ORDERED,
        )
        order = torch.from_numpy(leaves_list(tree)).long()
        classes = classes[order.flip(0) if order[-1] < order[0] else order]
    return torch.cat((classes, others))


class MeanPairs(NamedTuple):
    """Pairs of class means, the most aligned first.

    Attributes:
        classes: int64 ``(n, 2)``, the lower class first.
        cosines: ``(n,)``, in [-1, 1], by absolute value.
    """

    classes: Tensor
    cosines: Tensor


@torch.no_grad()
def worst_pairs(means: Tensor, count: int = 20, chunk_size: int = 1024) -> MeanPairs:
    """The pairs of class means that are furthest from orthogonal: the largest absolute cosines.

    Args:
        means: ``(C, D)``; a row with ``nan`` stands for a class without images and has no pairs.
        count: Largest number of pairs.
        chunk_size: Classes compared at a time.

    Returns:
        The pairs.

    Raises:
        ValueError: If the shape is wrong or a number is below 1.

    Example:
        >>> worst_pairs(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-4.0, 3.0]]), count=2)
        MeanPairs(classes=tensor([[0, 2],
                [1, 2]]), cosines=tensor([-0.8000,  0.6000]))
    """
    check_embeddings(means, name="means")
    _check_numbers(count=count, chunk_size=chunk_size)
    known = means.isfinite().all(dim=1).nonzero().squeeze(1)
    unit = unit_vectors(means[known].double())
    best = _BestPairs(len(unit), count)
    for top in range(0, len(unit), chunk_size):
        for left in range(top, len(unit), chunk_size):
            cosines = _rounded(unit[top : top + chunk_size] @ unit[left : left + chunk_size].mT)
            pairs = torch.ones_like(cosines, dtype=torch.bool)
            first, second = (pairs.triu(diagonal=1) if left == top else pairs).nonzero(as_tuple=True)
            cosines = cosines[first, second]
            best.add(first + top, second + left, cosines, cosines.abs())
    found = best.pairs(correlated=False)
    return MeanPairs(known[found.images], found.cosines)


Verdict = Literal["good", "watch", "bad", "undefined"]


class Headline(NamedTuple):
    """One of the numbers that a report begins with.

    Attributes:
        name: Such as "MAP@R".
        value: The number; ``nan`` if it is undefined.
        shown: The number as text.
        sentence: What it says, in one plain sentence.
        verdict: "good", "watch", "bad" or "undefined".
        rule: The rule of the verdict, such as "good from 0.7, bad below 0.4".
    """

    name: str
    value: float
    shown: str
    sentence: str
    verdict: Verdict
    rule: str


def headline(
    embeddings: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    map_at_r: float,
    recall_at_1: float,
    knn: float,
) -> list[Headline]:
    """Five numbers with a sentence and a verdict each.

    The limits of MAP@R, Recall@1 and kNN are conventions of this report; what is reachable depends on the data. The
    effective rank is judged against ``min(C, D)``, the rank of C orthogonal classes of equal size. The largest cosine
    of two class means is judged against the smallest that C directions in D dimensions allow.

    Args:
        embeddings: Floats ``(N, D)``.
        labels: Class of each image, integers ``(N,)`` in 0..C-1.
        class_names: C names.
        map_at_r: In [0, 1], or ``nan``.
        recall_at_1: In [0, 1], or ``nan``.
        knn: Accuracy, in [0, 1], or ``nan``.

    Returns:
        MAP@R, Recall@1, kNN accuracy, effective rank, and largest cosine between class means.

    Raises:
        ValueError: If shapes do not match or a label is not in 0..C-1.

    Example:
        >>> numbers = headline(torch.eye(2), torch.tensor([0, 1]), ["cat", "dog"], 0.75, 0.5, float("nan"))
        >>> [(number.shown, number.verdict) for number in numbers]
        [('0.75', 'good'), ('0.50', 'bad'), ('-', 'undefined'), ('2.0', 'good'), ('0.00', 'good')]

    Source:
        The smallest possible cosine, ``sqrt((C - D) / (D (C - 1)))`` for C > D: Welch, IEEE Trans. Inf. Theory 20(3),
        1974. The rest is ours.
    """
    means = class_means(embeddings, labels, len(class_names))
    present = int((~means.isnan().any(dim=1)).sum())
    dim = embeddings.shape[1]
    rank = float(effective_rank(class_moments(embeddings.double(), torch.zeros_like(labels), 1)))
    needed = min(present, dim)
    pairs = worst_pairs(means, count=1)
    cosine = float(pairs.cosines.abs().max()) if len(pairs.cosines) else float("nan")
    two = " and ".join(class_names[index] for index in pairs.classes[0].tolist()) if len(pairs.classes) else ""
    least = max(0.0, (present - dim) / (dim * max(present - 1, 1))) ** 0.5
    unavoidable = f"; with {present} classes in {dim} dimensions it is at least {least:.2f}" if least else ""
    return [
        _headline(
            "MAP@R",
            map_at_r,
            "Sorted by similarity to an image, the other images of its class come first with an average precision of "
            f"{map_at_r:.2f} (1: all of them before any image of another class).",
            good=0.7,
            bad=0.4,
        ),
        _headline(
            "Recall@1",
            recall_at_1,
            f"For {_percent(recall_at_1)} of the images the most similar other image is of the same class.",
            good=0.9,
            bad=0.6,
        ),
        _headline(
            "kNN accuracy",
            knn,
            f"A vote of the most similar images whose class is known gives the right class for {_percent(knn)} of the "
            "images.",
            good=0.9,
            bad=0.6,
        ),
        _headline(
            "Effective rank",
            rank,
            f"The embeddings use about {rank:.1f} of {dim} dimensions; {present} orthogonal classes use {needed}.",
            good=0.8 * needed,
            bad=0.4 * needed,
            digits=1,
        ),
        _headline(
            "Largest cosine of class means",
            cosine,
            f"The most aligned class means, {two}, have a cosine of {cosine:.2f} in absolute value (0: orthogonal, 1: "
            f"one direction){unavoidable}.",
            good=least + 0.3,
            bad=least + 0.7,
            higher_is_better=False,
        ),
    ]


def _headline(
    name: str,
    value: float,
    sentence: str,
    good: float,
    bad: float,
    digits: int = 2,
    higher_is_better: bool = True,
) -> Headline:
    if higher_is_better:
        rule = f"good from {good:.{digits}f}, bad below {bad:.{digits}f}"
        verdict: Verdict = "good" if value >= good else "bad" if value < bad else "watch"
    else:
        rule = f"good up to {good:.{digits}f}, bad above {bad:.{digits}f}"
        verdict = "good" if value <= good else "bad" if value > bad else "watch"
    if value != value:  # nan
        return Headline(name, value, "-", "It is not defined for these images.", "undefined", rule)
    return Headline(name, value, f"{value:.{digits}f}", sentence, verdict, rule)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _unit(embeddings: Tensor) -> Tensor:
    """Unit vectors (N, D) in float64."""
    check_embeddings(embeddings)
    check_finite(embeddings, "embeddings")
    return unit_vectors(embeddings.double())


def _rounded(cosines: Tensor) -> Tensor:
    """Multiples of 2**-22, in place."""
    return cosines.mul_(_GRID).round_().div_(_GRID)


def _votes(voted: Tensor, counted: Tensor) -> Tensor:
    """Votes for the class of each neighbour, (n, k), from their classes and whether each counts, (n, k)."""
    return ((voted.unsqueeze(2) == voted.unsqueeze(1)) & counted.unsqueeze(1)).sum(dim=2)


def _first_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and its first place, (n,) each."""
    place = values.argmax(dim=1)
    return values.gather(1, place.unsqueeze(1)).squeeze(1), place


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many rows before each one have its label, (n,)."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    first = counts.cumsum(dim=0) - counts
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - first[labels[order]]
    return rank


def _thumbnails(images: Tensor) -> Tensor:
    """Grey images of 16 x 16 as centred unit vectors, (M, 256) in float64."""
    parts = []
    for chunk in images.split(1024):
        grey = chunk.float().mean(dim=1, keepdim=True)
        small = interpolate(grey, size=(_THUMBNAIL, _THUMBNAIL), mode="area").flatten(1).double()
        parts.append(unit_vectors(small - small.mean(dim=1, keepdim=True)))
    return torch.cat(parts)


def _check_labels(labels: Tensor, neighbors: Neighbors) -> Tensor:
    """The labels as int64."""
    if labels.shape != neighbors.indices.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(neighbors.indices)},) to match neighbors, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(f"labels must be integers of at least 0, got {labels.dtype} from {labels.min().item()}")
    return labels.long()


def _check_reach(neighbors: Neighbors, labels: Tensor, voters: Tensor) -> None:
    """Raise unless there are as many neighbours as the class with the most voters (C,) requires."""
    if int(voters.max()) > neighbors.indices.shape[1]:
        raise ValueError(
            f"neighbors must have k of at least {int(voters.max())} for classes of up to "
            f"{int(labels.bincount().max())} images, got k={neighbors.indices.shape[1]}"
        )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
