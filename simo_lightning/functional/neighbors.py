"""The largest cosines of queries with a bank of embeddings, exact and in bounded memory: what kNN and retrieval share.

Shapes: M queries, N embeddings of the bank, D dimensions, k neighbours.

A neighbour is one integer, its key: ``similarity * ties + tie``. The similarity is the float64 cosine in multiples of
2**-22 (2.4e-7), to which it is rounded. The tie, in 0..ties - 1, orders equally similar embeddings by what the caller
wants to know of them, such as their class. Two neighbours with one key are interchangeable, so the k largest keys
depend neither on the order of the bank, nor on chunks, nor on how the bank is split over processes: the keys of parts
of a bank are merged by keeping the k largest of all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

# Similarities are multiples of 1 / GRID.
GRID = 2**22

# Embeddings of the bank whose largest similarity is looked at first.
_GROUP = 32

# Queries that are compared at a time, if memory allows: a product of 512 columns has the full speed of a CPU.
_QUERIES = 512

# Pairs of a query and an embedding that are compared in float64 at a time.
_PAIRS = 2**13

# Tie of a query's row and a row of the bank, which broadcast against each other.
Tie = Callable[[Tensor, Tensor], Tensor]


def default_chunk_bytes(device: torch.device) -> int:
    """Bytes of similarities that are compared at a time: 8 MiB stay in a CPU's cache, 256 MiB fill a GPU."""
    return 2**23 if device.type == "cpu" else 2**28


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    """Raise unless the number of bytes is None or at least 1."""
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")


def unit_vectors(embeddings: Tensor) -> Tensor:
    """Embeddings ``(N, D)`` divided by their norms; zeros stay zeros, and no square overflows or vanishes."""
    largest = embeddings.abs().amax(dim=1, keepdim=True)
    return normalize(embeddings / torch.where(largest > 0, largest, 1), dim=1)


def key_dtype(ties: int) -> torch.dtype:
    """int32 where it holds every key, else int64."""
    return torch.int32 if (GRID + 1) * ties < 2**31 else torch.int64


def no_key(ties: int) -> int:
    """The key that stands for no neighbour, below all others."""
    return torch.iinfo(key_dtype(ties)).min


def similarities_of(keys: Tensor, ties: int) -> Tensor:
    """Cosines of keys, float64 (float32 on MPS); below -1 where there is no neighbour."""
    return keys.div(ties, rounding_mode="floor").to(_exact(keys.device)) / GRID


def ties_of(keys: Tensor, ties: int) -> Tensor:
    """Ties of keys, int64."""
    return keys.remainder(ties).long()


def top_keys(keys: Tensor, k: int) -> Tensor:
    """The k largest of each row, ``(M, k)``, the largest first; fewer columns stay as many."""
    if keys.device.type != "cpu":
        return keys.topk(min(k, keys.shape[1]), dim=1).values
    found = keys.numpy()  # torch.topk of thousands of a row takes ten times as long
    if k < found.shape[1]:
        found = np.partition(found, found.shape[1] - k, axis=1)[:, -k:]
    return torch.from_numpy(np.sort(found, axis=1)[:, ::-1].copy())


