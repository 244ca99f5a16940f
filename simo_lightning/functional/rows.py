"""Rows divided by their length, and the means of their classes, with one pass over the rows there and one back.

Shapes: N rows, D dimensions, C classes, R rows of a chunk. On a CPU the rows go by in chunks that stay in a core's
cache from the first operation to the last; elsewhere they are one chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simo_lightning.functional.moments import class_sums

# As torch.nn.functional.normalize: a row shorter than this is divided by it instead.
_SHORTEST = 1e-12
# Entries of a chunk (R, D), 512 KB in float32, and the fewest rows of one: what a chunk costs beside its rows, such as
# adding to the gradient of all centres (C, D), is shared by them.
_CHUNK_ENTRIES = 2**17
_CHUNK_ROWS = 256


def unit_rows(rows: Tensor, index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its Euclidean length, and the mean of each class of them.

    Args:
        rows: ``(N, D)``.
        index: Class of each row, ``(N,)``, in 0..C-1.
        counts: Rows of each class, ``(C,)``, all >= 1.

    Returns:
        ``(N, D)`` of length 1, where a row of zeros stays as it is, and the means ``(C, D)``. The gradient cannot be
        differentiated again.

    Example:
        >>> unit, means = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0, 0]), torch.tensor([2]))
        >>> unit.tolist(), means.tolist()
        ([[0.6000000238418579, 0.800000011920929], [0.0, 0.0]], [[0.30000001192092896, 0.4000000059604645]])
    """
    unit, means = _UnitRows.apply(rows, index, counts)
    return unit, means


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        unit = torch.empty_like(rows)
        lengths, means = lengths_and_means(rows, index, counts, unit)
        ctx.save_for_backward(unit, lengths, index, counts)
        return unit, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_unit: Tensor, by_means: Tensor) -> tuple[Tensor, None, None]:
        unit, lengths, index, counts = ctx.saved_tensors
        shares, by_rows = by_means / counts.unsqueeze(1), torch.empty_like(unit)  # (C, D): of a mean in each row of it
        for span in spans(unit):
            gradient = torch.add(by_unit[span], shares.index_select(0, index[span]), out=by_rows[span])
            before_lengths(gradient, unit[span], lengths[span])
        return by_rows, None, None


def lengths_and_means(rows: Tensor, index: Tensor, counts: Tensor, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lengths ``(N, 1)`` of the rows, none under 1e-12, and the class means ``(C, D)`` of the rows over their lengths.

    Args:
        rows: ``(N, D)``.
        index: ``(N,)``.
        counts: ``(C,)``.
        unit: ``(N, D)``, where the rows over their lengths are written; None: nowhere.

    Returns:
        The two.
    """
    lengths, sums = rows.new_empty(len(rows), 1), rows.new_zeros(len(counts), rows.shape[1])
    for span in spans(rows):
        torch.linalg.vector_norm(rows[span], dim=1, keepdim=True, out=lengths[span]).clamp_(min=_SHORTEST)
        chunk = torch.div(rows[span], lengths[span], out=None if unit is None else unit[span])
        sums += class_sums(chunk, index[span], len(counts))
    return lengths, sums.div_(counts.unsqueeze(1))


def before_lengths(gradient: Tensor, unit: Tensor, lengths: Tensor) -> None:
    """Turn a gradient by unit rows into one by the rows themselves, in place.

    Args:
        gradient: ``(R, D)``.
        unit: The unit rows, ``(R, D)``.
        lengths: What the rows were divided by, ``(R, 1)``.
    """
    along = (gradient * unit).sum(dim=1, keepdim=True)
    gradient.addcmul_(unit, along, value=-1).div_(lengths)


def spans(rows: Tensor, width: int = 0) -> Iterator[slice]:
    """Chunks of rows: of a size for the cache on a CPU, all of them elsewhere.

    Args:
        rows: ``(N, D)``.
        width: Entries of a row of the widest matrix beside them, such as C.

    Yields:
        Slices that cover ``0..N - 1`` in order.
    """
    length = len(rows) if rows.device.type != "cpu" else _CHUNK_ENTRIES // max(rows.shape[1], width, 1)
    length = max(length, _CHUNK_ROWS)
    for first in range(0, len(rows), length):
        yield slice(first, first + length)
