"""SimO loss: Eq. 1 of the paper on one group of embeddings, and its terms on labelled batches at four levels.

Shapes: N embeddings, D dimensions, C classes, R embeddings of a chunk. Throughout, d is a squared distance and o a
squared dot product ("orthogonality": 0 means orthogonal). Where the paper sums d and o over pairs, they are means here,
so that eps means the same at every batch size.

Sums over the embeddings go through ``total``: the identity for embeddings that are all in this process, a sum over all
processes where each has some of them and ``classes.counts`` are those of all.

Every function is plain PyTorch and differentiable any number of times. What depends on the values of the labels is
computed first, by :func:`number_classes`; the rest depends on shapes alone and compiles without a graph break.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simo_lightning.functional.chunks import sum_of_chunks
from simo_lightning.functional.moments import (
    class_blocks,
    class_scatter,
    class_second_moments,
    class_sums,
    compact_labels,
    gather_block,
)

Form = Literal["ratio", "log", "softmax"]

# Entries of the largest matrix that is kept for the backward pass. Larger ones are computed in chunks of rows, each
# once more in the backward pass, so that memory is linear in N.
_CHUNK_ENTRIES = 2**21

Total = Callable[[Tensor], Tensor]


def _of_this_process(values: Tensor) -> Tensor:
    return values


class Similarity(NamedTuple):
    """The elementwise functions of d and o that all levels share.

    Attributes:
        form: "ratio", or log(1 + ratio) for "log" and for the terms of "softmax" that are not a cross-entropy.
        eps: Added to every denominator, in units of d and o; > 0.
        leaning: Orthogonality leaning in 0..1: o is ``leaning * (squared dot product) + (1 - leaning)``.
    """

    form: Form
    eps: float
    leaning: float = 1.0

    def o(self, squared_dots: Tensor) -> Tensor:
        """Orthogonality o of squared dot products, or of their means, with the leaning applied."""
        return squared_dots if self.leaning == 1 else self.leaning * squared_dots + (1 - self.leaning)

    def similar(self, d: Tensor, o: Tensor) -> Tensor:
        """Loss of similar pairs, >= 0."""
        ratio = d / (self.eps + o)
        return ratio if self.form == "ratio" else ratio.log1p()

    def dissimilar(self, d: Tensor, o: Tensor) -> Tensor:
        """Loss of dissimilar pairs, >= 0."""
        ratio = o / (self.eps + d)
        return ratio if self.form == "ratio" else ratio.log1p()

    def logit(self, d: Tensor, o: Tensor) -> Tensor:
        """Log-odds of "similar" against "dissimilar"."""
        return (self.eps + o).log() - (self.eps + d).log()


class Classes(NamedTuple):
    """The classes of a batch, numbered 0..C-1.

    Attributes:
        labels: Class of each embedding, ``(N,)`` int64.
        counts: Embeddings of each class, ``(C,)`` int64, all >= 1; over all processes where they share the embeddings.
        blocks: Indices of the embeddings of each class, by :func:`.moments.class_blocks`; empty unless requested.
    """

    labels: Tensor
    counts: Tensor
    blocks: tuple[tuple[Tensor, Tensor], ...] = ()


def number_classes(labels: Tensor, blocks: bool = False) -> Classes:
    """Number the classes of a batch in the order of their labels.

    Args:
        labels: Integers ``(N,)``, any values.
        blocks: Whether to include the blocks, which the levels group and class need.

    Returns:
        The classes.

    Example:
        >>> classes = number_classes(torch.tensor([7, -1, 7]), blocks=True)
        >>> classes.labels.tolist(), classes.counts.tolist()
        ([1, 0, 1], [1, 2])
    """
    index, counts = compact_labels(labels)
    return Classes(index, counts, class_blocks(index, counts) if blocks else ())


def class_means(embeddings: Tensor, classes: Classes, total: Total = _of_this_process) -> Tensor:
    """Mean embedding of each class, ``(C, D)``."""
    return total(class_sums(embeddings, classes.labels, len(classes.counts))) / classes.counts.unsqueeze(1)


def class_centers(means: Tensor, prototypes: Tensor | None, prototype_weight: float | Tensor) -> Tensor:
    """Class centers ``(1 - prototype_weight) * means + prototype_weight * prototypes``.

    Args:
        means: Class means, ``(C, D)``.
        prototypes: ``(C, D)``; None where ``prototype_weight`` is 0.
        prototype_weight: In 0..1, of all classes or of each, ``(C, 1)``.

    Returns:
        ``(C, D)``.
    """
    return means if prototypes is None else torch.lerp(means, prototypes, prototype_weight)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances by one matrix product. It cancels badly far from the origin, so callers center both.

    Args:
        a: ``(R, D)``.
        b: ``(N, D)``.

    Returns:
        ``(R, N)``, >= 0.
    """
    return (a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)


