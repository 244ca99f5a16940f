"""Nearest neighbours by cosine among embeddings that need not fit in memory."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simo_lightning.embeddings_file import EmbeddingsFile
from simo_lightning.extras import import_extra
from simo_lightning.functional.knn import check_finite
from simo_lightning.functional.neighbors import unit_vectors

Backend = Literal["auto", "faiss", "torch"]
Approximate = Literal["hnsw", "ivf"]
_CHUNK = 2**16  # embeddings of an array that are compared at a time
_QUERIES = 64  # that are compared at a time
_EXTRA = 16  # candidates beyond k, among which are those that rounding may have put behind
_TRAINING = 64  # embeddings per cell of an inverted file by which its centres are found


class Neighbors(NamedTuple):
    """Nearest neighbours of M queries.

    Attributes:
        cosines: float64 ``(M, k)``, the largest first.
        rows: Row of each in the index, int64 ``(M, k)``. An approximate search that found fewer has -1 at the end, with
            the cosine -inf.
    """

    cosines: np.ndarray
    rows: np.ndarray


class NearestNeighbors:
    """Finds the embeddings with the largest cosine with a query.

    Without ``approximate`` every embedding is compared, in chunks: memory does not grow with their number. The result
    is that of a comparison in float64, equal cosines in the order of the rows, whether faiss is installed or not:
    float32 finds all candidates that its rounding leaves in question, and these are compared in float64. An embedding
    of zeros has cosine 0 with everything.

    Args:
        index: Embeddings ``(N, D)``, or a file of them.
        backend: faiss, torch, or auto: faiss if it is installed.
        approximate: hnsw: graph of neighbours; ivf: inverted file, of whose 4 sqrt(N) cells a sixteenth is searched.
            Both hold all embeddings in memory and are of use for thousands of queries. None: exact.

    Raises:
        ModuleNotFoundError: If faiss is asked for and not installed.
        ValueError: If the index is empty, not ``(N, D)`` or not finite, or faiss is needed and backend is torch.

    Example:
        >>> index = NearestNeighbors(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]), backend="torch")
        >>> index.search(np.array([[1.0, 0.1]]), k=2).rows.tolist()
        [[0, 2]]

    Source:
        faiss: Douze et al., arXiv 2401.08281; the graph: Malkov & Yashunin, arXiv 1603.09320.
    """

    def __init__(
        self,
        index: EmbeddingsFile | np.ndarray | Tensor,
        backend: Backend = "auto",
        approximate: Approximate | None = None,
    ) -> None:
        if backend not in ("auto", "faiss", "torch"):
            raise ValueError(f"backend must be 'auto', 'faiss' or 'torch', got {backend!r}")
        if approximate not in (None, "hnsw", "ivf"):
            raise ValueError(f"approximate must be 'hnsw', 'ivf' or None, got {approximate!r}")
        if approximate is not None and backend == "torch":
            raise ValueError("backend must be faiss for an approximate search, got 'torch'")
        if not isinstance(index, EmbeddingsFile):
            index = np.asarray(index)
            if index.ndim != 2:
                raise ValueError(f"index must have shape (N, D), got {index.shape}")
        self.index = index
        self.rows, self.dim = index.shape if isinstance(index, np.ndarray) else (index.rows, index.dim)
        if self.rows == 0:
            raise ValueError("index must hold at least 1 embedding, got none")
        self.faiss: Any = None
        if backend == "faiss" or approximate is not None:
            self.faiss = import_extra("faiss")
        elif backend == "auto":
            try:
                self.faiss = import_extra("faiss")
            except ModuleNotFoundError:
                self.faiss = None
        self.approximate: Any = None if approximate is None else self._build(approximate)

    def search(self, queries: np.ndarray | Tensor, k: int = 5) -> Neighbors:
        """The nearest neighbours of each query.

        Args:
            queries: ``(M, D)``.
            k: Neighbours of each, at most N.

        Returns:
            Their cosines and rows.

        Raises:
            ValueError: If the shape is wrong, a value is not finite, or k is not in 1..N.
        """
        asked = torch.as_tensor(queries)
        if asked.ndim != 2 or asked.shape[1] != self.dim:
            raise ValueError(f"queries must have shape (M, {self.dim}), got {tuple(asked.shape)}")
        if not 1 <= k <= self.rows:
            raise ValueError(f"k must be in 1..{self.rows}, the number of embeddings, got {k}")
        asked = asked.detach().cpu().double()
        check_finite(asked, "queries")
        if self.approximate is not None:
            return self._search_approximately(unit_vectors(asked), k)
        return self._search(unit_vectors(asked), k)

    def recall(self, k: int = 5, sample: int = 200) -> float:
        """Share of the k nearest neighbours that the approximate search finds.

        Args:
            k: Neighbours.
            sample: Queries, embeddings of the index at equal distances in the order of its rows.

        Returns:
            In [0, 1]; a neighbour with the same cosine as the k-th one counts as found.
        """
        rows = np.unique(np.linspace(0, self.rows - 1, min(sample, self.rows)).astype(np.int64))
        queries = self._take(rows)
        exact = self._search(unit_vectors(torch.from_numpy(queries).double()), k).cosines
        found = self.search(queries, k).cosines
        return float((found >= exact[:, -1:] - self._tolerance()).mean())

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and embeddings of each chunk."""
        if isinstance(self.index, np.ndarray):
            parts: Iterator[tuple[int, np.ndarray]] = (
                (start, self.index[start : start + _CHUNK]) for start in range(0, self.rows, _CHUNK)
            )
        else:
            parts = self.index.chunks()
        for start, embeddings in parts:
            chunk = torch.from_numpy(np.array(embeddings))
            check_finite(chunk, f"embeddings of the index from row {start}")
            yield start, chunk

    def _tolerance(self) -> float:
        """Twice the bound on the error of a product of two vectors of length 1 in float32."""
        return 2 * (self.dim + 8) * 2.0**-24

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        """Exact search for float64 queries of length 1."""
        best = [(np.empty(0), np.empty(0, dtype=np.int64)) for _ in queries]
        for start, chunk in self._chunks():
            unit = unit_vectors(chunk.double() if chunk.dtype == torch.float64 else chunk.float()).float()
            for first in range(0, len(queries), _QUERIES):
                block = queries[first : first + _QUERIES]
                for number, rows in enumerate(self._candidates(block.float(), unit, min(k, len(unit))), first):
                    cosines = (unit_vectors(chunk[rows].double()) * queries[number]).sum(dim=1).numpy()
                    cosines = np.concatenate((best[number][0], cosines))
                    places = np.concatenate((best[number][1], rows.numpy() + start))
                    order = np.lexsort((places, -cosines))[:k]
                    best[number] = cosines[order], places[order]
        return Neighbors(
            np.stack([cosines for cosines, _ in best]) if best else np.empty((0, k)),
            np.stack([rows for _, rows in best]) if best else np.empty((0, k), dtype=np.int64),
        )

    def _candidates(self, queries: Tensor, unit: Tensor, k: int) -> Iterator[Tensor]:
        """Rows of a chunk that may be among the k nearest of each query, in ascending order."""
        if self.faiss is not None:
            count = min(k + _EXTRA, len(unit))
            cosines, rows = self.faiss.knn(queries.numpy(), unit.numpy(), count, metric=self.faiss.METRIC_INNER_PRODUCT)
            limits = cosines[:, k - 1] - self._tolerance()
            for number, limit in enumerate(limits):
                if count == len(unit) or cosines[number, -1] < limit:
                    yield torch.from_numpy(np.sort(rows[number][cosines[number] >= limit]))
                else:  # many are equal
                    yield _above(unit @ queries[number], k, self._tolerance())
        else:
            for cosines in queries @ unit.mT:
                yield _above(cosines, k, self._tolerance())

    def _take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of some rows, in ascending order."""
        return torch.cat([chunk[rows[_inside(rows, start, chunk)] - start] for start, chunk in self._chunks()]).numpy()

    def _build(self, kind: Approximate) -> Any:
        faiss, metric = self.faiss, self.faiss.METRIC_INNER_PRODUCT
        if kind == "hnsw":
            built = faiss.IndexHNSWFlat(self.dim, 32, metric)
        else:
            cells = max(1, min(int(4 * self.rows**0.5), self.rows // 39))  # faiss warns of fewer than 39 per cell
            built = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, cells, metric)
            built.nprobe = max(1, cells // 16)
            sample = np.unique(np.linspace(0, self.rows - 1, min(self.rows, _TRAINING * cells)).astype(np.int64))
            built.train(unit_vectors(torch.from_numpy(self._take(sample)).float()).numpy())
        for _, chunk in self._chunks():
            built.add(unit_vectors(chunk.float()).numpy())
        return built

    def _search_approximately(self, queries: Tensor, k: int) -> Neighbors:
        if hasattr(self.approximate, "hnsw"):
            self.approximate.hnsw.efSearch = max(64, 2 * k)
        cosines, rows = self.approximate.search(queries.float().numpy(), k)
        return Neighbors(np.where(rows >= 0, cosines.astype(np.float64), -np.inf), rows)


def _above(cosines: Tensor, k: int, tolerance: float) -> Tensor:
    """Positions of the values that are at most ``tolerance`` below the k-th largest."""
    return (cosines >= cosines.topk(k).values[-1] - tolerance).nonzero().squeeze(1)


def _inside(rows: np.ndarray, start: int, chunk: Tensor) -> np.ndarray:
    return (rows >= start) & (rows < start + len(chunk))
