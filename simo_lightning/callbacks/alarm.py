"""Report each collapse of the embeddings once, and each recovery once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from simo_lightning.callbacks.evaluation import class_names
from simo_lightning.callbacks.moments import ClassMomentsCallback
from simo_lightning.functional.geometry import (
    class_separation_blocks,
    effective_rank,
    rank_share,
    rms_norm,
    spread_share,
)
from simo_lightning.functional.moments import SECOND_BUDGET_MB, ClassMoments

# A reported finding counts as recovered at this factor beyond its limit, so that noise at the limit is not reported.
_SLACK = 1.2
_MOST_LISTED = 10  # classes of a group, and groups, that a message lists


@dataclass(frozen=True)
class _Findings:
    """What has collapsed.

    Attributes:
        names: Some of nan, norm, point and rank.
        merged: Which two classes are merged, bool ``(C, C)``, symmetric. Of 10,000 classes there are 50 million pairs.
    """

    names: frozenset[str]
    merged: Tensor

    def __or__(self, other: "_Findings") -> "_Findings":
        return _Findings(self.names | other.names, self.merged | other.merged)

    def __and__(self, other: "_Findings") -> "_Findings":
        return _Findings(self.names & other.names, self.merged & other.merged)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint, a bit per pair."""
        bits = torch.from_numpy(np.packbits(self.merged.numpy()))
        return {"names": sorted(self.names), "num_classes": len(self.merged), "merged": bits}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "_Findings":
        """The findings that :meth:`state` returned."""
        size = state["num_classes"]
        bits = np.unpackbits(state["merged"].cpu().numpy(), count=size * size)
        return cls(frozenset(state["names"]), torch.from_numpy(bits).bool().view(size, size))


