"""Sample of embeddings of fixed size (a bottom-k sketch), independent of their order, batches and processes.

Every embedding gets a key, a hash of its own values. The sample is the embeddings with the smallest keys, each with the
number of times it occurred. The smallest keys of the whole are among the smallest keys of each part, so the samples
of parts merge exactly into the sample of the whole, counts included.

An entry is D + 2 int64: key, count, and the bits of the values, so that one tensor holds a sample of any dtype.
"""

import torch
from torch import Tensor

from simo_lightning.functional.hashing import GOLDEN, splitmix64

# Keys of empty entries, above all others, and of embeddings that are not finite, below, so that one is always kept.
_EMPTY, _NOT_FINITE = 2**63 - 1, -1


def empty_sample(size: int, dim: int) -> Tensor:
    """A sample without embeddings.

    Args:
        size: Embeddings that it can hold, K.
        dim: D.

    Returns:
        ``(K, D + 2)``, int64.
    """
    sample = torch.zeros(size, dim + 2, dtype=torch.int64)
    sample[:, 0] = _EMPTY
    return sample


def sample_entries(embeddings: Tensor) -> Tensor:
    """Entries of a sample for a batch of embeddings, each counted once.

    Args:
        embeddings: float64 or float32, ``(N, D)``.

    Returns:
        ``(N, D + 2)``, int64.
    """
    embeddings = embeddings + 0.0  # -0.0 and 0.0 are one value
    bits = embeddings.view(torch.int64 if embeddings.dtype == torch.float64 else torch.int32).to(torch.int64)
    columns = splitmix64(
        GOLDEN * torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
    )  # (D,) so that order matters
    keys = (splitmix64(splitmix64(bits ^ columns).sum(dim=1)) & _EMPTY).clamp(max=_EMPTY - 1)
    keys = torch.where(embeddings.isfinite().all(dim=1), keys, _NOT_FINITE)
    return torch.cat((keys.unsqueeze(1), torch.ones_like(keys).unsqueeze(1), bits), dim=1)


def merge_samples(samples: Tensor, size: int) -> Tensor:
    """Sample of the union of several samples, or of single entries.

    Args:
        samples: ``(..., D + 2)``, int64.
        size: Embeddings to keep, K.

    Returns:
        ``(K, D + 2)``, int64, sorted by key.
    """
    entries = samples.flatten(0, -2)
    keys, inverse = entries[:, 0].unique(return_inverse=True)  # sorted
    counts = torch.zeros_like(keys).index_add(0, inverse, entries[:, 1])
    indices = torch.arange(len(entries), device=entries.device)
    first = torch.full_like(keys, len(entries)).scatter_reduce(0, inverse, indices, "amin")
    kept = torch.cat((keys.unsqueeze(1), counts.unsqueeze(1), entries[first, 2:]), dim=1)[:size]
    padding = empty_sample(size - len(kept), entries.shape[1] - 2)
    return torch.cat((kept, padding.to(kept.device)))


def sampled_embeddings(sample: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings of a sample and how often each occurred.

    Args:
        sample: ``(K, D + 2)``, int64.
        dtype: Of the embeddings.

    Returns:
        ``embeddings (n, D)`` of that dtype, n <= K, and ``counts (n,)``, int64.
    """
    filled = sample[sample[:, 1] > 0]
    bits = filled[:, 2:] if dtype == torch.float64 else filled[:, 2:].to(torch.int32)
    return bits.contiguous().view(dtype), filled[:, 1]
