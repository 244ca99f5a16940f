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

from simo_lightning.functional.frame import class_axes
from simo_lightning.functional.moments import class_sums
from simo_lightning.functional.simo import Batch, Exchange

# Entries of a (C, R) matrix: 256 KB in float32.
_CHUNK_ENTRIES = 2**16


def centroid_terms(
    batch: Batch, exchange: Exchange, label_smoothing: float = 0.0, frame: float = 0.0
) -> dict[str, Tensor]:
    """One ratio per row and class centre: its own class similar, every other class dissimilar.

    The centre of a class is ``(1 - frame) * mean + frame * axis``, with the class's axis of
    :func:`~simo_lightning.functional.frame.class_axes`.

    Args:
        batch: The labelled batch; the means hold the row itself and carry gradient.
        exchange: Form, eps and leaning.
        label_smoothing: For the softmax form, share of the target spread evenly over all classes, in 0..1.
        frame: Share of the axis in the centre, in 0..1. Above 0 a class of one row has a similar side too.

    Returns:
        ratio and log: ``similar`` (mean over the rows of classes of two rows or more) and ``dissimilar`` (mean over
        rows and other classes). softmax: ``softmax``, the cross-entropy of the rows of classes of two rows or more
        over all classes, with logits log(eps + o) - log(eps + d).

    Source:
        Ours; the softmax form is the multi-class likelihood whose two-class case is the log form's. The frame is ours
        too: classes that coincide are a saddle of the loss, and the axes lead out of it.
    """
    rows, classes = len(batch.labels), len(batch.counts)
    similar, pulled = None, rows
    if not frame and int(batch.counts.min()) < 2:
        similar = batch.counts > 1  # (C,) whether a row has something to be similar to
        pulled = int(batch.counts[similar].sum())
    if exchange.form == "softmax":
        if pulled == 0:
            return {"softmax": batch.nothing()}
        (total,) = _sums(batch, similar, frame, partial(_softmax, exchange, label_smoothing), terms=1)
        return {"softmax": total / pulled}
    pull, push = _sums(batch, similar, frame, partial(_pull_and_push, exchange), terms=2)
    return {"similar": pull / max(pulled, 1), "dissimilar": push / max(rows * (classes - 1), 1)}


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


class _Sums(torch.autograd.Function):
    """The judge's terms, each summed over all rows; the gradient is taken on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        centers: Tensor,
        labels: Tensor,
        similar: Tensor | None,
        judge: _Judge,
        terms: int,
        need: bool,
    ) -> tuple[Tensor, ...]:
        totals = [rows.new_zeros(()) for _ in range(terms)]
        by_rows = [torch.empty_like(rows) for _ in range(terms if need else 0)]
        by_centers = [torch.zeros_like(centers) for _ in by_rows]
        origin = centers.mean(dim=0)
        near, squares = centers - origin, (centers - origin).square().sum(dim=1, keepdim=True)
        pulled = None if similar is None else similar.to(rows.dtype)
        length = max(1, _CHUNK_ENTRIES // len(centers))
        for first in range(0, len(rows), length):
            span = slice(first, first + length)
            chunk = _look(rows[span], centers, near, squares, origin, labels[span], pulled)
            for term, verdict in enumerate(judge(chunk)):
                totals[term] += verdict.total
                if need:
                    _turn_back(chunk, verdict, near, origin, by_rows[term][span], by_centers[term])
        ctx.save_for_backward(*by_rows, *by_centers)
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        weighted = [weight * saved for weight, saved in zip(weights * 2, ctx.saved_tensors, strict=True)]
        terms = len(weights)
        by_rows, by_centers = weighted[:terms], weighted[terms:]
        return sum(by_rows[1:], by_rows[0]), sum(by_centers[1:], by_centers[0]), None, None, None, None, None


def _sums(batch: Batch, similar: Tensor | None, frame: float, judge: _Judge, terms: int) -> tuple[Tensor, ...]:
    rows, centers = batch.embeddings, batch.means
    if frame:
        centers = centers.lerp(class_axes(batch.classes, rows.shape[1], centers.dtype), frame)
    need = torch.is_grad_enabled() and rows.requires_grad
    totals: tuple[Tensor, ...] = _Sums.apply(rows, centers, batch.labels, similar, judge, terms, need)
    return totals


def _look(
    rows: Tensor,
    centers: Tensor,
    near_centers: Tensor,
    squares: Tensor,
    origin: Tensor,
    labels: Tensor,
    pulled: Tensor | None,
) -> _Chunk:
    """Distances to other centres by one matrix product, less the origin first so that its distance costs no digits; to
    the own centre from the difference, exact for tight classes.
    """
    own, gap, near = labels.unsqueeze(0), rows - centers[labels], rows - origin
    distance = torch.addmm(near.square().sum(dim=1), near_centers, near.T, alpha=-2).add_(squares).clamp_(min=0)
    distance.scatter_(0, own, gap.square().sum(dim=1).unsqueeze(0))
    return _Chunk(distance, centers @ rows.T, own, None if pulled is None else pulled[labels], near, gap)


def _turn_back(
    chunk: _Chunk, verdict: _Verdict, centers: Tensor, origin: Tensor, by_rows: Tensor, by_centers: Tensor
) -> None:
    """Write the chunk's gradient by its rows, and add its gradient by the centres; both are less the origin here."""
    _, by_distance, by_dot = verdict
    pull = chunk.gap * (2 * by_distance.gather(0, chunk.own).squeeze(0)).unsqueeze(1)  # (R, D)
    by_distance.scatter_(0, chunk.own, torch.zeros_like(by_distance[:1]))
    mix = by_dot.sub(by_distance, alpha=2)  # (C, R): the products of d and of o with the same vectors
    torch.mm(mix.T, centers, out=by_rows)
    by_rows.addcmul_(chunk.rows, by_distance.sum(dim=0).unsqueeze(1), value=2).add_(pull)
    by_rows.addr_(by_dot.sum(dim=0), origin)
    by_centers.addmm_(mix, chunk.rows).addr_(by_dot.sum(dim=1), origin)
    by_centers.addcmul_(centers, by_distance.sum(dim=1, keepdim=True), value=2)
    by_centers.sub_(class_sums(pull, chunk.own.squeeze(0), len(by_centers)))