def simo_loss(embeddings: Tensor, similar: bool, eps: float = 1e-2, orthogonality_leaning: float = 1.0) -> Tensor:
    """Eq. 1: SimO of one group of embeddings, or of many, that are all similar or all dissimilar.

        similar:     mean d_ij / (eps + mean o_ij)        dissimilar:  mean o_ij / (eps + mean d_ij)

    with d_ij = |e_i - e_j|^2, o_ij = (e_i . e_j)^2 over the pairs i < j, in time linear in N.

    Args:
        embeddings: Float tensor ``(..., N, D)``, N >= 2, used as given.
        similar: Whether the embeddings of a group are all similar (True) or all dissimilar.
        eps: Added to the denominator.
        orthogonality_leaning: In 0..1; o becomes ``leaning * o + (1 - leaning)``.

    Returns:
        ``(...)``, >= 0.

    Raises:
        ValueError: If there is no pair, or embeddings are no float tensor ``(..., N, D)``.

    Example:
        >>> simo_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), similar=False)
        tensor(0.)
        >>> simo_loss(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), similar=True, eps=0.0)
        tensor(0.2500)

    Source:
        SimO loss, arXiv 2410.05233, Eq. 1. Deviations: means over pairs where the paper sums (equal up to eps), and
        our reading of the orthogonality leaning factor, whose exact use is not public.
    """
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        kind = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"embeddings must be a float tensor of shape (..., N, D), got {kind}")
    if embeddings.ndim < 2 or embeddings.shape[-2] < 2:
        raise ValueError(f"embeddings must have shape (..., N, D) with N >= 2, got {tuple(embeddings.shape)}")
    similarity = Similarity("ratio", eps, orthogonality_leaning)
    d, o = _pair_means(embeddings, similarity)
    return similarity.similar(d, o) if similar else similarity.dissimilar(d, o)


def group_terms(
    embeddings: Tensor,
    classes: Classes,
    means: Tensor,
    similarity: Similarity,
    second: Tensor | None = None,
    total: Total = _of_this_process,
) -> dict[str, Tensor]:
    """The paper's level: one similar ratio per class, one dissimilar ratio over all pairs of different classes.

    Args:
        embeddings: ``(N, D)``.
        classes: With blocks.
        means: Class means, ``(C, D)``.
        similarity: Form, eps and leaning.
        second: Second moments of the classes over all processes, ``(C, D, D)``; None where one process has all
            embeddings.
        total: Sums over the processes.

    Returns:
        ``similar`` (mean over the classes of two embeddings or more) and ``dissimilar``, scalars >= 0.

    Source:
        arXiv 2410.05233, Alg. 2, steps 1 and 2. Time O(N D min(n, D)) for n embeddings a class, memory O(N D).
    """
    n, sizes = classes.counts.sum(), classes.counts.to(embeddings.dtype)
    scatter = total(class_scatter(embeddings, means, classes.labels))  # (C,)
    within, of_all = _sums_of_o(embeddings, classes) if second is None else _energies(second)
    terms = {"similar": _similar_classes(embeddings, classes, scatter, within, similarity, total)}
    if len(sizes) < 2:
        return {**terms, "dissimilar": means.sum() * 0.0}
    pairs = n**2 - classes.counts.square().sum()  # ordered pairs of different classes
    mean = (sizes.unsqueeze(1) * means).sum(dim=0) / n
    between = (sizes * (means - mean).square().sum(dim=1)).sum()
    d = 2 * ((scatter * (n - sizes)).sum() + n * between) / pairs
    o = similarity.o((of_all - within.sum()).clamp(min=0) / pairs)
    return {**terms, "dissimilar": similarity.dissimilar(d, o)}


