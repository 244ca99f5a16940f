"""The centroid level of SimO: one ratio per row and class mean, in O(N C D) time and O(N D) memory.

Shapes: N rows, D dimensions, C classes, R rows of a chunk. A chunk's matrices are (C, R), small enough for a core's
cache; its gradient is taken at once, by the slopes written out below, so that nothing is kept but (N, D) and (C, D) per
term. The gradient itself cannot be differentiated again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simo_lightning.functional.moments import class_sums, compact_labels
from simo_lightning.functional.prototypes import class_prototypes
from simo_lightning.functional.rows import before_lengths, lengths_and_means, spans
from simo_lightning.functional.simo import Exchange


def centroid_terms(
    embeddings: Tensor,
    labels: Tensor,
    exchange: Exchange,
    label_smoothing: float = 0.0,
    prototype_weight: float = 0.0,
    normalize: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """One ratio per row and class centre: its own class similar, every other class dissimilar.

    The centre of a class is ``(1 - prototype_weight) * mean + prototype_weight * axis``, with the class's axis of
    :func:`~simo_lightning.functional.prototypes.class_prototypes`.

    Args:
        embeddings: Float tensor ``(N, D)``, N >= 1.
        labels: Integers ``(N,)``, any values.
        exchange: Form, eps and leaning.
        label_smoothing: For the softmax form, share of the target spread evenly over all classes, in 0..1.
        prototype_weight: Share of the axis in the centre, in 0..1. Above 0 a class of one row has a similar side too.
        normalize: Divide each embedding by its length first.

    Returns:
        The terms and the class means ``(C, D)``; the means hold the row itself, and all carry gradient. ratio and log:
        ``similar`` (mean over the rows of classes of two rows or more) and ``dissimilar`` (mean over rows and other
        classes). softmax: ``softmax``, the cross-entropy of the rows of classes of two rows or more over all classes,
        with logits log(eps + o) - log(eps + d).

    Source:
        Ours; the softmax form is the multi-class likelihood whose two-class case is the log form's.
        The prototypes are ours too: classes that coincide are a saddle of the loss, and the axes lead out of it.
    """
    index, counts = compact_labels(labels)
    pulled, rows, others = None, len(labels), len(labels) * (len(counts) - 1)
    if not prototype_weight and int(counts.min()) < 2:
        pulled = counts > 1  # (C,) whether a row has something to be similar to
        rows = int(counts[pulled].sum())
    axes = None
    if prototype_weight:
        numbers = torch.empty_like(counts).scatter_(0, index, labels.long())  # (C,) the labels themselves
        axes = prototype_weight * class_prototypes(numbers, embeddings.shape[1], embeddings.dtype)
    names, judge, shares = ["softmax"], partial(_softmax, exchange, label_smoothing), [1 / max(rows, 1)]
    if exchange.form != "softmax":
        names, judge = ["similar", "dissimilar"], partial(_pull_and_push, exchange)
        shares.append(1 / max(others, 1))
    need = torch.is_grad_enabled() and embeddings.requires_grad
    task = _Task(judge, shares, 1 - prototype_weight, normalize, need)
    *terms, means = _Centroids.apply(embeddings, index, counts, axes, pulled, task)
    return dict(zip(names, terms, strict=True)), means


class _Task(NamedTuple):
    """What is asked of the rows: a judge, what each of its sums is multiplied with, the share of the mean in a centre,
    whether rows are divided by their length, and whether there is need of a gradient.
    """

    judge: "_Judge"
    shares: list[float]
    of_mean: float
    normalize: bool
    need: bool


class _Chunk(NamedTuple):
    """What is judged: squared distances and dot products (C, R), the own class (1, R), and 1.0 where a row is pulled.

    `pulled` (R,) is None where all rows are. The rest is for the gradient: rows less the origin and less their own
    centre, both (R, D).
    """

    distance: Tensor
    dot: Tensor
    own: Tensor
    pulled: Tensor | None
    rows: Tensor
    gap: Tensor


class _Verdict(NamedTuple):
    """A term's sum over the chunk and its slopes by distance and by dot product, (C, R)."""

    total: Tensor
    by_distance: Tensor
    by_dot: Tensor


