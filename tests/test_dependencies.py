"""Every distribution that the code imports directly is declared in setup.cfg."""

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from simo_lightning.extras import EXTRAS

ROOT = Path(__file__).parent.parent
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
OWN = {"simo_lightning", "tests", "benchmarks"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Distributions of install_requires and of the extras, with the extras that these name."""
    lines = SETUP["options"]["install_requires"] + "".join(SETUP["options.extras_require"][name] for name in extras)
    found = [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]
    nested = {extra for each in found if each.name == "simo_lightning" for extra in each.extras} - set(extras)
    return declared(*extras, *nested) if nested else {normalized(each.name) for each in found}


def imported(*places: str) -> set[str]:
    """Top-level names that files import, at their top or inside functions, without Python's own and the project's."""
    found = set()
    for path in (path for place in places for path in sorted((ROOT / place).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - OWN


def undeclared(names: set[str], allowed: set[str]) -> set[str]:
    distributions = packages_distributions()
    return {name for name in names if not {normalized(each) for each in distributions.get(name, [name])} & allowed}


def test_imports_of_the_package_are_requirements_or_extras_with_a_hint() -> None:
    assert not undeclared(imported("simo_lightning"), declared()) - EXTRAS.keys()


@pytest.mark.parametrize("extra", sorted(set(EXTRAS.values())))
def test_extras_that_errors_recommend_are_declared(extra: str) -> None:
    assert extra in SETUP["options.extras_require"]


def test_imports_of_tests_benchmarks_and_examples_come_with_the_test_extra() -> None:
    assert not undeclared(imported("tests", "benchmarks", "examples", "docs"), declared("test"))
