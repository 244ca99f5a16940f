"""Writes the tables of docs/metrics.md from the declarations of the metrics.

python docs/metrics_table.py
"""

import re
from pathlib import Path

from simo_lightning.functional.geometry import GEOMETRY

PAGE = Path(__file__).parent / "metrics.md"


def rendered(page: str) -> str:
    """The page with each table between ``<!-- table: FILE -->`` and ``<!-- end -->`` written anew."""
    marked = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def table(file: str) -> str:
    """The metrics declared in a file of functional/geometry, in its order."""
    lines = ["| name | meaning | formula | values | better | `nan` for |", "|---|---|---|---|---|---|"]
    for metric in GEOMETRY.values():
        if metric.function.__module__.endswith(f"geometry.{file}"):
            formula = metric.formula.replace("|", r"\|")
            better = f"{metric.better}; {metric.best}" if metric.best else metric.better
            cells = f"`{metric.name}`", metric.meaning, f"`{formula}`", metric.interval, better, metric.undefined
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
