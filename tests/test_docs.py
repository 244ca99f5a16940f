"""The documentation builds without a warning, and its reference shows every public name."""

import inspect
import re
import runpy
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "simo_lightning"
NOT_PUBLIC = {"lightning_private", "version"}
MODULES = sorted(
    f"simo_lightning.{path.stem}"
    for path in PACKAGE.iterdir()
    if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem not in {"__init__", *NOT_PUBLIC}
)


def public(module: ModuleType) -> dict[str, Any]:
    """Functions and classes of ``__all__``, or those that the module defines without an underscore."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    ]
    values = {name: getattr(module, name) for name in names if not name.startswith("_")}
    return {name: value for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built with warnings as errors and every reference followed."""
    folder = tmp_path_factory.mktemp("docs")
    extensions = {*runpy.run_path(str(DOCS / "conf.py"))["extensions"]} - {"sphinx.ext.viewcode"}  # half of the time
    options = ["-W", "--keep-going", "-n", "-q", "-D", f"extensions={','.join(extensions)}"]
    options += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    # a process of its own: Sphinx changes the defaults of the signatures that it reads
    done = subprocess.run([sys.executable, "-m", "sphinx", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_it_builds_without_a_warning_and_shows_every_public_name(built: Path) -> None:
    packed = (built / "objects.inv").read_bytes().split(b"\n", maxsplit=4)[4]  # after a header of four lines
    entries = [line.split() for line in zlib.decompress(packed).decode().splitlines()]
    shown = {name for name, kind, *_ in entries if kind.startswith("py:")}
    missing = [
        f"{module}.{name}"
        for module in ["simo_lightning", *MODULES]
        for name, value in public(import_module(module)).items()
        if not {f"{module}.{name}", f"{value.__module__}.{value.__qualname__}"} & shown
    ]
    assert not missing
    for page in DOCS.glob("*.md"):
        assert (built / f"{page.stem}.html").is_file()


def test_every_module_is_in_the_reference() -> None:
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    assert set(MODULES) <= set(re.findall(r"automodule:: ([\w.]+)", pages))


LINKING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RECIPES.md"]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_to_files_of_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text()) + re.findall(r'src="([^"]+)"', page.read_text())
    missing = [each for each in targets if "://" not in each and not (page.parent / each).exists()]
    assert targets
    assert not missing
