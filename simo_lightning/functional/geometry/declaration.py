"""The declaration of a geometry metric, beside its function: name, formula, range, better direction."""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from simo_lightning.functional.moments import ClassMoments, described_second

_Function = TypeVar("_Function", bound=Callable[..., Tensor])
_SECTION = re.compile(r"^(?:Raises|Example|Source):$", re.MULTILINE)


@dataclass(frozen=True)
class GeometryMetric:
    """A scalar function of the class moments with its description; calling it calls the function.

    Attributes:
        function: From class moments to a scalar.
        name: As it is logged, without the stage: the name of the function.
        class_name: Of the torchmetrics class in ``simo_lightning.metrics``.
        meaning: What it measures, in words: the first line of the function's docstring, up to the formula.
        formula: In ASCII: the rest of that line.
        interval: Of its values.
        better: "lower", "higher" or "neither".
        best: The best value, or the meaning of a value; may be empty.
        undefined: When it is ``nan``.
        needs_second: Whether it requires ``second`` of the moments, which is None above a budget.
    """

    function: Callable[..., Tensor]
    name: str
    class_name: str
    meaning: str
    formula: str
    interval: str
    better: Literal["lower", "higher", "neither"]
    best: str
    undefined: str
    needs_second: bool = False

    def __call__(self, moments: ClassMoments, **options: Any) -> Tensor:
        """The value, in the dtype and on the device of the moments."""
        return self.function(moments, **options)

    @property
    def higher_is_better(self) -> bool | None:
        """The direction in torchmetrics' convention: None where neither is better."""
        return {"higher": True, "lower": False, "neither": None}[self.better]


#: Every declared metric by its name. :class:`~simo_lightning.callbacks.GeometryMonitor` logs them all.
GEOMETRY: dict[str, GeometryMetric] = {}


def geometry_metric(
    *,
    interval: str,
    better: Literal["lower", "higher", "neither"],
    best: str = "",
    undefined: str,
    class_name: str | None = None,
    needs_second: bool = False,
) -> Callable[[_Function], _Function]:
    """Declare a function of the class moments as a metric.

    The function goes into :data:`GEOMETRY` under its own name. From there it is logged as ``val/<name>``, shown in the
    report and in the documentation; :func:`simo_lightning.metrics.metric_class` gives its torchmetrics class. Its
    docstring begins with "Meaning: ``formula``." in one line; the sections Args and Returns are added to it.

    Args:
        interval: Of the values, such as "[0, 1]" or ">= 0".
        better: Which direction is better.
        best: The best value, or the meaning of a value, such as "0: all class means are orthogonal".
        undefined: When the value is ``nan``.
        needs_second: Whether the function calls :meth:`.ClassMoments.required_second`. It is then left out where the
            second moments of each class exceed their budget.
        class_name: Of the torchmetrics class. Default: the name in capitals, ``class_cosine``: ``ClassCosine``.

    Returns:
        A decorator, which returns the function itself.

    Raises:
        ValueError: If the docstring does not begin as described, or another metric has the name.
    """

    def declare(function: _Function) -> _Function:
        name = function.__name__
        docstring = inspect.cleandoc(function.__doc__ or "")
        summary = re.match(r"([^\n]+?): ``([^\n]+?)``\.?(?:\n|$)", docstring)
        if summary is None and sys.flags.optimize < 2:  # python -OO has no docstrings
            first = docstring.partition("\n")[0]
            raise ValueError(
                f"the docstring of {name} must begin with 'Meaning: ``formula``.' in one line, got {first!r}"
            )
        if name in GEOMETRY:
            raise ValueError(f"the name of a metric must be new, got {name!r} again")
        GEOMETRY[name] = GeometryMetric(
            function=function,
            name=name,
            class_name=class_name or "".join(word.capitalize() for word in name.split("_")),
            meaning=summary[1] if summary else name,
            formula=summary[2] if summary else "",
            interval=interval,
            better=better,
            best=best,
            undefined=undefined,
            needs_second=needs_second,
        )
        function.__doc__ = _with_sections(docstring, GEOMETRY[name])
        return function

    return declare


def computable_metrics(moments: ClassMoments) -> dict[str, GeometryMetric]:
    """The metrics of :data:`GEOMETRY` that these moments allow: all, or those that do not require ``second``.

    Args:
        moments: With or without ``second``.

    Returns:
        Metrics by name, sorted.

    Example:
        >>> from simo_lightning.functional import geometry
        >>> moments = ClassMoments.zeros(10_000, 512)
        >>> sorted(geometry.GEOMETRY.keys() - computable_metrics(moments))
        ['participation_ratio', 'subspace_overlap', 'variance_across', 'variance_along']
    """
    return {
        name: metric
        for name, metric in sorted(GEOMETRY.items())
        if moments.second is not None or not metric.needs_second
    }


def not_computed(moments: ClassMoments, second_budget_mb: float) -> str:
    """Which metrics these moments do not allow, and why.

    Args:
        moments: With or without ``second``.
        second_budget_mb: Their budget.

    Returns:
        One line; empty if there is no such metric.

    Example:
        >>> not_computed(ClassMoments.zeros(10, 16), second_budget_mb=256)
        ''
    """
    names = sorted(GEOMETRY.keys() - computable_metrics(moments))
    if not names:
        return ""
    return f"not computed: {', '.join(names)}: {described_second(moments)}, above second_budget_mb={second_budget_mb:g}"


def _with_sections(docstring: str, metric: GeometryMetric) -> str:
    """The docstring with the sections Args and Returns from the declaration."""
    direction = {"neither": "neither direction is better"}.get(metric.better, f"{metric.better} is better")
    best = f" ({metric.best})" if metric.best else ""
    added = f"Returns:\n    Scalar, {metric.interval}; {direction}{best}. ``nan`` for {metric.undefined}.\n\n"
    if "Args:" not in docstring:
        added = "Args:\n    moments: Class moments; classes without embeddings do not count.\n\n" + added
    found = _SECTION.search(docstring)
    start = found.start() if found else len(docstring)
    return docstring[:start].rstrip() + "\n\n" + added + docstring[start:]
