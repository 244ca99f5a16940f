"""Report what has collapsed, once, and that it has recovered, once."""

from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.moments import ClassMomentsCallback
from simo_lightning.functional.geometry import class_separation, effective_rank, rank_share, rms_norm, spread_share
from simo_lightning.functional.moments import ClassMoments

# One thing that has collapsed: ("nan",), ("norm",), ("point",), ("rank",), or ("merged", a, b) for classes a < b.
Finding = tuple[str | int, ...]
Findings = frozenset[Finding]
_NONE: Findings = frozenset()
_NAN: Findings = frozenset({("nan",)})
# What has been reported counts as recovered at this factor beyond its limit: noise at the limit is not reported.
_SLACK = 1.2


class CollapseAlarm(ClassMomentsCallback):
    """Warn when the embeddings collapse, naming what: their rank, to one point, their norm, or which classes merged.

    - nan: a value is not finite.
    - norm: the RMS norm of the embeddings is outside ``smallest_norm``..``largest_norm``.
    - point: less than ``min_spread`` of the mean squared norm is variance
      (:func:`~simo_lightning.functional.geometry.spread_share`).
    - rank: ``(effective rank - 1) / (min(C, D) - 1)`` is below ``min_rank``; 0 is one line through the origin, 1 as
      many dimensions as classes (:func:`~simo_lightning.functional.geometry.rank_share`).
    - classes merged: their means are less than ``min_separation`` spreads apart, where the spread is that of the two
      classes along the line between the means; 0.5 means that the nearer mean is right for 60 % of them, 50 % being
      chance (:func:`~simo_lightning.functional.geometry.class_separation`).

    Each finding is reported once, when two evaluations in a row have it (nan: at once), and its recovery once, when two
    in a row no longer have it; what has been reported has to get 1.2 times beyond its limit for that. So a few images
    at the limit are not reported. Where training batches are evaluated too, their findings are kept apart from those of
    validation: a finding is reported when the first of the two has it, and recovered when neither has.

    Every evaluation logs ``val/collapsed_classes``, ``test/...`` or with ``every_n_steps`` ``train/...``: how many
    classes are merged with another one, in all embeddings of the epoch or, in training, since the last evaluation (see
    :class:`~simo_lightning.callbacks.moments.ClassMomentsCallback`). ``trainer.validate`` and ``trainer.test`` report
    findings without a warning. A module whose steps return no embeddings is not evaluated.

    Args:
        after_epochs: Epochs of training before the first alarm; in the beginning all classes are merged.
        action: "stop" also ends the training.
        min_rank: In 0..1.
        min_spread: In 0..1.
        min_separation: In spreads, > 0.
        smallest_norm: Of the embeddings, > 0.
        largest_norm: Of the embeddings.
        num_classes: C; None: ``trainer.datamodule.num_classes``. Classes have names where the data module has
            ``class_names``.
        every_n_epochs: Epochs of training from one evaluation of validation to the next.
        every_n_steps: Optimizer steps from one evaluation of training batches to the next; None: none.

    Raises:
        ValueError: If an argument is out of its range; and when the first embeddings come, if the number of classes is
            unknown.
    """

    def __init__(
        self,
        after_epochs: int = 2,
        action: Literal["warn", "stop"] = "warn",
        min_rank: float = 0.2,
        min_spread: float = 0.02,
        min_separation: float = 0.5,
        smallest_norm: float = 1e-4,
        largest_norm: float = 1e4,
        num_classes: int | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(num_classes, every_n_epochs, every_n_steps)
        if after_epochs < 0:
            raise ValueError(f"after_epochs must be at least 0, got {after_epochs}")
        if action not in ("warn", "stop"):
            raise ValueError(f"action must be 'warn' or 'stop', got {action!r}")
        for name, value in (("min_rank", min_rank), ("min_spread", min_spread)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if min_separation <= 0:
            raise ValueError(f"min_separation must be positive, got {min_separation}")
        if not 0 < smallest_norm < largest_norm:
            raise ValueError(
                f"smallest_norm must be positive and below largest_norm, got {smallest_norm} and {largest_norm}"
            )
        self.after_epochs = after_epochs
        self.action = action
        self.min_rank, self.min_spread, self.min_separation = min_rank, min_spread, min_separation
        self.smallest_norm, self.largest_norm = smallest_norm, largest_norm
        self._reported: dict[str, Findings] = {}  # by stage, and not recovered
        self._last: dict[str, Findings] = {}  # of the last evaluation

    @property
    def collapsed(self) -> Findings:
        """What is reported and has not recovered: findings such as ``("rank",)`` and ``("merged", 3, 5)``."""
        return frozenset().union(*self._reported.values())

    @override
    def state_dict(self) -> dict[str, Any]:
        def lists(findings: dict[str, Findings]) -> dict[str, list[list[str | int]]]:
            return {stage: [list(finding) for finding in sorted(some, key=str)] for stage, some in findings.items()}

        return {"reported": lists(self._reported), "last": lists(self._last)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def sets(lists: dict[str, list[list[str | int]]]) -> dict[str, Findings]:
            return {stage: frozenset(tuple(finding) for finding in some) for stage, some in lists.items()}

        self._reported, self._last = sets(state_dict["reported"]), sets(state_dict["last"])

    @override
    def evaluate(self, trainer: Trainer, stage: str, moments: ClassMoments) -> dict[str, Tensor]:
        margins = self._margins(moments)
        findings = _below_limit(margins)
        names: list[str] | None = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if trainer.state.fn != TrainerFn.FITTING:
            if findings:
                rank_zero_info(f"{stage} embeddings are collapsed: {_describe(moments, findings, names)}")
        else:
            reported = self._reported.get(stage, _NONE)
            current, last = _below_limit(margins, reported), self._last.get(stage, _NONE)
            self._last[stage] = current
            if trainer.current_epoch >= self.after_epochs:
                before = self.collapsed
                self._reported[stage] = (reported & (current | last)) | (current & (last | _NAN))
                self._report(trainer, stage, moments, before, names)
        merged = float("nan") if findings == _NAN else sum(map(len, _merged_groups(findings)))
        return {"collapsed_classes": moments.counts.new_tensor(merged).float()}

    def _margins(self, moments: ClassMoments) -> dict[Finding, float]:
        """Everything that may have collapsed in units of its limit, below 1 where it has; nan where undefined."""
        if not moments.squared_norms.isfinite().all():
            return {("nan",): 0.0}
        norm = float(rms_norm(moments))
        margins: dict[Finding, float] = {
            ("norm",): min(norm / self.smallest_norm, self.largest_norm / norm) if norm else 0.0,
            ("point",): float(spread_share(moments)) / self.min_spread,
            ("rank",): float(rank_share(moments)) / self.min_rank,
        }
        separation = class_separation(moments) / self.min_separation  # (C, C)
        for a, b in (separation < _SLACK).triu(diagonal=1).nonzero().tolist():
            margins["merged", a, b] = float(separation[a, b])
        return margins

    def _report(
        self, trainer: Trainer, stage: str, moments: ClassMoments, before: Findings, names: list[str] | None
    ) -> None:
        when = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        recovered = _recovered(before, self.collapsed, names)
        if recovered:
            rank_zero_info(f"{when}: recovered from collapse: {recovered}")
        new = _new(before, self.collapsed)
        if new:
            message = f"{when}: {stage} embeddings collapsed: {_describe(moments, new, names)}"
            rank_zero_warn(f"{message}; training stops" if self.action == "stop" else message)
            trainer.should_stop |= self.action == "stop"


def _below_limit(margins: dict[Finding, float], reported: Findings = _NONE) -> Findings:
    """What has collapsed; what is undefined has not. Where a value is not finite, all that was reported stays."""
    if ("nan",) in margins:
        return reported | _NAN
    return frozenset(finding for finding, margin in margins.items() if margin < (_SLACK if finding in reported else 1))


def _merged_groups(findings: Findings) -> list[list[int]]:
    """Sorted groups of the classes that are merged, directly or through others."""
    groups: list[set[int]] = []
    for pair in ({int(label) for label in finding[1:]} for finding in findings if finding[0] == "merged"):
        touched = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
    return sorted(sorted(group) for group in groups)


def _new(before: Findings, now: Findings) -> Findings:
    """Findings that are new; of merged pairs all those of a group that was not merged, directly or not, before."""
    known = [set(group) for group in _merged_groups(before)]
    new = [set(group) for group in _merged_groups(now) if not any(set(group) <= one for one in known)]
    return frozenset(
        finding
        for finding in now
        if (any(finding[1] in group for group in new) if finding[0] == "merged" else finding not in before)
    )


def _recovered(before: Findings, now: Findings, names: list[str] | None) -> str:
    """What has recovered, in words; empty if nothing has."""
    parts = [str(kind) for kind in ("nan", "norm", "point", "rank") if (kind,) in before - now]
    free = sorted(set().union(*_merged_groups(before)) - set().union(*_merged_groups(now)))
    if free:
        parts.append(f"classes {', '.join(names[label] if names else str(label) for label in free)}")
    return "; ".join(parts)


def _describe(moments: ClassMoments, findings: Findings, names: list[str] | None) -> str:
    """The findings in one line with their numbers, without those that another one implies."""
    if ("nan",) in findings:
        return "nan or infinite values"
    present, dim = int((moments.counts > 0).sum()), moments.sums.shape[1]
    parts = []
    if ("norm",) in findings:
        parts.append(f"RMS norm {float(rms_norm(moments)):.3g}")
    if ("point",) in findings:
        parts.append(f"all at one point (variance is {float(spread_share(moments)):.2g} of the mean square)")
        return "; ".join(parts)
    if ("rank",) in findings:
        rank = float(effective_rank(moments))
        parts.append(f"effective rank {rank:.2f} for {present} classes in {dim} dimensions")
    groups = _merged_groups(findings)
    if groups and len(groups[0]) == present:
        parts.append(f"all {present} classes merged")
    elif groups:
        named = [" = ".join(names[label] if names else str(label) for label in group) for group in groups]
        parts.append(f"classes merged: {'; '.join(named)}")
    return "; ".join(parts)
