"""SimO on one group of embeddings (Eq. 1) and on labelled batches, at the levels group and class.

Shapes: N rows, D dimensions, C classes. d is a squared distance, o a squared dot product ("orthogonality": 0 means
orthogonal). Here d and o are means over pairs where the paper sums, so that eps means the same at every batch size.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from simo_lightning.functional.moments import (
    class_scatter,
    class_second_moments,
    class_sums,
    compact_labels,
    squared_gram_norms,
)
from simo_lightning.functional.rows import unit_rows

Form = Literal["ratio", "log", "softmax"]


class Exchange(NamedTuple):
    """What one unit of alignment is worth in distance: the scalar functions of (d, o) that every level shares.

    Attributes:
        form: "ratio", or "log" = log(1 + ratio).
        eps: Added to every denominator, in units of d and o; > 0.
        leaning: Orthogonality leaning in 0..1: o becomes ``leaning * o + (1 - leaning)``.
    """

    form: Form
    eps: float
    leaning: float

    def pull(self, distance: Tensor, alignment: Tensor) -> Tensor:
        """Loss of similar pairs, elementwise >= 0: distance per alignment."""
        ratio = distance / (self.eps + self._lean(alignment))
        return ratio if self.form == "ratio" else ratio.log1p()

    def push(self, distance: Tensor, alignment: Tensor) -> Tensor:
        """Loss of dissimilar pairs, elementwise >= 0: alignment per distance."""
        ratio = self._lean(alignment) / (self.eps + distance)
        return ratio if self.form == "ratio" else ratio.log1p()

    def logit(self, distance: Tensor, alignment: Tensor) -> Tensor:
        """Log-odds of "same class", elementwise: log(eps + o) - log(eps + d)."""
        return (self.eps + self._lean(alignment)).log() - (self.eps + distance).log()

    def _lean(self, alignment: Tensor) -> Tensor:
        return alignment if self.leaning == 1 else self.leaning * alignment + (1 - self.leaning)


class Batch(NamedTuple):
    """A labelled batch with its classes numbered 0..C-1.

    Attributes:
        embeddings: ``(N, D)``, of length 1 where that was asked for.
        labels: Class of each row, ``(N,)``, in 0..C-1.
        counts: Rows of each class, ``(C,)`` int64, all >= 1.
        means: Class means, ``(C, D)``, with gradient.
    """

    embeddings: Tensor
    labels: Tensor
    counts: Tensor
    means: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, labels: Tensor, normalize: bool = False) -> "Batch":
        """Number the classes and take their means.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``, any values.
            normalize: Divide each embedding by its length first.

        Returns:
            The batch.
        """
        index, counts = compact_labels(labels)
        if normalize:
            embeddings, means = unit_rows(embeddings, index, counts)
        else:
            means = class_sums(embeddings, index, len(counts)) / counts.unsqueeze(1)
        return cls(embeddings, index, counts, means)

    def nothing(self) -> Tensor:
        """A zero that has a gradient: the value of a mean over no pairs."""
        return self.embeddings.sum() * 0.0


def simo_loss(embeddings: Tensor, similar: bool, eps: float = 1e-2, orthogonality_leaning: float = 1.0) -> Tensor:
    """Eq. 1: SimO of one group of embeddings, or of many, that are all similar or all dissimilar.

        similar:     mean d_ij / (eps + mean o_ij)        dissimilar:  mean o_ij / (eps + mean d_ij)

    with d_ij = |e_i - e_j|^2, o_ij = (e_i . e_j)^2 over the pairs i < j, in O(N) by moments.

    Args:
        embeddings: Float tensor ``(..., N, D)``, N >= 2, used as given.
        similar: Whether the rows of a group are all similar (True) or all dissimilar.
        eps: Added to the denominator.
        orthogonality_leaning: In 0..1; o becomes ``leaning * o + (1 - leaning)``.

    Returns:
        ``(...)``, >= 0.

    Raises:
        ValueError: If there is no pair or the shape is not ``(..., N, D)``.

    Example:
        >>> simo_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), similar=False)
        tensor(0.)
        >>> simo_loss(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), similar=True, eps=0.0)
        tensor(0.2500)

    Source:
        SimO loss, arXiv 2410.05233, Eq. 1. Deviations: means over pairs where the paper sums (equal up to eps), and
        our reading of the orthogonality leaning factor, whose place in the formula is not public.
    """
    if embeddings.ndim < 2 or embeddings.shape[-2] < 2:
        raise ValueError(f"embeddings must have shape (..., N, D) with N >= 2, got {tuple(embeddings.shape)}")
    rows, dim = embeddings.shape[-2:]
    pairs = rows * (rows - 1) / 2
    centred = embeddings - embeddings.mean(dim=-2, keepdim=True)
    distance = rows * centred.square().sum(dim=(-2, -1)) / pairs
    small = embeddings @ embeddings.mT if rows < dim else embeddings.mT @ embeddings
    fourth = embeddings.square().sum(dim=-1).square().sum(dim=-1)
    alignment = (small.square().sum(dim=(-2, -1)) - fourth).clamp(min=0) / (2 * pairs)
    exchange = Exchange("ratio", eps, orthogonality_leaning)
    return (exchange.pull if similar else exchange.push)(distance, alignment)


def group_terms(batch: Batch, exchange: Exchange) -> dict[str, Tensor]:
    """The paper's level: one similar ratio per class, one dissimilar ratio over all pairs of different classes.

    Args:
        batch: The labelled batch.
        exchange: Form, eps and leaning.

    Returns:
        ``similar`` (mean over the classes of two rows or more) and ``dissimilar``, scalars >= 0.

    Source:
        arXiv 2410.05233, Alg. 2, steps 1 and 2. Cost O(N D min(n, D)) for n rows a class.
    """
    embeddings, labels, counts, means = batch
    rows = len(embeddings)
    scatter = class_scatter(embeddings, means, labels)  # (C,)
    norms, whole = _squared_norms(embeddings, labels, counts)
    terms = {"similar": _similar_classes(batch, scatter, norms, exchange)}
    pairs = (rows**2 - int(counts.square().sum())) / 2
    if pairs == 0:
        return {**terms, "dissimilar": batch.nothing()}
    weights = counts.to(embeddings.dtype)  # (C,)
    between = rows * (weights * (means - weights @ means / rows).square().sum(dim=1)).sum()
    distance = ((scatter * (rows - weights)).sum() + between) / pairs
    alignment = (whole - norms.sum()).clamp(min=0) / (2 * pairs)
    return {**terms, "dissimilar": exchange.push(distance, alignment)}


def class_terms(batch: Batch, exchange: Exchange) -> dict[str, Tensor]:
    """One similar ratio per class, one dissimilar ratio per pair of classes.

    Args:
        batch: The labelled batch.
        exchange: Form, eps and leaning.

    Returns:
        ``similar`` (mean over the classes of two rows or more) and ``dissimilar`` (mean over the pairs of classes),
        scalars >= 0. Cost O(N D^2 + C^2 D^2), memory O(C D^2).
    """
    embeddings, labels, counts, means = batch
    scatter = class_scatter(embeddings, means, labels)
    second = class_second_moments(embeddings, labels, counts)  # (C, D, D)
    terms = {"similar": _similar_classes(batch, scatter, second.square().sum(dim=(1, 2)), exchange)}
    if len(counts) < 2:
        return {**terms, "dissimilar": batch.nothing()}
    spread = scatter / counts  # (C,) mean squared distance to the mean
    second = (second / counts[:, None, None]).flatten(1)  # (C, D*D)
    first, other = torch.triu_indices(len(counts), len(counts), offset=1, device=counts.device)
    distance = spread[first] + spread[other] + mean_distances(means, means)[first, other]
    return {**terms, "dissimilar": exchange.push(distance, (second @ second.mT)[first, other]).mean()}


def means_term(means: Tensor, exchange: Exchange) -> dict[str, Tensor]:
    """The dissimilar side of Eq. 1 among the class means.

    Args:
        means: ``(C, D)``.
        exchange: Form ("softmax" counts as "log" here), eps and leaning.

    Returns:
        ``mean``, a scalar >= 0.

    Source:
        arXiv 2410.05233, Alg. 2, step 3.
    """
    if len(means) < 2:
        return {"mean": means.sum() * 0.0}  # a zero that has a gradient
    ratio = simo_loss(means, similar=False, eps=exchange.eps, orthogonality_leaning=exchange.leaning)
    return {"mean": ratio if exchange.form == "ratio" else ratio.log1p()}


def _squared_norms(embeddings: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of o over the ordered pairs of each class (C,) and of the whole batch, each row with itself included."""
    rows, dim = embeddings.shape
    if int(counts.min()) >= dim:  # every class has more rows than dimensions: S per class, and their sum is the whole's
        second = class_second_moments(embeddings, labels, counts)
        return second.square().sum(dim=(1, 2)), second.sum(dim=0).square().sum()
    whole = embeddings @ embeddings.mT if rows < dim else embeddings.mT @ embeddings
    return squared_gram_norms(embeddings, labels, counts), whole.square().sum()