class CollapseAlarm(ClassMomentsCallback):
    """Warn when the embeddings collapse: to low rank, to one point, to an extreme norm, or classes into one another.

    - nan: a value is not finite.
    - norm: the RMS norm of the embeddings is outside ``smallest_norm``..``largest_norm``.
    - point: less than ``min_spread`` of the mean squared norm is variance
      (:func:`~simo_lightning.functional.geometry.spread_share`).
    - rank: ``(effective rank - 1) / (min(C, D) - 1)`` is below ``min_rank``; 0 is one line through the origin, 1 as
      many dimensions as classes (:func:`~simo_lightning.functional.geometry.rank_share`).
    - classes merged: their means are less than ``min_separation`` spreads apart, where the spread is that of the two
      classes along the line between the means; 0.5 means that the nearer mean is right for 60 % of them, 50 % being
      chance (:func:`~simo_lightning.functional.geometry.class_separation`). Above ``second_budget_mb`` the spread is
      the pooled one of all classes.

    Each finding is reported once, when two consecutive evaluations have it (nan: at once), and its recovery once, when
    two consecutive evaluations are 1.2 times beyond the limit. So a few images at the limit are not reported. Training
    and validation are evaluated separately: a finding is reported when the first of the two has it, and has recovered
    when neither has. A message lists at most ten groups of classes and ten classes of each.

    Every evaluation logs ``val/collapsed_classes``, ``test/...`` or with ``every_n_steps`` ``train/...``: how many
    classes are merged with another one, in all embeddings of the epoch or, in training, since the last evaluation (see
    :class:`~simo_lightning.callbacks.moments.ClassMomentsCallback`). ``trainer.validate`` and ``trainer.test`` report
    findings without a warning.

    Args:
        after_epochs: Epochs of training before the first alarm; before training all classes are merged.
        action: "stop" also ends the training.
        min_rank: In 0..1.
        min_spread: In 0..1.
        min_separation: In spreads, > 0.
        smallest_norm: Of the embeddings, > 0.
        largest_norm: Of the embeddings.
        num_classes: C; None: ``trainer.datamodule.num_classes``, else one more than the largest label. Messages use
            the data module's ``class_names`` if it has them.
        every_n_epochs: Epochs of training from one evaluation of validation to the next.
        every_n_steps: Optimizer steps from one evaluation of training batches to the next; None: none.
        second_budget_mb: Largest size in MB of the second moments of each class, ``(C, D, D)``, which give the spread
            of each class.

    Raises:
        ValueError: If an argument is out of its range; and at the start of a run, if its steps return no embeddings.
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
        second_budget_mb: float = SECOND_BUDGET_MB,
    ) -> None:
        super().__init__(num_classes, every_n_epochs, every_n_steps, second_budget_mb)
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
        self._reported: dict[str, _Findings] = {}  # by stage: reported and not recovered since
        self._last: dict[str, _Findings] = {}  # by stage: those of the last evaluation

    @property
    def collapsed(self) -> frozenset[tuple[str | int, ...]]:
        """What is reported and has not recovered, such as ``("rank",)`` and ``("merged", 3, 5)``."""
        names = {(name,) for findings in self._reported.values() for name in findings.names}
        pairs = (findings.merged.triu().nonzero().tolist() for findings in self._reported.values())
        return frozenset(names) | {("merged", a, b) for some in pairs for a, b in some}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            key: {stage: findings.state() for stage, findings in by_stage.items()}
            for key, by_stage in (("reported", self._reported), ("last", self._last))
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reported, self._last = (
            {stage: _Findings.of_state(state) for stage, state in state_dict[key].items()}
            for key in ("reported", "last")
        )

    @override
    def evaluate(self, trainer: Trainer, stage: str, moments: ClassMoments) -> dict[str, Tensor]:
        num_classes = len(moments.counts)
        for by_stage in (self._reported, self._last):  # of a checkpoint whose data had other classes
            for other in [key for key, findings in by_stage.items() if len(findings.merged) != num_classes]:
                del by_stage[other]
        none = _Findings(frozenset(), torch.zeros(1, dtype=torch.bool).expand(num_classes, num_classes))  # one byte
        margins = self._margins(moments)
        merged, nearly = none.merged, none.merged
        if "nan" not in margins:
            merged, nearly = _less_separated(moments, (self.min_separation, _SLACK * self.min_separation))
        findings = _below_limit(margins, merged, nearly, none)
        names = class_names(trainer, num_classes)
        if trainer.state.fn != TrainerFn.FITTING:
            found = _describe(moments, findings.names, _merged_groups(findings.merged), names)
            if found:
                rank_zero_info(f"{stage} embeddings are collapsed: {found}")
        else:
            reported, last = self._reported.get(stage, none), self._last.get(stage, none)
            current = self._last[stage] = _below_limit(margins, merged, nearly, reported)
            if trainer.current_epoch >= self.after_epochs:
                before = self._all_reported(none)
                confirmed = _Findings(last.names | {"nan"}, last.merged)  # nan needs no second evaluation
                self._reported[stage] = (reported & (current | last)) | (current & confirmed)
                self._report(trainer, stage, moments, before, self._all_reported(none), names)
        collapsed = findings.merged.any(dim=1).sum().float()
        return {"collapsed_classes": torch.full_like(collapsed, float("nan")) if "nan" in findings.names else collapsed}

    def _all_reported(self, none: _Findings) -> _Findings:
        for findings in self._reported.values():
            none = none | findings
        return none

    def _margins(self, moments: ClassMoments) -> dict[str, float]:
        """Values by name in units of their limits, below 1 where collapsed and nan where undefined."""
        if not moments.squared_norms.isfinite().all():
            return {"nan": 0.0}
        norm = float(rms_norm(moments))
        return {
            "norm": min(norm / self.smallest_norm, self.largest_norm / norm) if norm else 0.0,
            "point": float(spread_share(moments)) / self.min_spread,
            "rank": float(rank_share(moments)) / self.min_rank,
        }

    def _report(
        self,
        trainer: Trainer,
        stage: str,
        moments: ClassMoments,
        before: _Findings,
        now: _Findings,
        names: Sequence[str],
    ) -> None:
        when = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        recovered: list[str] = [name for name in ("nan", "norm", "point", "rank") if name in before.names - now.names]
        free = (before.merged.any(dim=1) & ~now.merged.any(dim=1)).nonzero().flatten().tolist()
        if free:
            recovered.append(f"classes {_listed([names[label] for label in free], ', ')}")
        if recovered:
            rank_zero_info(f"{when}: recovered from collapse: {'; '.join(recovered)}")
        known = {label: index for index, group in enumerate(_merged_groups(before.merged)) for label in group}
        # a group is new unless all its classes were merged, directly or through others, before
        new_groups = [
            group
            for group in _merged_groups(now.merged)
            if known.get(group[0]) is None or any(known.get(label) != known[group[0]] for label in group)
        ]
        new = _describe(moments, now.names - before.names, new_groups, names)
        if new:
            message = f"{when}: {stage} embeddings collapsed: {new}"
            rank_zero_warn(f"{message}; training stops" if self.action == "stop" else message)
            trainer.should_stop |= self.action == "stop"


def _less_separated(moments: ClassMoments, limits: Sequence[float]) -> list[Tensor]:
    """Which two classes are separated by less than each limit, bool (C, C); False where that is undefined."""
    num_classes = len(moments.counts)
    found = [torch.zeros(num_classes, num_classes, dtype=torch.bool) for _ in limits]
    for rows, columns, separation in class_separation_blocks(moments):
        for below, limit in zip(found, limits, strict=True):
            block = separation < limit
            below[rows, columns] = block
            below[columns, rows] = block.mT
    return found


def _below_limit(margins: dict[str, float], merged: Tensor, nearly: Tensor, reported: _Findings) -> _Findings:
    """What has collapsed; undefined values have not. Where a value is not finite, all that was reported stays."""
    if "nan" in margins:
        return _Findings(reported.names | {"nan"}, reported.merged)
    names = (name for name, margin in margins.items() if margin < (_SLACK if name in reported.names else 1))
    return _Findings(frozenset(names), merged | (reported.merged & nearly))


def _merged_groups(merged: Tensor) -> list[list[int]]:
    """Sorted groups of the classes that are merged, directly or through others: connected components of (C, C)."""
    groups, left = [], merged.any(dim=1)
    while left.any():
        group, added = torch.zeros_like(left), torch.zeros_like(left)
        added[left.nonzero()[0]] = True
        while added.any():
            group |= added
            added = merged[added].any(dim=0) & ~group
        groups.append(group.nonzero().flatten().tolist())
        left &= ~group
    return groups


def _describe(
    moments: ClassMoments, findings: frozenset[str], groups: Sequence[Sequence[int]], names: Sequence[str]
) -> str:
    """The findings in one line with their numbers, without those that another one implies; empty if there are none."""
    if "nan" in findings:
        return "nan or infinite values"
    present, dim = int((moments.counts > 0).sum()), moments.sums.shape[1]
    parts = []
    if "norm" in findings:
        parts.append(f"RMS norm {float(rms_norm(moments)):.3g}")
    if "point" in findings:
        parts.append(f"all at one point (variance is {float(spread_share(moments)):.2g} of the mean square)")
        return "; ".join(parts)
    if "rank" in findings:
        rank = float(effective_rank(moments))
        parts.append(f"effective rank {rank:.2f} for {present} classes in {dim} dimensions")
    if groups and len(groups[0]) == present:
        parts.append(f"all {present} classes merged")
    elif groups:
        listed = [_listed([names[label] for label in group], " = ") for group in groups]
        parts.append(f"classes merged: {_listed(listed, '; ')}")
    return "; ".join(parts)


def _listed(items: Sequence[str], separator: str) -> str:
    more = len(items) - _MOST_LISTED
    return separator.join([*items[:_MOST_LISTED], f"{more} more"] if more > 0 else items)
