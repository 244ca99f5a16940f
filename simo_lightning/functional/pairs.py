"""The pair level of SimO: one ratio per pair of rows, N^2 of them, in chunks so that memory stays O(N).

Each chunk's gradient is taken at once, in the forward pass, and only its sum over chunks is kept: so the backward pass
costs one multiplication and nothing is computed twice. The gradient itself cannot be differentiated again.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simo_lightning.functional.moments import class_blocks
from simo_lightning.functional.simo import Batch, Exchange

# Pairs in one chunk: a matrix of 4 MB in float32, which stays in a core's cache.
_CHUNK_PAIRS = 2**20


def pair_terms(batch: Batch, exchange: Exchange, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """One ratio per pair of rows.

    Args:
        batch: The labelled batch.
        exchange: Form, eps and leaning.
        label_smoothing: For the softmax form, share of the target spread evenly over all other rows, in 0..1.

    Returns:
        ratio and log: ``similar`` (mean over the pairs of one class) and ``dissimilar`` (mean over the pairs of two
        classes), scalars >= 0. softmax: ``softmax``, the mean over the rows that have a partner of the mean over its
        partners of the cross-entropy over all other rows, with logits log(eps + o) - log(eps + d). Cost O(N^2 D).

    Source:
        Ours; the softmax form is SupCon (arXiv 2004.11362, L_out) with SimO's similarity.
    """
    if exchange.form == "softmax":
        return {"softmax": _softmax(batch, exchange, label_smoothing)}
    rows, within = len(batch.labels), int((batch.counts * (batch.counts - 1)).sum()) // 2
    across = rows * (rows - 1) // 2 - within
    similar = partial(_similar_pieces, index=batch.labels, counts=batch.counts, exchange=exchange)
    order = batch.labels.argsort(stable=True)
    dissimilar = partial(_dissimilar_pieces, index=batch.labels[order], exchange=exchange)
    return {
        "similar": _sum_of_pieces(batch.embeddings, similar) / within if within else batch.nothing(),
        "dissimilar": _sum_of_pieces(batch.embeddings[order], dissimilar) / across if across else batch.nothing(),
    }


Pieces = Callable[[Tensor], Iterator[Callable[[Tensor], Tensor]]]


class _SumOfPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pieces: Pieces, need_gradient: bool) -> Tensor:
        total, gradient = rows.new_zeros(()), torch.zeros_like(rows)
        for piece in pieces(rows):
            if not need_gradient:
                total += piece(rows)
                continue
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                value = piece(leaf)
                gradient += torch.autograd.grad(value, leaf)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return output_gradient * gradient, None, None


def _sum_of_pieces(rows: Tensor, pieces: Pieces) -> Tensor:
    """Sum of scalar functions of `rows`, never more than one of them in memory."""
    total: Tensor = _SumOfPieces.apply(rows, pieces, torch.is_grad_enabled() and rows.requires_grad)
    return total


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (..., R, K); the caller centres both."""
    squares = rows.square().sum(dim=-1).unsqueeze(-1) + columns.square().sum(dim=-1).unsqueeze(-2)
    return (squares - 2 * rows @ columns.mT).clamp(min=0)


def _similar_pieces(
    rows: Tensor, index: Tensor, counts: Tensor, exchange: Exchange
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Pairs i < j of one class, by chunks of (classes, rows)."""
    number = torch.arange(len(rows), device=rows.device).double().unsqueeze(1)
    for _, places in class_blocks(number + 1, index, counts):
        places = places.squeeze(2).long() - 1  # (G, n) row numbers, -1 where padded
        length = places.shape[1]
        classes = max(1, _CHUNK_PAIRS // length**2)
        height = max(1, min(length, _CHUNK_PAIRS // (classes * length)))
        for first in range(0, len(places), classes):
            for top in range(0, length, height):
                yield partial(
                    _similar_piece, places=places[first : first + classes], top=top, height=height, exchange=exchange
                )


def _similar_piece(rows: Tensor, places: Tensor, top: int, height: int, exchange: Exchange) -> Tensor:
    columns = places[:, top:]  # (G, K): only pairs with i <= j
    block = rows[columns.clamp(min=0)]  # (G, K, D)
    # Centred on a row of the class: the digits of a tight class's distances are kept.
    centred = block - rows[places[:, :1]].detach()
    height = min(height, columns.shape[1])
    distance = _distances(centred[:, :height], centred)  # (G, R, K)
    alignment = (block[:, :height] @ block.mT).square()
    upper = torch.ones(distance.shape[1:], dtype=torch.bool, device=rows.device).triu(1)
    real = (columns[:, :height, None] >= 0) & (columns[:, None, :] >= 0) & upper
    return exchange.pull(distance, alignment).masked_fill(~real, 0).sum()


def _dissimilar_pieces(rows: Tensor, index: Tensor, exchange: Exchange) -> Iterator[Callable[[Tensor], Tensor]]:
    """Pairs i < j of two classes; the rows are sorted by class, so a chunk needs only the rows from its own on."""
    top = 0
    while top < len(rows):
        bottom = min(len(rows), top + max(1, _CHUNK_PAIRS // (len(rows) - top)))
        yield partial(_dissimilar_piece, index=index, top=top, bottom=bottom, exchange=exchange)
        top = bottom


def _dissimilar_piece(rows: Tensor, index: Tensor, top: int, bottom: int, exchange: Exchange) -> Tensor:
    columns = rows[top:]  # (K, D)
    centred = columns - rows.detach().mean(dim=0)
    height = bottom - top
    distance = _distances(centred[:height], centred)  # (R, K)
    alignment = (columns[:height] @ columns.T).square()
    # Sorted by class: this keeps each pair of two classes once, and none of one class.
    across = index[top:bottom, None] < index[None, top:]
    return exchange.push(distance, alignment).masked_fill(~across, 0).sum()


def _softmax(batch: Batch, exchange: Exchange, label_smoothing: float) -> Tensor:
    partners = batch.counts[batch.labels] - 1  # (N,)
    anchors = int((partners > 0).sum())
    if anchors == 0:
        return batch.nothing()

    def pieces(rows: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        height = max(1, _CHUNK_PAIRS // len(rows))
        for top in range(0, len(rows), height):
            yield partial(
                _softmax_piece,
                batch=batch,
                span=slice(top, min(len(rows), top + height)),
                exchange=exchange,
                label_smoothing=label_smoothing,
            )

    return _sum_of_pieces(batch.embeddings, pieces) / anchors


def _softmax_piece(rows: Tensor, batch: Batch, span: slice, exchange: Exchange, label_smoothing: float) -> Tensor:
    index, columns = batch.labels, torch.arange(len(rows), device=rows.device)
    self_pair = columns[span, None] == columns  # (R, N)
    same = (index[span, None] == index) & ~self_pair
    # Any origin gives the same distance; its own mean keeps the digits of a tight class, the mean of all the rest.
    means = batch.means.detach()
    near, far = rows - means[index], rows - means.mean(dim=0)
    distance = torch.where(same, _distances(near[span], near), _distances(far[span], far))
    logits = exchange.logit(distance, (rows[span] @ rows.T).square())
    log_probability = logits - logits.masked_fill(self_pair, -torch.inf).logsumexp(dim=1, keepdim=True)
    partners = same.sum(dim=1)
    own = log_probability.masked_fill(~same, 0).sum(dim=1) / partners.clamp(min=1)
    every = log_probability.masked_fill(self_pair, 0).sum(dim=1) / (len(rows) - 1)
    losses = -((1 - label_smoothing) * own + label_smoothing * every)
    return losses.masked_fill(partners == 0, 0).sum()
