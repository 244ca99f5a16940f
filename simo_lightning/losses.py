"""SimO as an nn.Module: embeddings and labels in, a scalar out."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.functional.centroids import centroid_terms
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.functional.pairs import pair_terms
from simo_lightning.functional.simo import Batch, Exchange, Form, class_terms, group_terms, means_term

Level = Literal["group", "class", "centroid", "pair"]
# What trained best in sketches on the validation split of CIFAR-10, unless said otherwise; at the centroid level.
_EPS: dict[str, float] = {"log": 0.01}
_OTHER_EPS = 0.1
_SOFTMAX_SMOOTHING = 0.1
_FRAMES: dict[str, float] = {"log": 0.5, "softmax": 0.5}
_MEAN_WEIGHTS: dict[str, float] = {"log": 0.3, "softmax": 0.2}


class SimOLoss(InitArgumentsMixin, nn.Module):
    """SimO: similar pairs lose distance per alignment, dissimilar pairs lose alignment per distance.

    With d the squared distance and o the squared dot product, at each level the loss is

        similar_weight * mean f(d / (eps + o)) + dissimilar_weight * mean f(o / (eps + d)) + mean_weight * means

    with f(x) = x (form "ratio") or log(1 + x) ("log"), or a cross-entropy with logits log(eps + o) - log(eps + d)
    ("softmax"). The levels say what d and o belong to:

    - "group": one class (similar) and all pairs of different classes at once (dissimilar): the paper;
    - "class": one class, and each pair of classes;
    - "centroid": a sample and its own class mean, and a sample and each other class mean;
    - "pair": each pair of samples.

    group, class and centroid cost time and memory linear in the batch; pair is quadratic in time, linear in memory.
    Computed in float32 or better whatever the autocast. It asks for no rank: gather the embeddings of all processes
    first (:func:`simo_lightning.distributed.gather_rows`) and the value and gradient are those of the global batch.

    Classes of one sample have no similar pair and count for the dissimilar side alone. A batch with one class, or
    none, gives a finite loss with a gradient.

    Args:
        level: At which resolution the ratio is taken.
        form: What is made of a ratio; "softmax" at the levels centroid and pair.
        eps: Added to every denominator, in units of d and o, > 0; None is 0.01 in the log form and 0.1 in the others.
        orthogonality_leaning: In 0..1: o becomes leaning * o + (1 - leaning); 0 leaves distance alone.
        normalize: Divide each embedding by its length first.
        similar_weight: Weight of the similar side, >= 0; in the softmax form of the whole.
        dissimilar_weight: Weight of the dissimilar side, >= 0; in the softmax form equal to similar_weight. None is
            similar_weight, and in the log form of the levels class, centroid and pair as many times that as the batch
            has other classes: each dissimilar pair then counts about as much as each similar one.
        mean_weight: Weight of the dissimilar side of Eq. 1 among the class means, >= 0; None is, at the level centroid,
            0.3 in the log form and 0.2 in the softmax form, and 0 elsewhere.
        label_smoothing: Share of the softmax form's target spread over all classes (rows at the level pair), in 0..1;
            None is 0.1 in the softmax form and 0 in the others, which have no target to smooth.
        frame: At the level centroid, share of the class's own axis in its centre
            (:func:`~simo_lightning.functional.frame.class_axes`), in 0..1; 1 leaves the axis alone. None is 0.5 in that
            level's forms log and softmax and 0 elsewhere. The axes are of length 1: they are meant for normalised
            embeddings.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> loss = SimOLoss()
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
        >>> loss(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(0.)

    Source:
        arXiv 2410.05233; :meth:`paper` is its form. The levels below the group, the forms log and softmax, the frame
        and the normalisation are ours, and so is the default: what trained best (centroid, log, frame).
    """

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
        label_smoothing: float | None = None,
        frame: float | None = None,
    ) -> None:
        super().__init__()
        centroid = level == "centroid"
        if eps is None:
            eps = _EPS.get(form, _OTHER_EPS)
        if label_smoothing is None:
            label_smoothing = _SOFTMAX_SMOOTHING if form == "softmax" else 0.0
        if frame is None:
            frame = _FRAMES.get(form, 0.0) if centroid else 0.0
        if mean_weight is None:
            mean_weight = _MEAN_WEIGHTS.get(form, 0.0) if centroid else 0.0
        self.level, self.form, self.normalize, self.frame = level, form, normalize, frame
        self.eps, self.orthogonality_leaning, self.label_smoothing = eps, orthogonality_leaning, label_smoothing
        self.similar_weight, self.dissimilar_weight, self.mean_weight = similar_weight, dissimilar_weight, mean_weight
        self._check_arguments()

    @classmethod
    def paper(cls, eps: float = 0.01) -> "SimOLoss":
        """The paper's form: group level, ratio, not normalised, the three terms with equal weight.

        Args:
            eps: Added to every denominator; the paper's value is not public.

        Returns:
            The loss.
        """
        return cls(level="group", form="ratio", eps=eps, normalize=False, mean_weight=1.0)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``, of any float dtype.
            labels: Integers ``(N,)``, any values.

        Returns:
            Scalar >= 0, float32, or float64 for float64 embeddings.

        Raises:
            ValueError: If a shape or dtype is wrong, or an embedding is nan or infinite.
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
        _check_finite(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            if len(embeddings) == 0:
                return {"similar": embeddings.sum()}
            terms, means = self._level_terms(embeddings, labels)
            if self.mean_weight:
                terms |= means_term(means, self._exchange)
        weights = {"dissimilar": self._dissimilar_weight(len(means)), "mean": self.mean_weight}
        weights = {name: weights.get(name, self.similar_weight) for name in terms}
        return {name: term if weights[name] == 1 else weights[name] * term for name, term in terms.items()}

    def extra_repr(self) -> str:
        """The arguments, for printing the module."""
        return (
            f"level={self.level!r}, form={self.form!r}, eps={self.eps}, "
            f"orthogonality_leaning={self.orthogonality_leaning}, normalize={self.normalize}, weights="
            f"({self.similar_weight}, {self.dissimilar_weight}, {self.mean_weight}), "
            f"label_smoothing={self.label_smoothing}, frame={self.frame}"
        )

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.form, self.eps, self.orthogonality_leaning)

    def _dissimilar_weight(self, classes: int) -> float:
        if self.dissimilar_weight is not None:
            return self.dissimilar_weight
        by_pair = self.form == "log" and self.level != "group"
        return self.similar_weight * (classes - 1 if by_pair else 1)

    def _level_terms(self, embeddings: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the level, and the class means."""
        exchange, smoothing = self._exchange, self.label_smoothing
        if self.level == "centroid":
            return centroid_terms(embeddings, labels, exchange, smoothing, self.frame, self.normalize)
        batch = Batch.of(embeddings, labels, self.normalize)
        if self.level == "group":
            return group_terms(batch, exchange), batch.means
        if self.level == "class":
            return class_terms(batch, exchange), batch.means
        return pair_terms(batch, exchange, smoothing), batch.means

    def _check_arguments(self) -> None:
        for name, value, known in (("level", self.level, Level), ("form", self.form, Form)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")
        for name in ("orthogonality_leaning", "label_smoothing", "frame"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("similar_weight", "dissimilar_weight", "mean_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.frame and self.level != "centroid":
            raise ValueError(f"frame must be 0 or None unless level='centroid', got {self.frame}")
        self._check_softmax()

    def _check_softmax(self) -> None:
        if self.form != "softmax":
            if self.label_smoothing:
                raise ValueError(f"label_smoothing must be 0 or None unless form='softmax', got {self.label_smoothing}")
            return
        if self.level not in ("centroid", "pair"):
            raise ValueError(f"form 'softmax' needs level 'centroid' or 'pair', got level {self.level!r}")
        if self.dissimilar_weight not in (None, self.similar_weight):
            raise ValueError(
                "form 'softmax' has one term for both sides: similar_weight and dissimilar_weight must be equal, "
                f"got {self.similar_weight} and {self.dissimilar_weight}"
            )


def _check_finite(embeddings: Tensor) -> None:
    if math.isfinite(float(embeddings.detach().sum())):
        return  # neither nan nor inf hides in a finite sum, which is cheaper than a test of each number
    finite = embeddings.detach().isfinite().all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        raise ValueError(
            f"embeddings must be finite, got nan or inf in {len(bad)} of {len(embeddings)} rows, first in row {bad[0]}"
        )
