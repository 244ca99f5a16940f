"""Evaluate the encoder by retrieval during training, also on classes that training has not seen."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from simo_lightning.callbacks.budget import Plan, choose, embedding_dim, fit_sizes, images_of, length
from simo_lightning.callbacks.embed import EmbedBatch, embed_share, own_batches
from simo_lightning.callbacks.evaluation import EvaluationCallback, class_values, described_images, described_numbers
from simo_lightning.data.sources import stratified_subset
from simo_lightning.distributed import gather_rows, largest_over_ranks, rank, world_size
from simo_lightning.functional.knn import check_finite
from simo_lightning.functional.moments import compact_labels
from simo_lightning.functional.retrieval import RetrievalScores, average_scores
from simo_lightning.metrics.sharded import class_counts_over_ranks, retrieval_scores_over_ranks

_QUERIES = 20_000  # at most, unless given
_LEAST_PER_CLASS = 20  # queries of each class
_LEAST = 1000  # queries
_SELECTION = 500  # multiplications that take as long as the selection of the nearest takes for a pair of images


class RetrievalMonitor(EvaluationCallback):
    """Log Recall@k, R-precision and MAP@R as ``val/recall_at_1``, ``val/r_precision``, ``val/map_at_r``.

    The queries are the embeddings that validation and test steps return as ``outputs["embeddings"]`` with
    ``outputs["labels"]``. They are compared by cosine similarity with all other images of the split (leave-one-out), or
    with a gallery. No class needs training images. An image that is the only one of its class, or whose class the
    gallery lacks, is no query.

    Every value is a mean over queries; ``val/recall_at_1_macro`` and so on are means over classes of the mean over
    their queries. One line states how many images and classes the values are over. Every process keeps its own images;
    the queries and what is nearest to them are sent (``simo_lightning.metrics.sharded``). Definitions, ties and
    sources: :func:`~simo_lightning.functional.retrieval_scores`.

    Args:
        ks: Values of k of Recall@k.
        max_queries: Largest number of queries, over all processes. Of more, as many are used, the classes in proportion
            and always the same; they are still compared with all images. Time grows with queries times images. None:
            all. auto: at most 20,000; in a fit as many as keep validation at about 10 % of an epoch, at least 1,000
            and 20 of each class.
        every_n_epochs: Epochs of training from one evaluation to the next; in between, checkpoints see the last
            values. auto: as for :class:`OnlineKNN`. ``trainer.validate`` and ``trainer.test`` always evaluate.
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
        max_queries: int | Literal["auto"] | None = "auto",
        every_n_epochs: int | Literal["auto"] = "auto",
        gallery: DataLoader | None = None,
        embed: EmbedBatch | None = None,
    ) -> None:
        super().__init__(every_n_epochs)
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be numbers of at least 1, got {list(ks)}")
        if max_queries not in (None, "auto") and int(max_queries) < 1:
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
        device = trainer.strategy.root_device
        if not largest_over_ranks(len(self._batches), device):
            return {}
        loader = self._gallery_loader(trainer, stage)
        gallery, gallery_labels = (
            self._joined(device) if loader is None else embed_share(trainer, pl_module, loader, self.embed)
        )
        check_finite(gallery, "embeddings" if loader is None else "gallery")
        # a process without a batch takes part with none
        embeddings = torch.cat([gallery[:0], *(rows.to(gallery.dtype) for rows, _ in self._batches)])
        labels = torch.cat([gallery_labels[:0], *(each.long() for _, each in self._batches)])
        check_finite(embeddings, "embeddings")
        self.reset(trainer)
        everything = gather_rows(labels)
        chosen, own = self._chosen(trainer, everything, len(labels))
        mine = chosen[own]
        position = mine.nonzero().squeeze(1) if loader is None else None  # of each query among this process's images
        scores = retrieval_scores_over_ranks(
            embeddings[mine], labels[mine], gallery, gallery_labels, self.ks, self_index=position
        )
        searched = None if loader is None else class_counts_over_ranks(gallery_labels)
        return self._averages(stage, scores, labels[mine], everything, searched)

    def _joined(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of this process; with none, of the width and dtype of the others."""
        own = [self._batches[0][0].shape[1], self._batches[0][0].dtype == torch.float64] if self._batches else [0, 0]
        dim, is_double = gather_rows(torch.tensor([own], device=device)).amax(dim=0).tolist()
        dtype = torch.float64 if is_double else torch.float32
        embeddings = [torch.zeros(0, dim, device=device, dtype=dtype), *(rows.to(dtype) for rows, _ in self._batches)]
        labels = [torch.zeros(0, device=device, dtype=torch.long), *(each.long() for _, each in self._batches)]
        return torch.cat(embeddings), torch.cat(labels)

    @override
    def plan(self, trainer: Trainer, pl_module: LightningModule) -> Plan | None:
        if self.max_queries != "auto" and self.every_n_epochs != "auto":
            return None
        bank = getattr(getattr(trainer, "datamodule", None), "bank_dataloader", None)
        trained = images_of(trainer, bank() if callable(bank) else trainer.train_dataloader)
        sizes = fit_sizes(trainer, pl_module, trained)
        gallery = 0 if self.gallery is None else length(self.gallery)
        if sizes is None or gallery is None or sizes.validated == 0:
            return None
        # a product in float64, and the selection of the nearest, for each pair
        pair = (4 * embedding_dim(pl_module) + _SELECTION) / sizes.multiplications
        cost = pair * (sizes.validated if self.gallery is None else gallery)
        free = self.every_n_epochs == "auto"
        budget = sizes.budget() * (1 if free else int(self.every_n_epochs))
        limit = _QUERIES if self.max_queries == "auto" else self.max_queries
        total = sizes.validated if limit is None else min(sizes.validated, limit)
        least = max(_LEAST, _LEAST_PER_CLASS * (self._known_num_classes(trainer) or 0))
        plan = choose(budget, cost, gallery, total, least, sizes=self.max_queries == "auto", interval=free)
        every = plan.every * (trainer.check_val_every_n_epoch or 1) if free else self.every_n_epochs
        used = total if plan.images is None else plan.images
        often = "every epoch" if every == 1 else f"every {every} epochs"
        chosen = ["max_queries"] * (self.max_queries == "auto") + ["every_n_epochs"] * free
        rank_zero_info(
            f"RetrievalMonitor has {used:,} of {sizes.validated:,} images as queries {often}, so that validation takes "
            f"about a tenth of an epoch or less ({' and '.join(chosen)}: auto)"
        )
        return plan

    def _limit(self, trainer: Trainer) -> int | None:
        """Largest number of queries in the evaluation that runs."""
        if self.max_queries != "auto":
            return self.max_queries
        fits = trainer.state.fn == TrainerFn.FITTING and self.planned is not None and self.planned.images is not None
        return self.planned.images if fits and self.planned is not None else _QUERIES

    def _gallery_loader(self, trainer: Trainer, stage: str) -> Iterable[Any] | None:
        """This process's share of the gallery; None: leave-one-out."""
        if self.gallery is not None:
            return own_batches(trainer, self.gallery)
        make_loader = getattr(getattr(trainer, "datamodule", None), "gallery_dataloader", None)
        loader: Iterable[Any] | None = make_loader() if stage == "test" and callable(make_loader) else None
        return loader

    def _chosen(self, trainer: Trainer, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Which of the images of all processes are queries, and which are this process's, (N,) bool each."""
        owner = gather_rows(torch.full((size,), rank(), device=labels.device))
        own = owner == rank()
        limit = self._limit(trainer)
        if limit is None or len(labels) <= limit:
            return torch.ones_like(own), own
        # In the order of the data set, of which process r of W has r, r + W, r + 2 W, ...: as one process chooses.
        place = gather_rows(rank() + world_size() * torch.arange(size, device=labels.device))
        order = place.argsort()
        index, _ = compact_labels(labels[order].cpu())
        chosen = torch.zeros_like(own)
        chosen[order[stratified_subset(index, limit, seed=0).to(order.device)]] = True
        return chosen, own

    def _averages(
        self, stage: str, scores: RetrievalScores, labels: Tensor, everything: Tensor, searched: Tensor | None
    ) -> dict[str, Tensor]:
        values = torch.cat((scores.recall, scores.r_precision[:, None], scores.average_precision[:, None]), dim=1)
        values, labels, counts = gather_rows(values), gather_rows(labels), gather_rows(scores.relevant)
        self._tell(stage, labels, labels[counts > 0], everything, searched)
        if not (counts > 0).any():
            return {}
        names = [*(f"recall_at_{k}" for k in self.ks), "r_precision", "map_at_r"]
        self.class_values = class_values(values, labels, names)
        averages = (("", average_scores(values, labels)), ("_macro", average_scores(values, labels, "macro")))
        return {f"{name}{suffix}": mean for suffix, means in averages for name, mean in zip(names, means, strict=True)}

    def _tell(
        self, stage: str, asked: Tensor, counted: Tensor, everything: Tensor, gallery_counts: Tensor | None
    ) -> None:
        """One line on the images and classes of the values."""
        names = f"{stage}/map_at_r, {stage}/r_precision and {stage}/recall_at_k"
        classes = len(everything.unique()) if gallery_counts is None else int((gallery_counts > 0).sum())
        searched = "all others"
        if gallery_counts is not None:
            searched = f"a gallery of {described_numbers(int(gallery_counts.sum()), classes)}"
        if not len(counted):
            line = f"{names} are not logged: no image has another of its class among {searched}"
        else:
            line = f"{names} are over {described_images(counted)}, each compared with {searched}"
            if classes == 1:
                line += "; among images of one class every value is 1"
            if len(asked) < len(everything):
                line += (
                    f"; max_queries={len(asked)} of {described_images(everything)} are queries, the classes in "
                    "proportion"
                )
            if len(counted) < len(asked):
                line += f"; {len(asked) - len(counted):,} without another image of their class do not count"
        self._tell_once(f"RetrievalMonitor: {line}")
