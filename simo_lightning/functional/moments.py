"""Class moments: the sums per class from which the loss and every geometry metric are computed.

Shapes: N rows, D dimensions, C classes. `index` is a compact class index in 0..C-1 for each row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Processes gather each other's moments: more than this would not fit into memory once per process.
_LARGEST = 2**30  # bytes
# Up to this many classes a sum per class is, off the CPU, one matrix product with a one-hot matrix: the same at every
# run, which an indexed add is not there; above, and on a CPU, where it is faster and repeatable, an indexed add.
_ONE_HOT_CLASSES = 32
# Rows of an indexed add: sums of sums lose fewer digits in float32 than one long one.
_ADDED_ROWS = 8192


class ClassMoments(NamedTuple):
    """Additive sums of labelled embeddings, per class. They merge exactly: over batches, processes and runs.

    Attributes:
        counts: Rows of each class, ``(C,)``, in the dtype of the other sums.
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
        if size > _LARGEST:
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
        labels: Class of each row, ``(N,)``, integers in ``0..num_classes - 1``.
        num_classes: C.
        dtype: Of the sums; float64 unless the device has none.

    Returns:
        The sums; zeros for classes without a row.

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
    embeddings = embeddings.to(dtype)
    counts = torch.bincount(labels, minlength=num_classes)
    return ClassMoments(
        counts=counts.to(dtype),
        sums=class_sums(embeddings, labels, num_classes),
        second=class_second_moments(embeddings, labels, counts),
        fourth=class_sums(embeddings.square().sum(dim=1).square(), labels, num_classes),
    )


def check_embeddings(embeddings: Tensor, labels: Tensor) -> None:
    """Raise unless embeddings are floats ``(N, D)`` and labels are integers ``(N,)`` on the same device.

    Args:
        embeddings: What should be ``(N, D)``.
        labels: What should be ``(N,)``.

    Raises:
        ValueError: Naming the argument, what it must be and what it is.
    """
    for name, value in (("embeddings", embeddings), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floats of shape (N, D), got {embeddings.dtype} of shape {tuple(embeddings.shape)}"
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},) to match embeddings, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.device != embeddings.device:
        raise ValueError(f"labels must be on {embeddings.device}, where embeddings are, got {labels.device}")


def compact_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number the classes that occur 0..C-1, in the order of their labels.

    Args:
        labels: Any integers, ``(N,)``.

    Returns:
        ``index (N,)`` of each row's class, and ``counts (C,)``, all at least 1, both int64.

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
    if int(counts.min()) > 0:  # no gap: the usual case, at half the operations
        return labels - low, counts
    present = counts > 0
    number = present.long().cumsum(0) - 1
    return number[labels - low], counts[present]


def class_sums(values: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class.

    Args:
        values: ``(N,)`` or ``(N, D)``.
        index: Class of each row, ``(N,)``.
        num_classes: C.

    Returns:
        ``(C,)`` or ``(C, D)``.
    """
    if values.device.type != "cpu" and num_classes <= _ONE_HOT_CLASSES:
        one_hot = index == torch.arange(num_classes, device=index.device).unsqueeze(1)  # (C, N)
        return one_hot.to(values.dtype) @ values
    sums = values.new_zeros(num_classes, *values.shape[1:])
    if len(values) <= _ADDED_ROWS:
        return sums.index_add_(0, index, values)
    for rows, members in zip(values.split(_ADDED_ROWS), index.split(_ADDED_ROWS), strict=True):
        sums = sums + torch.zeros_like(sums).index_add_(0, members, rows)
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


def class_second_moments(embeddings: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Sum of the outer products ``e e^T`` of each class.

    Args:
        embeddings: ``(N, D)``.
        index: ``(N,)``.
        counts: ``(C,)`` int64.

    Returns:
        ``(C, D, D)``.
    """
    dim = embeddings.shape[1]
    second = embeddings.new_zeros(len(counts), dim, dim)
    for members, rows in class_blocks(embeddings, index, counts):
        second = second.index_copy(0, members, rows.mT @ rows)
    return second


def squared_gram_norms(embeddings: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Sum of (e_i . e_j)^2 over all ordered pairs of each class, i = j included: the squared Frobenius norm of S.

    Uses whichever of S (D x D) and the Gram matrix (n x n) is smaller; either way O(N D) memory.

    Args:
        embeddings: ``(N, D)``.
        index: ``(N,)``.
        counts: ``(C,)`` int64.

    Returns:
        ``(C,)``, >= 0.
    """
    norms = embeddings.new_zeros(len(counts))
    for members, rows in class_blocks(embeddings, index, counts):
        small = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
        norms = norms.index_copy(0, members, small.square().sum(dim=(1, 2)))
    return norms


def class_blocks(embeddings: Tensor, index: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Group the rows by class, in blocks of classes of like size, padded with rows of zeros.

    Sizes within one block differ by less than a factor of two: so the blocks hold at most 2 N rows together, and there
    are at most log2(N) + 1 of them, however unequal the classes are.

    Args:
        embeddings: ``(N, D)``.
        index: ``(N,)``.
        counts: ``(C,)`` int64.

    Yields:
        ``members (G,)``, the classes of the block, and ``rows (G, n, D)``.
    """
    order = index.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(order)  # (N,) of each row within its class
    place[order] = torch.arange(len(order), device=order.device) - starts[index[order]]
    sizes = torch.log2(counts.clamp(min=1).double()).floor().long()  # (C,) power of two under each count
    for size in sizes[counts > 0].unique().tolist():
        members = ((sizes == size) & (counts > 0)).nonzero().squeeze(1)
        longest = int(counts[members].max())
        if len(members) == len(counts) and int(counts.min()) == longest:
            yield members, embeddings.index_select(0, order).view(len(members), longest, -1)
            return
        slot = torch.full_like(counts, -1)
        slot[members] = torch.arange(len(members), device=members.device)
        chosen = (slot[index] >= 0).nonzero().squeeze(1)
        target = slot[index[chosen]] * longest + place[chosen]
        rows = embeddings.new_zeros(len(members) * longest, embeddings.shape[1])
        yield members, rows.index_copy(0, target, embeddings.index_select(0, chosen)).view(len(members), longest, -1)
