"""SimO as an nn.Module: embeddings and labels in, a scalar out."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.distributed import gather_rows, total_over_ranks
from simo_lightning.functional.moments import check_embeddings, class_blocks, class_second_moments
from simo_lightning.functional.prototypes import class_prototypes
from simo_lightning.functional.simo import (
    Classes,
    Form,
    Similarity,
    Total,
    centroid_terms,
    class_centers,
    class_means,
    class_terms,
    group_terms,
    mean_term,
    number_classes,
    pair_terms,
)

#: Smallest and largest ``eps`` where it is None.
EPS, LARGEST_EPS = 0.01, 0.1
#: Embeddings of its class that a prototype counts as, where ``prototype_weight`` is None.
PROTOTYPE_COUNT = 12

Level = Literal["group", "class", "centroid", "pair"]
Reduce = Literal["auto", "gather", "sums"]


class SimOLoss(InitArgumentsMixin, nn.Module):
    """SimO: similar pairs minimize distance per alignment, dissimilar pairs minimize alignment per distance.

    With d the squared distance and o the squared dot product, at each level the loss is

        similar_weight * mean f(d / (eps + o)) + dissimilar_weight * mean f(o / (eps + d)) + mean_weight * means

    with f(x) = x (form "ratio") or log(1 + x) ("log"), or a cross-entropy with logits log(eps + o) - log(eps + d)
    ("softmax"). The level determines the groups over which d and o are means:

    - "group": one class (similar) and all pairs of different classes at once (dissimilar): the paper;
    - "class": one class, and each pair of classes;
    - "centroid": an embedding and its own class center, and an embedding and each other class center;
    - "pair": each pair of embeddings.

    Memory is linear in the batch at every level. Time is linear at the levels group and centroid and quadratic at the
    level pair. The default trained best on validation images; :meth:`softmax` and :meth:`paper` have the defaults of
    two other forms. For batches of 16,000 embeddings or more, :meth:`compile` it.

    The loss is computed in float32 or better whatever the autocast. It performs no communication: for the batch of all
    processes call :meth:`terms_over_ranks`, as SimOModule does, or gather their embeddings first
    (:func:`simo_lightning.distributed.gather_rows`). Classes of one embedding have no similar pair and count for the
    dissimilar side alone. A batch with one class, or none, gives a finite loss with a gradient.

    Args:
        level: Resolution at which the ratio is taken.
        form: Function of the ratio; "softmax" only at the levels centroid and pair.
        eps: Added to every denominator, in units of d and o, > 0. None is 0.01, and more in the log form at the level
            centroid for a batch of more than ten classes: ``(C / 100)^2``, at most 0.1. The largest pull on an
            embedding towards its class, ``1 / sqrt(eps)``, is then ``100 / C``: smaller pulls trained better there.
        orthogonality_leaning: In 0..1: o becomes leaning * o + (1 - leaning); 0 leaves distance alone.
        normalize: Divide each embedding by its length first.
        similar_weight: Weight of the similar side, >= 0; in the softmax form of the whole.
        dissimilar_weight: Weight of the dissimilar side, >= 0; in the softmax form equal to similar_weight. None is
            similar_weight, times C - 1 in the log form of the levels class, centroid and pair for a batch of C classes:
            each dissimilar pair then counts about as much as each similar one.
        mean_weight: Weight of the dissimilar side of Eq. 1 among the class means, >= 0; None is 0.3 at the level
            centroid and 0 elsewhere.
        label_smoothing: Share of the softmax form's target spread over all classes (embeddings at the level pair), in
            0..1.
        prototype_weight: At the level centroid, share of the class's prototype in its center
            (:func:`~simo_lightning.functional.prototypes.class_prototypes`), in 0..1; 0 is the class mean alone, 1 the
            prototype alone. None is 0 except at the level centroid, where the prototype counts as 12 embeddings of its
            class: its share is ``12 / (12 + n)`` for n of them in the batch, since the mean of fewer is noisier.
            Prototypes have length 1: they are meant for normalized embeddings.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> loss = SimOLoss()
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
        >>> loss(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(0.)

    Source:
        arXiv 2410.05233; :meth:`paper` is its form. The levels other than group, the forms log and softmax, prototypes
        and normalization are ours.
    """

    _compiled: Callable[..., dict[str, Tensor]] | None = None

    def __init__(
        self,
        level: Level = "centroid",
        form: Form = "log",
        eps: float | None = None,
        orthogonality_leaning: float = 1.0,
        normalize: bool = True,
        similar_weight: float = 1.0,
        dissimilar_weight: float | None = None,
        mean_weight: float | None = None,
        label_smoothing: float = 0.0,
        prototype_weight: float | None = None,
    ) -> None:
        super().__init__()
        if mean_weight is None:
            mean_weight = 0.3 if level == "centroid" else 0.0
        if prototype_weight is None and level != "centroid":
            prototype_weight = 0.0
        self.level, self.form, self.normalize, self.prototype_weight = level, form, normalize, prototype_weight
        self.eps, self.orthogonality_leaning, self.label_smoothing = eps, orthogonality_leaning, label_smoothing
        self.similar_weight, self.dissimilar_weight, self.mean_weight = similar_weight, dissimilar_weight, mean_weight
        self._check_arguments()

    @classmethod
    def paper(cls, eps: float = 0.01, orthogonality_leaning: float = 1.0) -> Self:
        """The paper's form: group level, ratio, not normalized, the three terms with equal weight.

        Args:
            eps: Added to every denominator; the paper's value is not public.
            orthogonality_leaning: As in the constructor.

        Returns:
            The loss.
        """
        return cls("group", "ratio", eps, orthogonality_leaning, normalize=False, mean_weight=1.0)

    @classmethod
    def softmax(
        cls,
        eps: float = 0.1,
        orthogonality_leaning: float = 1.0,
        normalize: bool = True,
        mean_weight: float = 0.2,
        label_smoothing: float = 0.1,
        prototype_weight: float | None = None,
    ) -> Self:
        """The softmax form at the level centroid: cross-entropy over the classes of the batch.

        The arguments are those of the constructor, with the defaults that trained best for this form.

        Returns:
            The loss.
        """
        return cls(
            "centroid", "softmax", eps, orthogonality_leaning, normalize, mean_weight=mean_weight,
            label_smoothing=label_smoothing, prototype_weight=prototype_weight,
        )  # fmt: skip

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``, of any float dtype.
            labels: Integers ``(N,)``, any values, on the same device.

        Returns:
            Scalar >= 0, float32, or float64 for float64 embeddings.

        Raises:
            ValueError: If a type, shape, dtype or device is wrong, or an embedding is nan or infinite.
        """
        first, *others = self.terms(embeddings, labels).values()
        return sum(others, first)

    def terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted parts of the loss by name; their sum is the loss.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``.

        Returns:
            ``similar`` and ``dissimilar``, or ``softmax``; and ``mean`` where ``mean_weight`` is not 0.

        Raises:
            ValueError: As :meth:`forward`.
        """
        check_embeddings(embeddings, labels)
        _check_finite(embeddings, embeddings)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        if len(embeddings) == 0:
            return {"softmax" if self.form == "softmax" else "similar": embeddings.sum()}
        classes, prototypes = self._number_classes(embeddings, labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            return (self._compiled or self._terms)(embeddings, classes, prototypes)

    def terms_over_ranks(self, embeddings: Tensor, labels: Tensor, reduce: Reduce = "auto") -> dict[str, Tensor]:
        """The terms of the embeddings of all processes, of which each passes its own. Every process calls it.

        Value and gradient are those of :meth:`terms` on the gathered embeddings. The levels centroid, class and group
        need of other processes only sums over each class, which are added up with gradient
        (:func:`~simo_lightning.distributed.total_over_ranks`); each process then compares its own embeddings alone, so
        that its time and the bytes it sends do not grow with the number of processes.

        Args:
            embeddings: This process's, ``(N, D)``; N may differ, and be 0.
            labels: ``(N,)``.
            reduce: "sums", or "gather" for the embeddings themselves; "auto" is the one of fewer bytes: sums of
                ``(C, D)`` numbers at the level centroid, and ``(C, D, D)`` more at class and group. Those of the level
                pair, and of a compiled loss, are gathered.

        Returns:
            As :meth:`terms`, the same on every process.

        Raises:
            ValueError: As :meth:`terms`, on every process; or if ``reduce`` is "sums" and the level is pair, or the
                loss is compiled.
        """
        if reduce not in get_args(Reduce):
            raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}")
        needs_rows = self.level == "pair" or self._compiled is not None
        if reduce == "sums" and needs_rows:
            found = "level 'pair'" if self.level == "pair" else "a compiled loss"
            raise ValueError(f"reduce='sums' requires level centroid, class or group and no compile(), got {found}")
        check_embeddings(embeddings, labels)
        if reduce == "gather" or needs_rows:
            return self.terms(gather_rows(embeddings), gather_rows(labels))
        shared, numbers = _classes_of_all(labels, self.level in ("group", "class"))
        if reduce == "auto" and not self._sums_send_less(shared, embeddings.shape[1]):
            return self.terms(gather_rows(embeddings), gather_rows(labels))
        if len(numbers) == 0:
            return {"softmax" if self.form == "softmax" else "similar": embeddings.sum()}
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        prototypes = None
        if self.prototype_weight != 0:
            prototypes = class_prototypes(numbers, embeddings.shape[1], embeddings.dtype)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self._terms(embeddings, shared, prototypes, total_over_ranks)

    def _sums_send_less(self, classes: Classes, dim: int) -> bool:
        """Whether the sums of all classes, reduced twice, are fewer bytes than all rows, gathered and reduced once.

        A ring sends (W - 1) / W of a tensor to gather it, and twice as much to reduce it.
        """
        per_class = 1 if self.level == "centroid" else 1 + dim
        return 4 * len(classes.counts) * per_class < 3 * int(classes.counts.sum())

    def class_centers(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Class centers of a batch, in the order of the labels, as the level centroid compares embeddings with them.

        Args:
            embeddings: Float tensor ``(N, D)``, in float32 or better.
            labels: Integers ``(N,)``.

        Returns:
            ``(C, D)`` for the C classes that occur.
        """
        classes, prototypes = self._number_classes(embeddings, labels)
        return self._centers(class_means(self.normalized(embeddings), classes), classes, prototypes)

    def normalized(self, embeddings: Tensor) -> Tensor:
        """The embeddings ``(N, D)`` as the loss sees them: divided by their length where ``normalize`` is True."""
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the loss by ``torch.compile``, as a whole graph from the numbered labels to the terms.

        The labels are numbered, and the embeddings checked for nan and infinity, outside the graph.
        Recommended for batches of 16,000 embeddings or more. The value is the same up to rounding.

        Args:
            args: Of ``torch.compile``.
            kwargs: Of ``torch.compile``; ``fullgraph`` is True unless given.
        """
        self._compiled = torch.compile(self._terms, *args, **{"fullgraph": True, **kwargs})

    def extra_repr(self) -> str:
        """The arguments, for printing the module."""
        names = ("eps", "orthogonality_leaning", "normalize", "similar_weight", "dissimilar_weight", "mean_weight")
        values = ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "label_smoothing", "prototype_weight"))
        return f"level={self.level!r}, form={self.form!r}, {values}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not compiled."""
        return {**super().__getstate__(), "_compiled": None}

    def similarity(self, num_classes: int) -> Similarity:
        """The elementwise functions of d and o of this loss, for a batch of that many classes."""
        eps = self.eps
        if eps is None:
            depends = self.form == "log" and self.level == "centroid"
            eps = min(max(num_classes**2 / 10_000, EPS), LARGEST_EPS) if depends else EPS
        return Similarity(self.form, eps, self.orthogonality_leaning)

    def _number_classes(self, embeddings: Tensor, labels: Tensor) -> tuple[Classes, Tensor | None]:
        """The numbered classes and, where they are needed, the prototypes ``(C, D)``."""
        classes = number_classes(labels, blocks=self.level in ("group", "class"))
        if self.prototype_weight == 0:
            return classes, None
        numbers = torch.empty_like(classes.counts).scatter_(0, classes.labels, labels.long())  # (C,) labels of classes
        return classes, class_prototypes(numbers, embeddings.shape[1], embeddings.dtype)

    def _terms(
        self, embeddings: Tensor, classes: Classes, prototypes: Tensor | None, total: Total | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms of numbered classes: what :meth:`compile` compiles.

        ``total`` sums over the processes, each of which has some of the embeddings; None: this one has all of them.
        """
        embeddings, similarity = self.normalized(embeddings), self.similarity(len(classes.counts))
        shared: dict[str, Any] = {} if total is None else {"total": total}
        means = class_means(embeddings, classes, **shared)
        if total is not None:
            _check_finite(means, embeddings)
        if self.level in ("group", "class"):
            second = None
            if total is not None:
                # a process without rows takes part in the backward pass, too
                of_own = class_second_moments(embeddings, classes.blocks, len(means)) + 0 * embeddings.sum()
                second = total(of_own)
            of_level = group_terms if self.level == "group" else class_terms
            terms = of_level(embeddings, classes, means, similarity, second, **shared)
        elif self.level == "centroid":
            centers = self._centers(means, classes, prototypes)
            singles = prototypes is not None
            terms = centroid_terms(embeddings, classes, centers, similarity, self.label_smoothing, singles, **shared)
        else:
            terms = pair_terms(embeddings, classes, means, similarity, self.label_smoothing)
        if self.mean_weight:
            terms["mean"] = mean_term(means, similarity)
        weights = {"dissimilar": self._dissimilar_weight(len(means)), "mean": self.mean_weight}
        return {name: weights.get(name, self.similar_weight) * term for name, term in terms.items()}

    def _centers(self, means: Tensor, classes: Classes, prototypes: Tensor | None) -> Tensor:
        """Class centers ``(C, D)`` of class means."""
        counts = classes.counts.to(means.dtype).unsqueeze(1)  # (C, 1)
        share = PROTOTYPE_COUNT / (PROTOTYPE_COUNT + counts) if self.prototype_weight is None else self.prototype_weight
        return class_centers(means, prototypes, share)

    def _dissimilar_weight(self, classes: int) -> float:
        if self.dissimilar_weight is not None:
            return self.dissimilar_weight
        by_pair = self.form == "log" and self.level != "group"
        return self.similar_weight * (classes - 1 if by_pair else 1)

    def _check_arguments(self) -> None:
        for name, value, known in (("level", self.level, Level), ("form", self.form, Form)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be finite and > 0, got {self.eps}")
        for name in ("orthogonality_leaning", "label_smoothing", "prototype_weight"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must be in 0..1, got {share}")
        for name in ("similar_weight", "dissimilar_weight", "mean_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.prototype_weight and self.level != "centroid":
            raise ValueError(f"prototype_weight must be 0 or None unless level='centroid', got {self.prototype_weight}")
        self._check_softmax()

    def _check_softmax(self) -> None:
        if self.form != "softmax":
            if self.label_smoothing:
                raise ValueError(f"label_smoothing must be 0 unless form='softmax', got {self.label_smoothing}")
            return
        if self.level not in ("centroid", "pair"):
            raise ValueError(f"form 'softmax' requires level 'centroid' or 'pair', got level {self.level!r}")
        if self.dissimilar_weight not in (None, self.similar_weight):
            raise ValueError(
                "form 'softmax' has one term for both sides: similar_weight and dissimilar_weight must be equal, "
                f"got {self.similar_weight} and {self.dissimilar_weight}"
            )


def _classes_of_all(labels: Tensor, blocks: bool) -> tuple[Classes, Tensor]:
    """The classes of all processes, numbered in the order of their labels, and these labels ``(C,)``.

    Labels of the classes are those of this process's embeddings, counts those of all. Each process sends the labels
    that it has, and how often.
    """
    own, counts = labels.long().unique(return_counts=True)
    gathered = gather_rows(torch.stack([own, counts], dim=1))  # (classes of each process, 2)
    numbers, place = gathered[:, 0].unique(return_inverse=True)
    total = torch.zeros_like(numbers).index_add_(0, place, gathered[:, 1])
    index = torch.searchsorted(numbers, labels.long())
    own_blocks = class_blocks(index, torch.bincount(index, minlength=len(numbers))) if blocks else ()
    return Classes(index, total, own_blocks), numbers


def _check_finite(total: Tensor, embeddings: Tensor) -> None:
    """Raise unless a `total` that includes all `embeddings` is finite; the message counts the rows of these."""
    if math.isfinite(float(total.detach().sum())):
        return  # a finite sum has no nan or inf in it, and is cheaper than a test of each number
    finite = embeddings.detach().isfinite().all(dim=1)
    if not total.isfinite().all() and finite.all():  # of all processes: every one of them raises
        raise ValueError("embeddings must be finite, got nan or inf on another process, or sums that overflow")
    if not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        raise ValueError(
            f"embeddings must be finite, got nan or inf in {len(bad)} of {len(embeddings)} rows, first in row {bad[0]}"
        )
