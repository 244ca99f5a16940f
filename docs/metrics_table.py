"""Writes the tables of docs/metrics.md and the class names in simo_lightning/metrics from the declared metrics.

python docs/metrics_table.py
"""

import re
from pathlib import Path

from simo_lightning.functional.geometry import GEOMETRY

PAGE = Path(__file__).parent / "metrics.md"
CLASSES = Path(__file__).parent.parent / "simo_lightning" / "metrics" / "__init__.py"


def rendered(page: str) -> str:
    """The page with each table between ``<!-- table: FILE -->`` and ``<!-- end -->`` written anew."""
    marked = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def table(file: str) -> str:
    """The metrics declared in a file of functional/geometry, in its order."""
    lines = ["| name | meaning | formula | values | better | `nan` for |", "|---|---|---|---|---|---|"]
    for metric in GEOMETRY.values():
        if metric.function.__module__ == f"simo_lightning.functional.geometry.{file}":
            formula = metric.formula.replace("|", r"\|")
            better = f"{metric.better}; {metric.best}" if metric.best else metric.better
            cells = f"`{metric.name}`", metric.meaning, f"`{formula}`", metric.interval, better, metric.undefined
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_classes(source: str) -> str:
    """The module with the class of each metric between its two marks, for type checkers."""
    own = (metric for metric in GEOMETRY.values() if metric.function.__module__.startswith("simo_lightning."))
    names = sorted(metric.class_name for metric in own)
    lines = "".join(f"    class {name}(ClassMomentsMetric): ...\n\n" for name in names)
    return re.sub(
        r"(# begin: written\n).*?( *# end: written)",
        lambda found: f"{found[1]}{lines}{found[2]}",
        source,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
    CLASSES.write_text(with_classes(CLASSES.read_text()))
