"""Say once what has collapsed, and once that it has recovered."""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from simo_lightning.callbacks.collapse import (
    Fact,
    Limits,
    describe_collapse,
    find_collapse,
    measure_collapse,
    merged_groups,
)
from simo_lightning.callbacks.moments import MomentsWatcher
from simo_lightning.functional.moments import ClassMoments


class CollapseAlarm(MomentsWatcher):
    """Warn when the embeddings collapse, naming what: their rank, to one point, their norm, or which classes merged.

    - nan: a value is not finite.
    - norm: the RMS norm of the embeddings is outside ``smallest_norm``..``largest_norm``.
    - point: less than ``min_spread`` of the mean squared norm is variance.
    - rank: ``(effective rank - 1) / (min(C, D) - 1)`` is below ``min_rank``; 0 is one line through the origin, 1 as
      many dimensions as classes.
    - classes merged: their means are less than ``min_separation`` spreads apart, where the spread is that of the two
      classes along the line between the means; 0.5 means that the nearer mean is right for 60 % of them, 50 % being
      chance (:func:`~simo_lightning.callbacks.collapse.class_separation`).

    Each is said once, when two looks in a row have found it (nan: at once), and once more when two in a row no longer
    do; what has been said has to get 1.2 times beyond its limit for that. So a few images at the limit are no news.
    Where training batches are judged too, each has looks of its own; something is said when the first of the two has
    it, and recovered when neither has.

    Every look logs ``val/collapsed_classes``, ``test/...`` or with ``every_n_steps`` ``train/...``: how many classes
    are merged with another, in all embeddings of the epoch or, in training, since the last look (see
    :class:`~simo_lightning.callbacks.moments.MomentsWatcher`). Validation and test by themselves say what they find,
    without a warning. A module whose steps return no embeddings is left alone.

    Args:
        after_epochs: Epochs of training before the first alarm; in the beginning all classes are merged.
        action: "stop" also ends the training.
        min_rank: In 0..1.
        min_spread: In 0..1.
        min_separation: In spreads, >= 0.
        smallest_norm: Of the embeddings, > 0.
        largest_norm: Of the embeddings.
        num_classes: C; None: ``trainer.datamodule.num_classes``. Classes have names where the data module has
            ``class_names``.
        every_n_epochs: Epochs of training from one look at validation to the next.
        every_n_steps: Steps of the optimizer from one look at training batches to the next; None: no look.

    Raises:
        ValueError: If an argument is out of its range; and when the first embeddings come, if the number of classes is
            not known.
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
        self.limits = Limits(min_rank, min_spread, min_separation, smallest_norm, largest_norm)
        self._said: dict[str, frozenset[Fact]] = {}  # by stage
        self._found: dict[str, frozenset[Fact]] = {}  # in its last look

    @property
    def collapsed(self) -> frozenset[Fact]:
        """What has been said and has not recovered: facts such as ``("rank",)`` and ``("merged", 3, 5)``."""
        return frozenset().union(*self._said.values())

    def state_dict(self) -> dict[str, Any]:
        """What has been said and found, so that a run that goes on neither repeats nor forgets.

        Returns:
            Lists of facts.
        """
        return {"said": _as_lists(self._said), "found": _as_lists(self._found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on.

        Args:
            state_dict: Of :meth:`state_dict`.
        """
        self._said, self._found = _as_sets(state_dict["said"]), _as_sets(state_dict["found"])

    def judge(self, trainer: Trainer, pl_module: LightningModule, stage: str, moments: ClassMoments) -> None:
        """Log how many classes have merged, and say what is new.

        Args:
            trainer: Is told to stop.
            pl_module: Logs.
            stage: "train", "val" or "test".
            moments: Of all processes.
        """
        shares = measure_collapse(moments, self.limits)
        found = find_collapse(shares)
        merged = float("nan") if ("nan",) in found else sum(map(len, merged_groups(found)))
        self.record(trainer, pl_module, stage, {"collapsed_classes": moments.counts.new_tensor(merged).float()})
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if trainer.state.fn != TrainerFn.FITTING:
            if found:
                rank_zero_info(f"{stage} embeddings are collapsed: {describe_collapse(moments, found, names)}")
            return
        said = self._said.get(stage, frozenset())
        found = find_collapse(shares, said)
        last, self._found[stage] = self._found.get(stage, frozenset()), found
        if trainer.current_epoch >= self.after_epochs:
            before = self.collapsed
            self._said[stage] = (said & (found | last)) | (found & (last | {("nan",)}))
            self._report(trainer, stage, moments, before, names)

    def _report(
        self, trainer: Trainer, stage: str, moments: ClassMoments, before: frozenset[Fact], names: list[str] | None
    ) -> None:
        now = self.collapsed
        when = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        recovered = _recovered(before, now, names)
        if recovered:
            rank_zero_info(f"{when}: recovered from collapse: {recovered}")
        new = _news(before, now)
        if not new:
            return
        what = f"{when}: {stage} embeddings collapsed: {describe_collapse(moments, new, names)}"
        rank_zero_warn(f"{what}; training stops" if self.action == "stop" else what)
        if self.action == "stop":
            trainer.should_stop = True


def _news(before: frozenset[Fact], now: frozenset[Fact]) -> frozenset[Fact]:
    """Facts that are new; of merged pairs all those of a group that was not merged, directly or not, before."""
    known = [set(group) for group in merged_groups(before)]
    new = [set(group) for group in merged_groups(now) if not any(set(group) <= one for one in known)]
    return frozenset(
        fact for fact in now if (any(fact[1] in group for group in new) if fact[0] == "merged" else fact not in before)
    )


def _recovered(before: frozenset[Fact], now: frozenset[Fact], names: list[str] | None) -> str:
    kinds = [kind for kind in ("nan", "norm", "point", "rank") if (kind,) in before - now]
    free = sorted(set().union(*merged_groups(before)) - set().union(*merged_groups(now)))
    apart = [names[label] if names else str(label) for label in free]
    return "; ".join([*kinds, *([f"classes {', '.join(apart)}"] if apart else [])])


def _as_lists(facts: dict[str, frozenset[Fact]]) -> dict[str, list[list[str | int]]]:
    return {stage: [list(fact) for fact in sorted(some, key=str)] for stage, some in facts.items()}


def _as_sets(facts: dict[str, list[list[str | int]]]) -> dict[str, frozenset[Fact]]:
    return {stage: frozenset(tuple(fact) for fact in some) for stage, some in facts.items()}
