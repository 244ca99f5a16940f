"""Evaluate the encoder by retrieval during training, also on classes that training has not seen."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from simo_lightning.callbacks.embed import EmbedBatch, embed_loader, own_batches
from simo_lightning.callbacks.evaluation import EvaluationCallback, class_values, described_images
from simo_lightning.data.sources import stratified_subset
from simo_lightning.distributed import gather_rows, rank, world_size
from simo_lightning.functional.moments import compact_labels
from simo_lightning.functional.retrieval import RetrievalScores, average_scores, retrieval_scores


class RetrievalMonitor(EvaluationCallback):
    """Log Recall@k, R-precision and MAP@R as ``val/recall_at_1``, ``val/r_precision``, ``val/map_at_r``.

    The queries are the embeddings that validation and test steps return as ``outputs["embeddings"]`` with
    ``outputs["labels"]``. They are compared by cosine similarity with all other images of the split (leave-one-out), or
    with a gallery. No class needs training images. An image that is the only one of its class, or whose class the
    gallery lacks, is no query.

    Every value is a mean over queries; ``val/recall_at_1_macro`` and so on are means over classes of the mean over
    their queries. One line states how many images and classes the values are over. Every process compares its own
    queries with the images of all processes. Definitions, ties and sources:
    :func:`~simo_lightning.functional.retrieval_scores`.

    Args:
        ks: Values of k of Recall@k.
        max_queries: Largest number of queries, over all processes. Of more, as many are used, the classes in proportion
            and always the same; they are still compared with all images. Time grows with queries times images. None:
            all.
        every_n_epochs: Epochs of training from one evaluation to the next; in between, checkpoints see the last
            values. ``trainer.validate`` and ``trainer.test`` always evaluate.
        gallery: Loader of the images to compare with, whose labels are those of the queries. None: in a test the data
            module's ``gallery_dataloader``, if it has one and that returns a loader; otherwise leave-one-out.
        embed: Maps the module and a batch of the gallery to embeddings ``(N, D)`` and labels ``(N,)``; None: for
            batches ``(images, labels)``, by the module's ``embed`` or else its ``forward``.

    Attributes:
        class_values: Of the last evaluation, by label: the mean of each value over the queries of a class.

    Raises:
        ValueError: If a number is below 1 or there is no k.
    """

    progress_bar = frozenset({"map_at_r"})

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8),
        max_queries: int | None = 20_000,
        every_n_epochs: int = 1,
        gallery: DataLoader | None = None,
        embed: EmbedBatch | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be numbers of at least 1, got {list(ks)}")
        if max_queries is not None and max_queries < 1:
            raise ValueError(f"max_queries must be at least 1, got {max_queries}")
        self.ks = tuple(ks)
        self.max_queries = max_queries
        self.gallery = gallery
        self.embed = embed
        self.class_values: dict[int, dict[str, float]] = {}
        self._batches: list[tuple[Tensor, Tensor]] = []

    @override
    def reset(self, trainer: Trainer) -> None:
        self._batches = []

    @override
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        self._batches.append((embeddings, labels))

    @override
    @torch.no_grad()
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        self.class_values = {}
        if not self._batches:
            return {}
        embeddings, labels = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self.reset(trainer)
        loader = self._gallery_loader(trainer, stage)
        everything = gather_rows(labels)
        chosen, own = self._chosen(everything, len(labels))
        if loader is None:
            start = int(own.nonzero()[0]) if len(labels) else 0  # of this process's images among those of all
            mine = chosen[start : start + len(labels)]
            position = (start + mine.nonzero()).squeeze(1)
            gallery, gallery_labels = gather_rows(embeddings), everything
            scores = retrieval_scores(
                embeddings[mine], labels[mine], gallery, gallery_labels, self.ks, self_index=position
            )
        else:
            mine = chosen[own]
            gallery, gallery_labels = embed_loader(trainer, pl_module, loader, self.embed)
            scores = retrieval_scores(embeddings[mine], labels[mine], gallery, gallery_labels, self.ks)
        return self._averages(stage, scores, labels[mine], everything, None if loader is None else gallery_labels)

    def _gallery_loader(self, trainer: Trainer, stage: str) -> Iterable[Any] | None:
        """This process's share of the gallery; None: leave-one-out."""
        if self.gallery is not None:
            return own_batches(trainer, self.gallery)
        make_loader = getattr(getattr(trainer, "datamodule", None), "gallery_dataloader", None)
        loader: Iterable[Any] | None = make_loader() if stage == "test" and callable(make_loader) else None
        return loader

    def _chosen(self, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Which of the images of all processes are queries, and which are this process's, (N,) bool each."""
        owner = gather_rows(torch.full((size,), rank(), device=labels.device))
        own = owner == rank()
        if self.max_queries is None or len(labels) <= self.max_queries:
            return torch.ones_like(own), own
        # In the order of the data set, of which process r of W has r, r + W, r + 2 W, ...: as one process chooses.
        place = gather_rows(rank() + world_size() * torch.arange(size, device=labels.device))
        order = place.argsort()
        index, _ = compact_labels(labels[order].cpu())
        chosen = torch.zeros_like(own)
        chosen[order[stratified_subset(index, self.max_queries, seed=0).to(order.device)]] = True
        return chosen, own

    def _averages(
        self, stage: str, scores: RetrievalScores, labels: Tensor, everything: Tensor, gallery_labels: Tensor | None
    ) -> dict[str, Tensor]:
        values = torch.cat((scores.recall, scores.r_precision[:, None], scores.average_precision[:, None]), dim=1)
        values, labels, counts = gather_rows(values), gather_rows(labels), gather_rows(scores.relevant)
        self._tell(stage, labels, labels[counts > 0], everything, gallery_labels)
        if not (counts > 0).any():
            return {}
        names = [*(f"recall_at_{k}" for k in self.ks), "r_precision", "map_at_r"]
        self.class_values = class_values(values, labels, names)
        averages = (("", average_scores(values, labels)), ("_macro", average_scores(values, labels, "macro")))
        return {f"{name}{suffix}": mean for suffix, means in averages for name, mean in zip(names, means, strict=True)}

    def _tell(
        self, stage: str, asked: Tensor, counted: Tensor, everything: Tensor, gallery_labels: Tensor | None
    ) -> None:
        """One line on the images and classes of the values."""
        names = f"{stage}/map_at_r, {stage}/r_precision and {stage}/recall_at_k"
        searched = "all others" if gallery_labels is None else f"a gallery of {described_images(gallery_labels)}"
        if not len(counted):
            line = f"{names} are not logged: no image has another of its class among {searched}"
        else:
            line = f"{names} are over {described_images(counted)}, each compared with {searched}"
            if len((everything if gallery_labels is None else gallery_labels).unique()) == 1:
                line += "; among images of one class every value is 1"
            if len(asked) < len(everything):
                line += (
                    f"; max_queries={self.max_queries} of {described_images(everything)} are queries, the classes in "
                    "proportion"
                )
            if len(counted) < len(asked):
                line += f"; {len(asked) - len(counted):,} without another image of their class do not count"
        self._tell_once(f"RetrievalMonitor: {line}")
