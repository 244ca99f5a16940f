"""The page about the metrics names all of them, and its example runs."""

import re
from pathlib import Path

import pytest

from simo_lightning import metrics
from simo_lightning.functional import geometry
from simo_lightning.functional.geometry import GEOMETRY

PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
# named by the rule "effective_rank: EffectiveRank"
BY_RULE = {name.replace("_", "").lower() for name in GEOMETRY} | {"classmomentsmetric"}


@pytest.mark.parametrize("name", geometry.__all__)
def test_every_function_is_on_the_page(name):
    assert re.search(rf"`{name}[`(]", PAGE)


@pytest.mark.parametrize("name", metrics.__all__)
def test_every_class_is_on_the_page(name):
    assert name.lower() in BY_RULE or re.search(rf"\b{name}\(", PAGE)


def test_the_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(block, "metrics.md", "exec"), {})
    assert "class_cosine_max" in capsys.readouterr().out