@torch.no_grad()
def largest_keys(
    queries: Tensor,
    bank: Tensor,
    k: int,
    tie: Tie,
    ties: int,
    own: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Keys of the k embeddings of the bank that are most similar to each query.

    A product in float32 finds the embeddings that its rounding leaves in question, and these are compared in float64.
    Where that is a large part of a chunk, because k is or because the embeddings have collapsed, the whole chunk is.
    Time is ``O(M N D)``. Memory in addition to the inputs is at most about
    ``8 * chunk_bytes + 8 M (D + k)``.

    Args:
        queries: Finite floats ``(M, D)``.
        bank: Finite floats ``(N, D)``.
        k: Neighbours, at least 1.
        tie: Maps the row of a query and a row of the bank, int64 tensors that broadcast, to integers in 0..ties - 1.
            Of equally similar embeddings the largest comes first.
        ties: Number of different ties.
        own: Row of the bank that each query is and that is left out, ``(M,)``; -1: none. None: no query is in the bank.
        chunk_bytes: Bytes of float32 similarities that are compared at a time; None: 8 MiB on a CPU, 256 MiB on a GPU.
            Does not change the result.

    Returns:
        ``(M, k)``, int32 or int64 by :func:`key_dtype`, the largest first; :func:`no_key` where the bank has no more.
    """
    found = queries.new_full((len(queries), k), no_key(ties), dtype=key_dtype(ties))
    entries = max(1, (chunk_bytes or default_chunk_bytes(queries.device)) // 4)
    columns = min(_QUERIES, max(1, entries // _GROUP), max(1, len(queries)))
    height = max(_GROUP, entries // columns // _GROUP * _GROUP)
    exact_only = k * _GROUP >= len(bank)  # every group of the bank is in question
    unit = unit_vectors(queries.to(_exact(queries.device)))
    with _full_precision(queries.device):
        for start in range(0, len(bank), height):
            part = _Part(bank[start : start + height], start, tie, ties, own)
            for first in range(0, len(queries), columns):
                block = slice(first, first + columns)
                if exact_only or not part.merge_candidates(unit[block], first, found[block]):
                    part.merge_all(unit[block], first, found[block])
    return found


class _Part:
    """Consecutive rows of the bank, with which blocks of queries are compared."""

    def __init__(self, rows: Tensor, start: int, tie: Tie, ties: int, own: Tensor | None) -> None:
        self.rows, self.start, self.tie, self.ties, self.own = rows, start, tie, ties, own
        self._unit: Tensor | None = None
        self._exact_unit: Tensor | None = None
        # twice the bound on the error of a float32 product of unit vectors, and the rounding to the grid
        self.tolerance = 2 * (rows.shape[1] + 8) * 2.0**-24 + 1 / GRID

    def merge_candidates(self, asked: Tensor, first: int, best: Tensor) -> bool:
        """Update the keys ``best (m, k)`` of the queries ``asked (m, D)``; False, and nothing, if too many come in
        question.
        """
        if self._unit is None:
            self._unit = unit_vectors(self.rows.to(_at_least_single(self.rows))).float()
        size, groups = len(self.rows), -(-len(self.rows) // _GROUP)
        cosines = asked.new_empty(groups * _GROUP, len(asked), dtype=torch.float32)
        torch.mm(self._unit, asked.float().mT, out=cosines[:size])
        cosines[size:] = -2  # below every cosine
        cosines = cosines.view(groups, _GROUP, len(asked))
        peaks = cosines.amax(dim=1)  # (groups, m)
        limit = (similarities_of(best[:, -1], self.ties) - self.tolerance).float()
        if groups > best.shape[1] and bool((limit < -1).any()):  # the first rows
            # k groups, and one more for the query itself, have a cosine of at least this
            limit = limit.maximum(peaks.topk(best.shape[1] + 1, dim=0).values[-1] - self.tolerance)
        group, query = (peaks >= limit).nonzero().unbind(dim=1)
        if len(group) * 4 * _GROUP > cosines.numel():
            return False
        hit, place = (cosines[group, :, query] >= limit[query].unsqueeze(1)).nonzero().unbind(dim=1)
        query, row = query[hit], group[hit] * _GROUP + place
        if len(row) * 16 > cosines.numel():
            return False
        order = query.argsort(stable=True)
        query, row = query[order], row[order]
        changed, index, counts = query.unique_consecutive(return_inverse=True, return_counts=True)
        if len(changed):
            place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[index]
            more = best.new_full((len(changed), int(counts.max())), no_key(self.ties))
            more[index, place] = self._keys(self._cosines(asked, query, row), query + first, row)
            best[changed] = top_keys(torch.cat((best[changed], more), dim=1), best.shape[1])
        return True

    def _cosines(self, asked: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Cosines of pairs of a query and a row, ``(pairs,)``."""
        pairs = zip(query.split(_PAIRS), row.split(_PAIRS), strict=True)
        return torch.cat([(asked[q] * unit_vectors(self.rows[r].to(asked.dtype))).sum(dim=1) for q, r in pairs])

    def merge_all(self, asked: Tensor, first: int, best: Tensor) -> None:
        """Update the keys ``best (m, k)`` of the queries ``asked (m, D)`` by all rows."""
        if self._exact_unit is None:
            self._exact_unit = unit_vectors(self.rows.to(asked.dtype))
        query = torch.arange(first, first + len(asked), device=asked.device).unsqueeze(1)
        row = torch.arange(len(self.rows), device=asked.device)
        keys = self._keys(asked @ self._exact_unit.mT, query, row)
        best.copy_(top_keys(torch.cat((best, keys), dim=1), best.shape[1]))

    def _keys(self, similarity: Tensor, query: Tensor, row: Tensor) -> Tensor:
        row = row + self.start
        dtype = key_dtype(self.ties)
        keys = similarity.mul_(GRID).round_().to(dtype).mul_(self.ties).add_(self.tie(query, row).to(dtype))
        if self.own is not None:
            keys.masked_fill_(self.own[query] == row, no_key(self.ties))
        return keys


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _at_least_single(embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(embeddings.dtype, torch.float32)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32 without TF32, bfloat16 or autocast, whose errors exceed the tolerance."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
