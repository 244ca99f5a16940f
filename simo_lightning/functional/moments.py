"""Class moments: the sums per class from which every geometry metric is computed.

Shapes: N embeddings, D dimensions, C classes. `index` is the class of each embedding, numbered 0..C-1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Result = TypeVar("_Result")

#: Default of ``second_budget_mb``, in MB (10^6 bytes).
SECOND_BUDGET_MB = 256.0
# Largest size of the other sums. A label that is no class index, such as an identifier of ten digits, exceeds it.
_MAX_BYTES = 2**32
# On a GPU, sums over up to this many classes are a product with a one-hot matrix, which is deterministic, unlike
# index_add_ there. index_add_ is used for more classes, and on the CPU, where it is deterministic and faster.
_ONE_HOT_CLASSES = 32
# Embeddings per index_add_: sums of partial sums lose fewer digits in float32 than one long sum.
_CHUNK = 8192
# Numbers in the second moments of classes that are computed at a time: 32 MiB in float64.
_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Additive sums of labelled embeddings, per class. They merge exactly: over batches, processes and runs.

    They have ``C D + D^2 + 3 C`` numbers, whatever the number of embeddings, and ``C D^2`` more with ``second``.

    Attributes:
        counts: Embeddings of each class, ``(C,)``, in the dtype of the other sums.
        sums: Sum of the embeddings of each class, ``(C, D)``.
        squared_norms: Sum of ``|e|^2`` of each class, ``(C,)``.
        fourth: Sum of ``|e|^4`` of each class, ``(C,)``.
        second_moment: Sum of the outer products ``e e^T`` over all classes, ``(D, D)``.
        second: The same for each class, ``(C, D, D)``; None where it would exceed the budget. Few functions need it;
            they take it from :meth:`required_second`.

    In float64 the sums resolve a spread of 1e-6 of the norm. The loss, which works in float32, takes its spread from
    centred differences instead (:func:`class_scatter`).
    """

    counts: Tensor
    sums: Tensor
    squared_norms: Tensor
    fourth: Tensor
    second_moment: Tensor
    second: Tensor | None = None
    _cache: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def zeros(
        cls,
        num_classes: int,
        embedding_dim: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        second_budget_mb: float = SECOND_BUDGET_MB,
    ) -> "ClassMoments":
        """Moments of no embeddings.

        Args:
            num_classes: C.
            embedding_dim: D.
            dtype: Of the sums.
            device: Of the sums.
            second_budget_mb: Largest size of ``second`` in MB; ``second`` is None where it would be larger. 0: always.

        Returns:
            Zeros.

        Raises:
            ValueError: If a size is below 1, the budget is negative, or the other sums would take more than 4 GiB.
        """
        for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not second_budget_mb >= 0:
            raise ValueError(f"second_budget_mb must be at least 0, got {second_budget_mb}")
        size = (num_classes + embedding_dim) * embedding_dim * dtype.itemsize
        if size > _MAX_BYTES:
            raise ValueError(
                f"(num_classes + embedding_dim) * embedding_dim must fit in 4 GiB of {dtype}, got "
                f"({num_classes} + {embedding_dim}) * {embedding_dim} = {size / 2**30:.1f} GiB"
            )
        fits = second_size_mb(num_classes, embedding_dim, dtype) <= second_budget_mb
        vector, matrix = (num_classes,), (num_classes, embedding_dim)
        shapes = (vector, matrix, vector, vector, (embedding_dim, embedding_dim), *([(*matrix, embedding_dim)] * fits))
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    @property
    def means(self) -> Tensor:
        """Class means, ``(C, D)``; ``nan`` rows for classes without embeddings."""
        return self.sums / self.counts.unsqueeze(1)

    @property
    def scatter(self) -> Tensor:
        """Sum of squared distances to the class mean, ``(C,)``, >= 0; ``nan`` for classes without embeddings."""
        return (self.squared_norms - self.sums.square().sum(dim=1) / self.counts).clamp(min=0)

    def required_second(self, name: str) -> Tensor:
        """``second``, for a function that cannot do without it.

        Args:
            name: Of the function, for the error.

        Returns:
            ``(C, D, D)``.

        Raises:
            ValueError: If it is None.
        """
        if self.second is None:
            raise ValueError(
                f"{name} requires moments with second, got None: {described_second(self)}, above second_budget_mb"
            )
        return self.second

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, without ``second`` where it is None."""
        named = ((each.name, getattr(self, each.name)) for each in fields(self) if each.init)
        return {name: value for name, value in named if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "ClassMoments":
        """New moments of the function's value of each sum.

        Args:
            function: Such as ``Tensor.cpu``.

        Returns:
            The moments.
        """
        return ClassMoments(**{name: function(value) for name, value in self.tensors().items()})

    def cached(self, function: Callable[["ClassMoments"], _Result]) -> _Result:
        """Value of a function of these moments, computed once however many metrics use it.

        Args:
            function: Of the module level.

        Returns:
            Its value, until the next :meth:`add_`.
        """
        if function not in self._cache:
            self._cache[function] = function(self)
        value: _Result = self._cache[function]
        return value

    def add_(self, embeddings: Tensor, labels: Tensor, rest: "ClassMoments | None" = None) -> None:
        """Add a batch in place. Apart from the sums themselves, memory does not depend on C.

        Args:
            embeddings: Float tensor ``(N, D)``, used as given.
            labels: Class of each embedding, ``(N,)``, integers in ``0..C - 1``.
            rest: Receives what the additions round off, by Knuth's two-sum. The sum of the two, by :meth:`merge`, then
                has the error of one batch however many batches are added. For float32; float64 does well without.

        Raises:
            ValueError: If a type, shape or label is wrong.
        """
        check_embeddings(embeddings, labels)
        num_classes, dim = self.sums.shape
        if embeddings.shape[1] != dim:
            raise ValueError(f"embeddings must have shape (N, {dim}), got {tuple(embeddings.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels must be in 0..{num_classes - 1} for num_classes={num_classes}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        self._cache.clear()
        for rows, own in zip(embeddings.split(_CHUNK), labels.split(_CHUNK), strict=True):
            self._add_chunk(rows.to(self.sums.dtype), own.long(), rest)

    def _add_chunk(self, embeddings: Tensor, labels: Tensor, rest: "ClassMoments | None") -> None:
        classes, index, counts = labels.unique(return_inverse=True, return_counts=True)  # (P,), (N,), (P,)
        squares = embeddings.square().sum(dim=1)  # (N,)
        by_class = torch.stack((torch.ones_like(squares), squares, squares.square()), dim=1)  # (N, 3)
        number, squared_norms, fourth = class_sums(by_class, index, len(classes)).unbind(dim=1)
        lost = {} if rest is None else rest.tensors()
        _add(self.counts, number, classes, lost.get("counts"))
        _add(self.sums, class_sums(embeddings, index, len(classes)), classes, lost.get("sums"))
        _add(self.squared_norms, squared_norms, classes, lost.get("squared_norms"))
        _add(self.fourth, fourth, classes, lost.get("fourth"))
        _add(self.second_moment, embeddings.mT @ embeddings, None, lost.get("second_moment"))
        if self.second is None:
            return
        step = max(1, _BLOCK // embeddings.shape[1] ** 2)
        for members, indices in class_blocks(index, counts):
            for some, rows in zip(members.split(step), indices.split(step), strict=True):
                block = gather_block(embeddings, rows)  # (G, n, D)
                _add(self.second, block.mT @ block, classes[some], lost.get("second"))

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Moments of the union of two disjoint sets of embeddings.

        Args:
            other: Moments with the same shapes.

        Returns:
            The elementwise sum; without ``second`` unless both have it.

        Raises:
            ValueError: If the numbers of classes or of dimensions differ.
        """
        if self.sums.shape != other.sums.shape:
            raise ValueError(
                f"moments must have the same (C, D) to merge, "
                f"got {tuple(self.sums.shape)} and {tuple(other.sums.shape)}"
            )
        mine, theirs = self.tensors(), other.tensors()
        return ClassMoments(**{name: mine[name] + theirs[name] for name in mine if name in theirs})


