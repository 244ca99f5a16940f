"""Retrieval scores as torchmetrics metrics: one search, in which every process keeps its own embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from simo_lightning.distributed import gather_rows, largest_over_ranks, world_size
from simo_lightning.functional.knn import check_finite
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.retrieval import Average, RetrievalScores, average_scores, retrieval_scores
from simo_lightning.metrics.sharded import retrieval_scores_over_ranks


class RetrievalMetric(Metric):
    """Base of the retrieval metrics: keeps embeddings and labels of this process, in float32.

    Without a gallery every image is a query, and all others are its gallery (leave-one-out). Batches passed with
    ``gallery=True`` are searched and are no queries themselves. The state grows with the number of images. On several
    processes ``compute`` searches the embeddings where they are (``simo_lightning.metrics.sharded``), and every
    process must call it; ``sync`` gathers them all.

    Args:
        average: "micro": mean over queries; "macro": mean over classes of the mean over their queries; "none": the
            mean of each class.
        num_classes: C, for "none"; None: the largest label plus one.
        chunk_bytes: Bytes of similarities that are compared at a time; None: 8 MiB on a CPU, 256 MiB on a GPU.
        options: Keyword arguments of torchmetrics.Metric.

    Raises:
        ValueError: If the average is unknown or a number is below 1.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    embeddings: list[Tensor]
    labels: list[Tensor]
    gallery: list[Tensor]
    gallery_labels: list[Tensor]

    _ks: tuple[int, ...] = (1,)
    _is_spread = False  # whether compute searches all processes

    def __init__(
        self,
        average: Average = "micro",
        num_classes: int | None = None,
        chunk_bytes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        average_scores(torch.zeros(0), torch.zeros(0, dtype=torch.long), average)  # raises for an unknown average
        for name, value in (("num_classes", num_classes), ("chunk_bytes", chunk_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.average: Average = average
        self.num_classes = num_classes
        self.chunk_bytes = chunk_bytes
        for name in ("embeddings", "labels", "gallery", "gallery_labels"):
            self.add_state(name, [], dist_reduce_fx=None)

    def update(self, embeddings: Tensor, labels: Tensor, gallery: bool = False) -> None:
        """Add a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Class of each embedding, integers ``(N,)``.
            gallery: Whether the batch belongs to the gallery.

        Raises:
            ValueError: If a type or shape is wrong.
        """
        check_embeddings(embeddings, labels)
        rows, row_labels = (self.gallery, self.gallery_labels) if gallery else (self.embeddings, self.labels)
        dim = max((part.shape[1] for part in rows), default=0) or embeddings.shape[1]  # 0 after a sync without images
        if embeddings.shape[1] != dim:
            raise ValueError(f"embeddings must have shape (N, {dim}), got {tuple(embeddings.shape)}")
        rows.append(embeddings.detach().float())
        row_labels.append(labels.long())

    def sync(self, *arguments: Any, **options: Any) -> None:
        """Gather the states of all processes; one without images takes part with an empty tensor."""
        if world_size() > 1 and not self._is_synced:  # each tensor of a list is gathered: every process needs one
            for rows, labels in ((self.embeddings, self.labels), (self.gallery, self.gallery_labels)):
                rows[:] = [torch.cat(rows) if rows else torch.zeros(0, 0, device=self.device)]
                labels[:] = [torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long, device=self.device)]
        super().sync(*arguments, **options)

    @contextmanager
    def sync_context(self, *arguments: Any, should_sync: bool = True, **options: Any) -> Iterator[None]:
        """Let compute search the embeddings of all processes, instead of gathering them."""
        self._is_spread = should_sync and world_size() > 1 and not self._is_synced
        try:
            yield
        finally:
            self._is_spread = False

    def compute(self) -> Tensor:
        """The metric over all images seen, of all processes; ``nan`` where no query has a relevant image."""
        if self._is_spread:
            scores, labels = self._spread_scores()
        else:
            embeddings, labels = self._joined(self.embeddings, self.labels)
            gallery, gallery_labels = self._joined(self.gallery, self.gallery_labels)
            options: Any = {"gallery": gallery, "gallery_labels": gallery_labels} if len(gallery) else {}
            options |= {"ks": self._ks, "chunk_bytes": self.chunk_bytes}
            scores = self._score(retrieval_scores(embeddings, labels, **options))
        return average_scores(scores, labels, self.average, self.num_classes)

    def _spread_scores(self) -> tuple[Tensor, Tensor]:
        """Scores and labels of the queries of all processes."""
        dim = largest_over_ranks(max((part.shape[1] for part in self.embeddings), default=1), self.device)
        embeddings, labels = self._joined(self.embeddings, self.labels, dim)
        gallery, gallery_labels = self._joined(self.gallery, self.gallery_labels, dim)
        own = None
        if not largest_over_ranks(len(gallery), self.device):
            gallery, gallery_labels, own = embeddings, labels, torch.arange(len(labels), device=self.device)
        check_finite(embeddings, "embeddings")
        check_finite(gallery, "gallery")
        where = (gallery, gallery_labels, self._ks, own, self.chunk_bytes)
        scores = self._score(retrieval_scores_over_ranks(embeddings, labels, *where))
        return gather_rows(scores), gather_rows(labels)

    def _joined(self, rows: list[Tensor], labels: list[Tensor], dim: int = 1) -> tuple[Tensor, Tensor]:
        """All rows ``(N, D)`` and labels; ``(0, dim)`` where there are none."""
        filled = [part for part in rows if len(part)] or [torch.zeros(0, dim, device=self.device)]
        return torch.cat(filled), torch.cat([torch.zeros(0, dtype=torch.long, device=self.device), *labels])

    def _score(self, scores: RetrievalScores) -> Tensor:
        raise NotImplementedError


class RecallAtK(RetrievalMetric):
    """Share of the queries with a relevant image among their k nearest, by :func:`.functional.recall_at_k`.

    Args:
        k: Neighbours, at least 1.
        average: "micro": over queries; "macro": over classes of the mean over their queries; "none": of each class.
        num_classes: C, for "none"; None: the largest label plus one.
        chunk_bytes: Bytes of similarities that are compared at a time; None: 8 MiB on a CPU, 256 MiB on a GPU.
        options: Keyword arguments of torchmetrics.Metric.

    Raises:
        ValueError: If the average is unknown or a number is below 1.

    Example:
        >>> metric = RecallAtK(k=1)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.7, 0.3], [0.0, 1.0]]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    def __init__(
        self,
        k: int = 1,
        average: Average = "micro",
        num_classes: int | None = None,
        chunk_bytes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(average, num_classes, chunk_bytes, **options)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self._ks = (k,)

    def _score(self, scores: RetrievalScores) -> Tensor:
        return scores.recall[:, 0]


class RPrecision(RetrievalMetric):
    """Mean share of relevant images among the R nearest, by :func:`.functional.r_precision`.

    Args:
        average: "micro": over queries; "macro": over classes of the mean over their queries; "none": of each class.
        num_classes: C, for "none"; None: the largest label plus one.
        chunk_bytes: Bytes of similarities that are compared at a time; None: 8 MiB on a CPU, 256 MiB on a GPU.
        options: Keyword arguments of torchmetrics.Metric.

    Raises:
        ValueError: If the average is unknown or a number is below 1.

    Example:
        >>> metric = RPrecision(average="none")
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.7, 0.3], [0.0, 1.0]]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor([1.0000, 0.5000])
    """

    def _score(self, scores: RetrievalScores) -> Tensor:
        return scores.r_precision


class MAPAtR(RetrievalMetric):
    """Mean average precision at R, by :func:`.functional.map_at_r`.

    Args:
        average: "micro": over queries; "macro": over classes of the mean over their queries; "none": of each class.
        num_classes: C, for "none"; None: the largest label plus one.
        chunk_bytes: Bytes of similarities that are compared at a time; None: 8 MiB on a CPU, 256 MiB on a GPU.
        options: Keyword arguments of torchmetrics.Metric.

    Raises:
        ValueError: If the average is unknown or a number is below 1.

    Example:
        >>> metric = MAPAtR()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([0, 1]), gallery=True)
        >>> metric.compute()
        tensor(1.)
    """

    def _score(self, scores: RetrievalScores) -> Tensor:
        return scores.average_precision
