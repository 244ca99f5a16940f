"""Class moments: the sums per class from which the loss and every geometry metric are computed.

Shapes: N embeddings, D dimensions, C classes. `index` is the class of each embedding, numbered 0..C-1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest size of the second moments: every process gathers those of all others.
_MAX_BYTES = 2**30
# On a GPU, sums over up to this many classes are a product with a one-hot matrix, which is deterministic, unlike
# index_add_ there. index_add_ is used for more classes, and on the CPU, where it is deterministic and faster.
_ONE_HOT_CLASSES = 32
# Embeddings per index_add_: sums of partial sums lose fewer digits in float32 than one long sum.
_CHUNK = 8192


class ClassMoments(NamedTuple):
    """Additive sums of labelled embeddings, per class. They merge exactly: over batches, processes and runs.

    Attributes:
        counts: Embeddings of each class, ``(C,)``, in the dtype of the other sums.
        sums: Sum of the embeddings, ``(C, D)``.
        second: Sum of the outer products ``e e^T``, ``(C, D, D)``.
        fourth: Sum of ``|e|^4``, ``(C,)``.

    In float64 the sums resolve a spread of 1e-6 of the norm. The loss, which works in float32, takes its spread from
    centred differences instead (:func:`class_scatter`).
    """

    counts: Tensor
    sums: Tensor
    second: Tensor
    fourth: Tensor

    @classmethod
    def zeros(cls, num_classes: int, embedding_dim: int, dtype: torch.dtype = torch.float64) -> "ClassMoments":
        """Moments of no embeddings.

        Args:
            num_classes: C.
            embedding_dim: D.
            dtype: Of the sums.

        Returns:
            Zeros, on the CPU.

        Raises:
            ValueError: If a size is below 1, or the sums would take more than 1 GiB.
        """
        for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        size = num_classes * embedding_dim**2 * dtype.itemsize
        if size > _MAX_BYTES:
            raise ValueError(
                f"num_classes * embedding_dim^2 must fit in 1 GiB of {dtype}, got {num_classes} * {embedding_dim}^2 = "
                f"{size / 2**30:.1f} GiB; measure embeddings of fewer dimensions, or a subset of the classes"
            )
        shape = (num_classes, embedding_dim)
        shapes = {"counts": shape[:1], "sums": shape, "second": (*shape, embedding_dim), "fourth": shape[:1]}
        return cls(**{name: torch.zeros(size, dtype=dtype) for name, size in shapes.items()})

    @property
    def means(self) -> Tensor:
        """Class means, ``(C, D)``; ``nan`` rows for classes without embeddings."""
        return self.sums / self.counts.unsqueeze(1)

    @property
    def squared_norms(self) -> Tensor:
        """Sum of the squared norms of each class, ``(C,)``."""
        return self.second.diagonal(dim1=1, dim2=2).sum(dim=1)

    @property
    def second_moment(self) -> Tensor:
        """Sum of the outer products ``e e^T`` over all classes, ``(D, D)``."""
        return self.second.sum(dim=0)

    @property
    def scatter(self) -> Tensor:
        """Sum of squared distances to the class mean, ``(C,)``, >= 0; ``nan`` for classes without embeddings."""
        return (self.squared_norms - self.sums.square().sum(dim=1) / self.counts).clamp(min=0)

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Moments of the union of two disjoint sets of embeddings.

        Args:
            other: Moments with the same shapes.

        Returns:
            The elementwise sum.

        Raises:
            ValueError: If the numbers of classes or of dimensions differ.
        """
        if self.sums.shape != other.sums.shape:
            raise ValueError(
                f"moments must have the same (C, D) to merge, "
                f"got {tuple(self.sums.shape)} and {tuple(other.sums.shape)}"
            )
        return ClassMoments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def class_moments(
    embeddings: Tensor, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float64
) -> ClassMoments:
    """Class moments of a batch whose labels are 0..C-1.

    Args:
        embeddings: Float tensor ``(N, D)``, used as given.
        labels: Class of each embedding, ``(N,)``, integers in ``0..num_classes - 1``.
        num_classes: C.
        dtype: Of the sums; float64 unless the device has none.

    Returns:
        The sums; zeros for classes without embeddings.

    Raises:
        ValueError: If a shape or a label is wrong.

    Example:
        >>> moments = class_moments(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([0, 0, 1]), num_classes=2)
        >>> moments.means.flatten().tolist(), moments.scatter.tolist()
        ([1.0, 9.0], [2.0, 0.0])
    """
    check_embeddings(embeddings, labels)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} for num_classes={num_classes}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
    embeddings, labels = embeddings.to(dtype), labels.long()
    counts = torch.bincount(labels, minlength=num_classes)
    return ClassMoments(
        counts=counts.to(dtype),
        sums=class_sums(embeddings, labels, num_classes),
        second=class_second_moments(embeddings, class_blocks(labels, counts), num_classes),
        fourth=class_sums(embeddings.square().sum(dim=1).square(), labels, num_classes),
    )