_Judge = Callable[[_Chunk], list[_Verdict]]


def _softmax(exchange: Exchange, smoothing: float, chunk: _Chunk) -> list[_Verdict]:
    """Cross-entropy over classes. With r = (eps + o) / (eps + d) the probabilities are r / sum r: no exponential."""
    leaning, classes = exchange.leaning, len(chunk.dot)
    worth = (leaning * chunk.dot).mul_(chunk.dot).add_(exchange.eps + 1 - leaning)  # eps + o
    cost = chunk.distance.add(exchange.eps)
    ratio = worth / cost
    total = ratio.sum(dim=0)  # (R,)
    target = (1 - smoothing) * ratio.gather(0, chunk.own).squeeze(0).log()
    if smoothing:
        target += smoothing / classes * ratio.log().sum(dim=0)
    losses = total.log().sub_(target)
    value = losses.sum() if chunk.pulled is None else losses @ chunk.pulled
    slope = ratio.div_(total)  # by logit: probability less target
    if smoothing:
        slope -= smoothing / classes
    slope.scatter_add_(0, chunk.own, slope.new_full((1, 1), smoothing - 1).expand_as(chunk.own))
    if chunk.pulled is not None:
        slope *= chunk.pulled
    by_dot = (slope / worth).mul_(chunk.dot).mul_(2 * leaning)
    return [_Verdict(value, slope.div_(cost).neg_(), by_dot)]


def _pull_and_push(exchange: Exchange, chunk: _Chunk) -> list[_Verdict]:
    """Distance per alignment to the own centre, alignment per distance to the others: two terms."""
    distance, dot, own, leaning = chunk.distance, chunk.dot, chunk.own, exchange.leaning
    alignment = (leaning * dot).mul_(dot).add_(1 - leaning)
    push, push_by_alignment, push_by_distance = _traded(exchange, alignment, distance)
    nothing = torch.zeros_like(distance[:1])
    for matrix in (push, push_by_alignment, push_by_distance):
        matrix.scatter_(0, own, nothing)
    pushed = _Verdict(push.sum(), push_by_distance, push_by_alignment.mul_(dot).mul_(2 * leaning))
    pull, by_distance, by_alignment = _traded(exchange, distance.gather(0, own), alignment.gather(0, own))  # (1, R)
    by_dot = by_alignment * 2 * leaning * dot.gather(0, own)
    if chunk.pulled is not None:
        pull, by_distance, by_dot = pull * chunk.pulled, by_distance * chunk.pulled, by_dot * chunk.pulled
    nothing = torch.zeros_like(distance)
    pulled = _Verdict(pull.sum(), nothing.scatter(0, own, by_distance), nothing.scatter(0, own, by_dot))
    return [pulled, pushed]


def _traded(exchange: Exchange, paid: Tensor, bought: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(paid / (eps + bought)) with its slopes by both."""
    price = bought + exchange.eps
    ratio = paid / price
    slope = price.reciprocal()
    if exchange.form == "ratio":
        return ratio, slope, -slope * ratio
    slope /= 1 + ratio
    return ratio.log1p(), slope, -slope * ratio


class _Centroids(torch.autograd.Function):
    """The judge's terms and the class means; the gradient is taken on the way and handed over to the first backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        labels: Tensor,
        counts: Tensor,
        axes: Tensor | None,
        pulled: Tensor | None,
        task: _Task,
    ) -> tuple[Tensor, ...]:
        if task.normalize:
            lengths, means = lengths_and_means(rows, labels, counts, None)
        else:
            lengths, means = None, class_sums(rows, labels, len(counts)) / counts.unsqueeze(1)
        centers = means if axes is None else task.of_mean * means + axes
        sums, gradients = _walk(rows, lengths, centers, labels, pulled, task)
        ctx.save_for_backward(rows, lengths, centers, labels, pulled, counts)
        ctx.task, ctx.gradients = task, gradients
        return *(total * share for total, share in zip(sums, task.shares, strict=True)), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        *by_terms, by_means = weights
        by_sums = [weight * share for weight, share in zip(by_terms, ctx.task.shares, strict=True)]
        rows, lengths, centers, labels, pulled, counts = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward through the same graph
            _, gradients = _walk(rows, lengths, centers, labels, pulled, ctx.task)
        for weight, (_, by_centers) in zip(by_sums, gradients, strict=True):
            by_means = torch.addcmul(by_means, by_centers, weight, value=ctx.task.of_mean)
        by_means = by_means / counts.unsqueeze(1)  # (C, D), in each row of the mean
        (result, _), *others = gradients
        for span in spans(rows):
            gradient = result[span].mul_(by_sums[0]).add_(by_means.index_select(0, labels[span]))
            for weight, (more, _) in zip(by_sums[1:], others, strict=True):
                gradient.addcmul_(more[span], weight)
            if lengths is not None:
                before_lengths(gradient, rows[span] / lengths[span], lengths[span])
        return result, None, None, None, None, None


