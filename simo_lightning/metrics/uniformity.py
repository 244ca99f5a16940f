"""Uniformity as a torchmetrics metric: exact for few embeddings, computed on a mergeable sample for many."""

from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from simo_lightning.functional.geometry import uniformity
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.sketch import empty_sample, merge_samples, sample_entries, sampled_embeddings


class Uniformity(Metric):
    """How evenly embeddings cover the sphere, by :func:`.geometry.uniformity`.

    Exact for at most ``sample_size`` different embeddings. For more, it is the value of ``sample_size`` of them,
    selected by a hash of their values, each with the number of times it occurred. The selection does not depend on
    order, batches or processes. If the last digits of the embeddings differ (another batch size or device), other
    embeddings are selected, and the value is another estimate of the same quantity.

    The state is ``sample_size * (D + 2)`` int64: 295 kB for 2,048 embeddings in 16 dimensions.

    Args:
        embedding_dim: D.
        sample_size: Embeddings kept; time of `compute` grows with its square.
        t: Sharpness of the potential, > 0.
        dtype: Of the embeddings kept; torch.float32 for devices without float64.

    Raises:
        ValueError: If ``embedding_dim`` is below 1, ``sample_size`` below 2, t is not positive, or the dtype is
            neither torch.float64 nor torch.float32.

    Example:
        >>> metric = Uniformity(embedding_dim=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> round(metric.compute().item(), 6)
        -4.0

    Source:
        Wang & Isola, arXiv 2005.10242; the sample is a bottom-k sketch (Cohen & Kaplan, PODC 2007) with counts.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    sample: Tensor

    def __init__(
        self, embedding_dim: int, sample_size: int = 2048, t: float = 2.0, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        for name, value, least in (("embedding_dim", embedding_dim, 1), ("sample_size", sample_size, 2)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not t > 0:
            raise ValueError(f"t must be positive, got {t}")
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        self.embedding_dim, self.sample_size, self.t, self.sample_dtype = embedding_dim, sample_size, t, dtype
        self.add_state(
            "sample", empty_sample(sample_size, embedding_dim), dist_reduce_fx=partial(merge_samples, size=sample_size)
        )

    def update(self, embeddings: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Not used; accepted so that the metric fits into a collection with others that need them.

        Raises:
            ValueError: If the type or shape is wrong.
        """
        check_embeddings(embeddings)
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(f"embeddings must have shape (N, {self.embedding_dim}), got {tuple(embeddings.shape)}")
        entries = sample_entries(embeddings.detach().to(self.sample_dtype))
        self.sample = merge_samples(torch.cat((self.sample, entries)), self.sample_size)

    def compute(self) -> Tensor:
        """The value over all embeddings seen, of all processes; ``nan`` if fewer than two, or one was not finite."""
        embeddings, counts = sampled_embeddings(self.sample, self.sample_dtype)
        return uniformity(embeddings, self.t, counts).to(self.sample_dtype)