def check_embeddings(
    embeddings: Tensor, labels: Tensor | None = None, name: str = "embeddings", labels_name: str = "labels"
) -> None:
    """Raise unless embeddings are floats ``(N, D)`` and labels, if any, integers ``(N,)`` on the same device.

    Args:
        embeddings: What should be ``(N, D)``.
        labels: What should be ``(N,)``; None: there are none.
        name: Name of the first argument in the error.
        labels_name: Name of the second.

    Raises:
        ValueError: Naming the argument, what it must be and what it is.
    """
    for each, value in ((name, embeddings), (labels_name, labels)):
        if not (isinstance(value, Tensor) or (value is None and each == labels_name)):
            raise ValueError(f"{each} must be a tensor, got {type(value).__name__}")
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"{name} must be floats of shape (N, D), got {embeddings.dtype} of shape {tuple(embeddings.shape)}"
        )
    if labels is None:
        return
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{labels_name} must have shape ({len(embeddings)},) to match {name}, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{labels_name} must be integers, got {labels.dtype}")
    if labels.device != embeddings.device:
        raise ValueError(f"{labels_name} must be on {embeddings.device}, where {name} are, got {labels.device}")


def compact_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number the classes that occur 0..C-1, in the order of their labels.

    Args:
        labels: Any integers, ``(N,)``.

    Returns:
        ``index (N,)``, the number of each embedding's class, and ``counts (C,)``, all at least 1, both int64.

    Example:
        >>> index, counts = compact_labels(torch.tensor([7, -1, 7]))
        >>> index.tolist(), counts.tolist()
        ([1, 0, 1], [1, 2])
    """
    labels = labels.long()
    if len(labels) == 0:
        return labels, labels
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if high - low > 4 * len(labels) + 1024:  # sparse labels: sort; dense ones are counted in one pass
        _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        return index, counts
    counts = torch.bincount(labels - low, minlength=high - low + 1)
    if int(counts.min()) > 0:  # every label between the two occurs, the usual case
        return labels - low, counts
    present = counts > 0
    number = present.long().cumsum(0) - 1
    return number[labels - low], counts[present]


def class_sums(values: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """Sum of the values of each class.

    Args:
        values: ``(N,)`` or ``(N, D)``.
        index: ``(N,)``, int64.
        num_classes: C.

    Returns:
        ``(C,)`` or ``(C, D)``.
    """
    if values.device.type != "cpu" and num_classes <= _ONE_HOT_CLASSES:
        one_hot = index == torch.arange(num_classes, device=index.device).unsqueeze(1)  # (C, N)
        return one_hot.to(values.dtype) @ values
    sums = values.new_zeros(num_classes, *values.shape[1:])
    if len(values) <= _CHUNK:
        return sums.index_add_(0, index, values)
    for chunk, numbers in zip(values.split(_CHUNK), index.split(_CHUNK), strict=True):
        sums = sums + torch.zeros_like(sums).index_add_(0, numbers, chunk)
    return sums


def class_scatter(embeddings: Tensor, means: Tensor, index: Tensor) -> Tensor:
    """Sum of squared distances to the class mean, from differences and so exact for tight classes.

    Args:
        embeddings: ``(N, D)``.
        means: ``(C, D)``.
        index: ``(N,)``.

    Returns:
        ``(C,)``, >= 0.
    """
    return class_sums((embeddings - means.index_select(0, index)).square().sum(dim=1), index, len(means))


def class_blocks(index: Tensor, counts: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Indices of the embeddings of each class, classes of similar size in one block.

    Sizes within a block differ by less than a factor of 2, so all blocks together hold fewer than 2 N indices, and
    there are at most log2(N) + 1 of them, however unequal the classes are.

    Args:
        index: ``(N,)``.
        counts: ``(C,)`` int64.

    Returns:
        Pairs of class numbers ``(G,)`` and indices ``(G, n)``, padded with -1. Empty classes are in no block.

    Example:
        >>> [indices.tolist() for _, indices in class_blocks(torch.tensor([1, 0, 1]), torch.tensor([1, 2]))]
        [[[1]], [[0, 2]]]
    """
    order, starts = index.argsort(stable=True), counts.cumsum(0) - counts
    powers = counts.double().log2().floor()
    blocks = []
    for power in powers[counts > 0].unique():
        members = (powers == power).nonzero().squeeze(1)
        sizes = counts[members].unsqueeze(1)
        offsets = torch.arange(int(sizes.max()), device=index.device)
        positions = (starts[members].unsqueeze(1) + offsets).clamp(max=len(index) - 1)
        blocks.append((members, order[positions].masked_fill(offsets >= sizes, -1)))
    return tuple(blocks)


def gather_block(embeddings: Tensor, indices: Tensor) -> Tensor:
    """Embeddings ``(G, n, D)`` at the indices ``(G, n)`` of a block; zeros where these are -1."""
    # F.embedding is deterministic on CUDA, where indexing is not
    return F.embedding(indices.clamp(min=0), embeddings).masked_fill((indices < 0).unsqueeze(2), 0)


def class_second_moments(embeddings: Tensor, blocks: tuple[tuple[Tensor, Tensor], ...], num_classes: int) -> Tensor:
    """Sum of the outer products ``e e^T`` of each class.

    Args:
        embeddings: ``(N, D)``.
        blocks: Of :func:`class_blocks`.
        num_classes: C.

    Returns:
        ``(C, D, D)``.
    """
    second = embeddings.new_zeros(num_classes, embeddings.shape[1], embeddings.shape[1])
    for members, indices in blocks:
        block = gather_block(embeddings, indices)
        second = second.index_copy(0, members, block.mT @ block)
    return second