def _walk(
    rows: Tensor, lengths: Tensor | None, centers: Tensor, labels: Tensor, pulled: Tensor | None, task: _Task
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Over all rows, chunk by chunk: the judge's sums, and where there is need the gradients of each by the rows, as
    they are judged, and by the centres.
    """
    sums = [rows.new_zeros(()) for _ in task.shares]
    gradients = [(torch.empty_like(rows), torch.zeros_like(centers)) for _ in task.shares if task.need]
    around, pulled = _Centers.of(centers), None if pulled is None else pulled.to(rows.dtype)
    for span in spans(rows, width=len(centers)):
        judged = rows[span] if lengths is None else rows[span] / lengths[span]
        chunk = _look(judged, around, labels[span], pulled)
        for place, verdict in enumerate(task.judge(chunk)):
            sums[place] += verdict.total
            if task.need:
                by_rows, by_centers = gradients[place]
                _turn_back(chunk, verdict, around, by_rows[span], by_centers)
    return sums, gradients


class _Centers(NamedTuple):
    """The centres (C, D), their mean (D,), the centres less it (C, D), and the squares of these (C, 1)."""

    whole: Tensor
    origin: Tensor
    near: Tensor
    squares: Tensor

    @classmethod
    def of(cls, centers: Tensor) -> "_Centers":
        origin = centers.mean(dim=0)
        near = centers - origin
        return cls(centers, origin, near, near.square().sum(dim=1, keepdim=True))


def _look(rows: Tensor, centers: _Centers, labels: Tensor, pulled: Tensor | None) -> _Chunk:
    """Distances to other centres by a matrix product, less the origin first so that they cost no digits; to the own
    centre from the difference, exact for tight classes.
    """
    own, gap, near = labels.unsqueeze(0), rows - centers.whole.index_select(0, labels), rows - centers.origin
    distance = torch.addmm(near.square().sum(dim=1), centers.near, near.T, alpha=-2).add_(centers.squares)
    distance.clamp_(min=0).scatter_(0, own, gap.square().sum(dim=1).unsqueeze(0))
    return _Chunk(distance, centers.whole @ rows.T, own, None if pulled is None else pulled[labels], near, gap)


def _turn_back(chunk: _Chunk, verdict: _Verdict, centers: _Centers, by_rows: Tensor, by_centers: Tensor) -> None:
    """Write the chunk's gradient by its rows, and add its gradient by the centres; both are less the origin here."""
    _, by_distance, by_dot = verdict
    pull = chunk.gap * (2 * by_distance.gather(0, chunk.own).squeeze(0)).unsqueeze(1)  # (R, D)
    by_distance.scatter_(0, chunk.own, torch.zeros_like(by_distance[:1]))
    mix = by_dot.sub(by_distance, alpha=2)  # (C, R): the products of d and of o with the same vectors
    torch.mm(mix.T, centers.near, out=by_rows)
    by_rows.addcmul_(chunk.rows, by_distance.sum(dim=0).unsqueeze(1), value=2).add_(pull)
    by_rows.addr_(by_dot.sum(dim=0), centers.origin)
    by_centers.addmm_(mix, chunk.rows).addr_(by_dot.sum(dim=1), centers.origin)
    by_centers.addcmul_(centers.near, by_distance.sum(dim=1, keepdim=True), value=2)
    by_centers.sub_(class_sums(pull, chunk.own.squeeze(0), len(by_centers)))
