"""The page about the metrics: its tables are those of the declarations, it names everything, its example runs."""

import re
import runpy
from pathlib import Path

import pytest

from simo_lightning import metrics
from simo_lightning.functional import geometry
from simo_lightning.functional.geometry import GEOMETRY

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "metrics.md").read_text()
DECLARED = {metric.class_name for metric in GEOMETRY.values()} | {"ClassMomentsMetric"}


def test_the_tables_and_the_class_names_are_those_of_the_declarations():
    script = runpy.run_path(str(DOCS / "metrics_table.py"))
    assert script["rendered"](PAGE) == PAGE, "docs/metrics.md is out of date: python docs/metrics_table.py"
    source = script["CLASSES"].read_text()
    assert script["with_classes"](source) == source, "metrics/__init__.py is out of date: python docs/metrics_table.py"


@pytest.mark.parametrize("name", sorted(set(geometry.__all__) - {"GeometryMetric", "geometry_metric"}))
def test_every_function_is_on_the_page(name):
    assert re.search(rf"`{name}[`(]", PAGE)


@pytest.mark.parametrize("name", sorted(set(metrics.__all__) - DECLARED))
def test_every_other_class_is_on_the_page(name):
    assert re.search(rf"\b{name}\(", PAGE)


def test_the_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(block, "metrics.md", "exec"), {})
    assert "class_cosine_max" in capsys.readouterr().out