def _similar_classes(batch: Batch, scatter: Tensor, norms: Tensor, exchange: Exchange) -> Tensor:
    """Mean of the similar ratio over the classes of two rows or more.

    `scatter` is the sum of squared distances to the mean, `norms` the squared Frobenius norm of S, both (C,).
    """
    paired = batch.counts > 1
    if not paired.any():
        return batch.nothing()
    count = batch.counts[paired].to(scatter.dtype)
    fourth = class_sums(torch.linalg.vector_norm(batch.embeddings, dim=1) ** 4, batch.labels, len(batch.counts))
    distance = 2 * scatter[paired] / (count - 1)
    alignment = (norms[paired] - fourth[paired]).clamp(min=0) / (count * (count - 1))
    return exchange.pull(distance, alignment).mean()


def mean_distances(rows: Tensor, means: Tensor) -> Tensor:
    """Squared distances by one matrix product, centred first so that a far origin costs no digits.

    Args:
        rows: ``(N, D)``.
        means: ``(C, D)``.

    Returns:
        ``(N, C)``, >= 0.
    """
    origin = means.mean(dim=0)
    rows, means = rows - origin, means - origin
    squares = rows.square().sum(dim=1, keepdim=True) + means.square().sum(dim=1)
    return (squares - 2 * rows @ means.T).clamp(min=0)