def _sums_of_o(embeddings: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """Sums of o over the ordered pairs of each class, ``(C,)``, and of all embeddings, a scalar."""
    within = embeddings.new_zeros(len(classes.counts))
    for members, indices in classes.blocks:
        gram = _gram(gather_block(embeddings, indices))
        within = within.index_copy(0, members, gram.square().sum(dim=(1, 2)))
    return within, _gram(embeddings).square().sum()


def _energies(second: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_sums_of_o` of second moments ``(C, D, D)``: the squared norm of each, and of their sum."""
    return second.square().sum(dim=(1, 2)), second.sum(dim=0).square().sum()


def class_terms(
    embeddings: Tensor,
    classes: Classes,
    means: Tensor,
    similarity: Similarity,
    second: Tensor | None = None,
    total: Total = _of_this_process,
) -> dict[str, Tensor]:
    """One similar ratio per class, one dissimilar ratio per pair of classes.

    Args:
        embeddings: ``(N, D)``.
        classes: With blocks.
        means: Class means, ``(C, D)``.
        similarity: Form, eps and leaning.
        second: As for :func:`group_terms`.
        total: Sums over the processes.

    Returns:
        ``similar`` (mean over the classes of two embeddings or more) and ``dissimilar`` (mean over the pairs of
        classes), scalars >= 0. Time O(N D^2) where C D <= N and O(N^2 D) elsewhere, memory O(N D + C^2).
    """
    number, sizes = len(classes.counts), classes.counts.to(embeddings.dtype)
    scatter = total(class_scatter(embeddings, means, classes.labels))  # (C,)
    sums = _class_pair_sums(embeddings, classes, second)  # (C, C) of o over all pairs
    terms = {"similar": _similar_classes(embeddings, classes, scatter, sums.diagonal(), similarity, total)}
    if number < 2:
        return {**terms, "dissimilar": means.sum() * 0.0}
    spread, centered = scatter / sizes, means - means.mean(dim=0)
    d = spread.unsqueeze(1) + spread + squared_distances(centered, centered)  # (C, C)
    o = similarity.o(sums / (sizes.unsqueeze(1) * sizes))
    return {**terms, "dissimilar": similarity.dissimilar(d, o).triu(1).sum() / (number * (number - 1) / 2)}


def centroid_terms(
    embeddings: Tensor,
    classes: Classes,
    centers: Tensor,
    similarity: Similarity,
    label_smoothing: float = 0.0,
    singles: bool = False,
    total: Total = _of_this_process,
) -> dict[str, Tensor]:
    """One ratio per embedding and class center: its own class similar, every other class dissimilar.

    Args:
        embeddings: ``(N, D)``.
        classes: Without blocks.
        centers: Of :func:`class_centers`, ``(C, D)``.
        similarity: Form, eps and leaning.
        label_smoothing: For the softmax form, share of the target spread evenly over all classes, in 0..1.
        singles: Whether classes of one embedding have a similar term. They should where the centers include
            prototypes; the mean of one embedding is that embedding.
        total: Sums over the processes.

    Returns:
        ratio and log: ``similar`` (mean over embeddings) and ``dissimilar`` (mean over embeddings and other classes).
        softmax: ``softmax``, the cross-entropy over all classes with logits log(eps + o) - log(eps + d). Scalars >= 0.
        Time O(N C D), memory O(N D + C D).

    Source:
        Ours; the softmax form is the likelihood of the log form's classifiers, up to eps, given that exactly one class
        is the right one (docs/theory.md).
    """
    origin = centers.mean(dim=0).detach()  # for the distances, which would lose digits far from 0
    counted = torch.ones_like(classes.counts) if singles else (classes.counts > 1).long()  # (C,)

    def sums(x: Tensor, index: Tensor, centers: Tensor) -> Tensor:  # (R, D), (R,), (C, D)
        own = index.unsqueeze(1)
        # Exact where classes are tight. F.embedding is deterministic on CUDA, where indexing is not.
        own_d = (x - F.embedding(index, centers)).square().sum(dim=1, keepdim=True)
        # Both d and o follow from one large product, x . (c - origin)
        centered = centers - origin  # (C, D)
        squares = (centered.square() + 2 * centered * origin).sum(dim=1)  # (C,)
        products = x @ centered.T  # (R, C)
        d = (x - origin).square().sum(dim=1, keepdim=True) + squares - 2 * products
        d = d.clamp(min=0).scatter(1, own, own_d)
        o = similarity.o((products + (x @ origin).unsqueeze(1)).square())
        if similarity.form == "softmax":
            losses = F.cross_entropy(similarity.logit(d, o), index, reduction="none", label_smoothing=label_smoothing)
            return (losses * counted[index]).sum().unsqueeze(0)
        similar = similarity.similar(own_d, o.gather(1, own)) * counted[own]
        dissimilar = similarity.dissimilar(d, o).scatter(1, own, 0.0)
        return torch.stack([similar.sum(), dissimilar.sum()])

    n, width = classes.counts.sum(), max(centers.shape)
    summed = total(sum_of_chunks(sums, max(1, _CHUNK_ENTRIES // width), (embeddings, classes.labels), (centers,)))
    mean = summed[0] / (classes.counts * counted).sum().clamp(min=1)
    if similarity.form == "softmax":
        return {"softmax": mean}
    return {"similar": mean, "dissimilar": summed[1] / (n * (len(centers) - 1)).clamp(min=1)}


def pair_terms(
    embeddings: Tensor, classes: Classes, means: Tensor, similarity: Similarity, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """One ratio per pair of embeddings.

    Args:
        embeddings: ``(N, D)``.
        classes: Without blocks.
        means: Class means, ``(C, D)``.
        similarity: Form, eps and leaning.
        label_smoothing: For the softmax form, share of the target spread evenly over all other embeddings, in 0..1.

    Returns:
        ratio and log: ``similar`` (mean over the pairs of one class) and ``dissimilar`` (mean over the pairs of two
        classes). softmax: ``softmax``, the mean over the embeddings with a positive of the mean over its positives of
        the cross-entropy over all others, with logits log(eps + o) - log(eps + d). Scalars >= 0. Time O(N^2 D), memory
        O(N D).

    Source:
        Ours; the softmax form is SupCon (arXiv 2004.11362, L_out) with SimO's similarity.
    """
    n, numbers = len(embeddings), torch.arange(len(embeddings), device=embeddings.device)
    means = means.detach()
    # Any origin gives the same distance. The own class mean keeps the digits within tight classes.
    near, far = embeddings - F.embedding(classes.labels, means), embeddings - means.mean(dim=0)
    positives = classes.counts[classes.labels] - 1  # (N,)

    def sums(*tensors: Tensor) -> Tensor:
        x, x_near, x_far, index, number, embeddings, near, far = tensors  # R of the first five, N of the others
        itself = number.unsqueeze(1) == numbers  # (R, N)
        same = index.unsqueeze(1) == classes.labels
        d = torch.where(same, squared_distances(x_near, near), squared_distances(x_far, far))
        o = similarity.o((x @ embeddings.T).square())
        if similarity.form == "softmax":
            logits = similarity.logit(d, o).masked_fill(itself, -torch.inf)
            log_p = logits.log_softmax(dim=1).masked_fill(itself, 0)
            own = (log_p * same).sum(dim=1) / positives[number].clamp(min=1)
            every = log_p.sum(dim=1) / (n - 1)
            losses = -((1 - label_smoothing) * own + label_smoothing * every)
            return (losses * (positives[number] > 0)).sum().unsqueeze(0)
        # d / (eps + o) of similar pairs, o / (eps + d) of dissimilar ones
        losses = similarity.similar(torch.where(same, d, o), torch.where(same, o, d)).masked_fill(itself, 0)
        return torch.stack([(losses * same).sum(), losses.masked_fill(same, 0).sum()])

    if n < 2:
        nothing = embeddings.sum() * 0.0
        return {"softmax": nothing} if similarity.form == "softmax" else {"similar": nothing, "dissimilar": nothing}
    parts = (embeddings, near, far, classes.labels, numbers)
    total = sum_of_chunks(sums, max(1, _CHUNK_ENTRIES // n), parts, (embeddings, near, far))
    if similarity.form == "softmax":
        return {"softmax": total[0] / (positives > 0).sum().clamp(min=1)}
    within = positives.sum()  # ordered pairs of one class
    across = n * (n - 1) - within
    return {"similar": total[0] / within.clamp(min=1), "dissimilar": total[1] / across.clamp(min=1)}


def mean_term(means: Tensor, similarity: Similarity) -> Tensor:
    """The dissimilar side of Eq. 1 among the class means ``(C, D)``: a scalar >= 0, and 0 for one class.

    Source:
        arXiv 2410.05233, Alg. 2, step 3.
    """
    if len(means) < 2:
        return means.sum() * 0.0
    return similarity.dissimilar(*_pair_means(means, similarity))


def _pair_means(x: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Means of d and of o over the pairs of ``x (..., N, D)``, both ``(...)``.

    With the mean m and the second moment S = sum e e^T: sum_{i<j} d_ij = N sum_i |e_i - m|^2 and
    sum_{i<j} o_ij = (|S|^2 - sum_i |e_i|^4) / 2, and the Gram matrix has the same norm as S.
    """
    n = x.shape[-2]
    d = 2 * (x - x.mean(dim=-2, keepdim=True)).square().sum(dim=(-2, -1)) / (n - 1)
    fourth = x.square().sum(dim=-1).square().sum(dim=-1)
    dots = (_gram(x).square().sum(dim=(-2, -1)) - fourth).clamp(min=0) / (n * (n - 1))
    return d, similarity.o(dots)


def _gram(x: Tensor) -> Tensor:
    """The smaller of ``x x^T (..., N, N)`` and ``x^T x (..., D, D)``, which have the same Frobenius norm."""
    return x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x


def _similar_classes(
    embeddings: Tensor, classes: Classes, scatter: Tensor, sums: Tensor, similarity: Similarity, total: Total
) -> Tensor:
    """Mean of the similar ratio over the classes of two embeddings or more.

    ``scatter (C,)`` is the sum of squared distances to the mean, ``sums (C,)`` that of o over the ordered pairs of a
    class, each embedding with itself included.
    """
    sizes, paired = classes.counts, classes.counts > 1
    itself = total(class_sums(embeddings.square().sum(dim=1).square(), classes.labels, len(sizes)))
    pairs = (sizes * (sizes - 1)).clamp(min=1)
    d, o = 2 * sizes * scatter / pairs, similarity.o((sums - itself).clamp(min=0) / pairs)
    return similarity.similar(d, o).masked_fill(~paired, 0).sum() / paired.sum().clamp(min=1)


def _class_pair_sums(embeddings: Tensor, classes: Classes, second: Tensor | None) -> Tensor:
    """Sum of o over all pairs of an embedding of one class and one of another, or the same: ``(C, C)``."""
    (n, dim), number = embeddings.shape, len(classes.counts)
    if second is None and number * dim <= n:  # second moments S_c, which are no larger than the embeddings
        second = class_second_moments(embeddings, classes.blocks, number)
    if second is not None:  # the sum of o is S_a . S_b
        flat = second.flatten(1)
        return (flat @ flat.T).clamp(min=0)

    def sums(x: Tensor, index: Tensor, embeddings: Tensor) -> Tensor:
        o = (embeddings @ x.T).square()  # (N, R)
        return class_sums(class_sums(o, classes.labels, number).T, index, number)

    return sum_of_chunks(sums, max(1, _CHUNK_ENTRIES // n), (embeddings, classes.labels), (embeddings,))