def second_size_mb(num_classes: int, embedding_dim: int, dtype: torch.dtype = torch.float64) -> float:
    """Size of ``second`` in MB (10^6 bytes): ``C D^2`` numbers.

    Example:
        >>> second_size_mb(1_000, 128)
        131.072
    """
    return num_classes * embedding_dim**2 * dtype.itemsize / 1e6


def described_second(moments: ClassMoments) -> str:
    """Size of ``second`` in words, whether it is there or not.

    Example:
        >>> described_second(ClassMoments.zeros(10_000, 512))
        'the second moments of 10,000 classes in 512 dimensions take 20,972 MB'
    """
    num_classes, dim = moments.sums.shape
    size = second_size_mb(num_classes, dim, moments.sums.dtype)
    text = f"{size:,.0f}" if size >= 10 else f"{size:.2g}"
    return f"the second moments of {num_classes:,} classes in {dim:,} dimensions take {text} MB"


def _add(total: Tensor, part: Tensor, classes: Tensor | None, rest: Tensor | None) -> None:
    """Add a part in place to the rows of these classes, each of them once; None: to all of them."""
    if rest is None:
        total.add_(part) if classes is None else total.index_add_(0, classes, part)
        return
    rows = slice(None) if classes is None else classes
    before = total[rows]
    after = before + part
    added = after - before
    rest[rows] += (before - (after - added)) + (part - added)  # exactly what the addition rounds off
    total[rows] = after


def class_moments(
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    dtype: torch.dtype = torch.float64,
    second_budget_mb: float = SECOND_BUDGET_MB,
) -> ClassMoments:
    """Class moments of embeddings whose labels are 0..C-1.

    Args:
        embeddings: Float tensor ``(N, D)``, used as given.
        labels: Class of each embedding, ``(N,)``, integers in ``0..num_classes - 1``.
        num_classes: C.
        dtype: Of the sums; float64 unless the device has none.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``; they are None where
            they would be larger.

    Returns:
        The sums; zeros for classes without embeddings.

    Raises:
        ValueError: If a shape, a label or the budget is wrong.

    Example:
        >>> moments = class_moments(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([0, 0, 1]), num_classes=2)
        >>> moments.means.flatten().tolist(), moments.scatter.tolist()
        ([1.0, 9.0], [2.0, 0.0])
    """
    check_embeddings(embeddings, labels)
    sizes = (num_classes, embeddings.shape[1], dtype, embeddings.device, second_budget_mb)
    moments = ClassMoments.zeros(*sizes)
    if dtype == torch.float64:
        moments.add_(embeddings, labels)
        return moments
    rest = ClassMoments.zeros(*sizes)
    moments.add_(embeddings, labels, rest)
    return moments.merge(rest)


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
