"""The documentation builds without a warning, and holds every public name with a docstring of the project's shape."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import zlib
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "simo_lightning"
ROOMS = sorted(
    f"simo_lightning.{path.stem}"
    for path in PACKAGE.iterdir()
    if path.stem not in ("__init__", "__pycache__") and (path.suffix == ".py" or (path / "__init__.py").is_file())
)


def public(module: ModuleType) -> dict[str, Any]:
    """What a room offers: its ``__all__``, or the functions and classes that it defines without an underscore."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


NAMES = {
    f"{room}.{name}": value
    for room in ["simo_lightning", *ROOMS]
    for name, value in public(import_module(room)).items()
    if inspect.isclass(value) or inspect.isfunction(value)
}


def members(name: str, value: Any) -> dict[str, Any]:
    """A function, or a class with its own public methods and properties."""
    found = {name: value}
    if inspect.isclass(value):
        for key, member in vars(value).items():
            member = getattr(member, "__func__", member)  # of a classmethod
            if not key.startswith("_") and (
                inspect.isfunction(member) or isinstance(member, property | cached_property)
            ):
                found[f"{name}.{key}"] = member
    return found


def overrides(name: str) -> bool:
    """Whether a method takes the place of one that its base class, here or in another project, documents."""
    owner, _, key = name.rpartition(".")
    bases = inspect.getmro(NAMES[owner])[1:] if owner in NAMES else ()
    return any(vars(base)[key].__doc__ for base in bases if key in vars(base))


def arguments(value: Any) -> list[str]:
    """Names of the arguments that a docstring must explain."""
    if inspect.isclass(value):
        if "__init__" not in vars(value):
            return []
        value = vars(value)["__init__"]
    if isinstance(value, property | cached_property):
        return []
    return [
        name
        for name, parameter in inspect.signature(value).parameters.items()
        if name not in ("self", "cls") and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def section(text: str, title: str) -> str:
    """What stands under a title such as Args; empty where there is none."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", text, flags=re.MULTILINE)
    return found.group(1) if found else ""


def returns_something(value: Any) -> bool:
    if not inspect.isfunction(value):
        return False
    annotation = inspect.signature(value).return_annotation
    return annotation not in (None, "None", inspect.Signature.empty)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built with warnings as errors and every reference followed."""
    folder = tmp_path_factory.mktemp("docs")
    words = ["-W", "--keep-going", "-n", "-q", "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    # a process of its own: Sphinx changes the defaults of the signatures that it reads
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_it_builds_without_a_warning_and_shows_every_public_name(built: Path) -> None:
    packed = (built / "objects.inv").read_bytes().split(b"\n", maxsplit=4)[4]  # four lines say what it is
    entries = [line.split() for line in zlib.decompress(packed).decode().splitlines()]
    shown = {name for name, kind, *_ in entries if kind.startswith("py:")}
    missing = []
    for name, value in NAMES.items():
        own = f"{value.__module__}.{getattr(value, '__qualname__', name)}"
        if not {name, own} & shown:
            missing.append(name)
    assert not missing
    for page in DOCS.glob("*.md"):
        assert (built / f"{page.stem}.html").is_file()


def test_every_room_has_its_place_in_the_reference() -> None:
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: ([\w.]+)", pages))
    assert set(ROOMS) - {"simo_lightning.version"} <= documented


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_has_the_shape(name: str) -> None:
    for path, value in members(name, NAMES[name]).items():
        if overrides(path) or (getattr(NAMES[name], "_is_protocol", False) and path != name):
            continue
        text = inspect.cleandoc(value.__doc__ or "")
        assert text, f"{path} has no docstring"
        assert len(text.splitlines()[0].split()) > 1, f"{path} is not summed up in its first line"
        explained = section(text, "Args") + section(text, "Attributes")
        for argument in arguments(value):
            listed = re.search(rf"^ +{argument}: \S", explained, flags=re.MULTILINE)
            assert listed or re.search(rf"\b{argument}\b", text.splitlines()[0]), f"{path} does not explain {argument}"
        if returns_something(value) and section(text, "Args"):
            assert section(text, "Returns") or section(text, "Yields"), f"{path} does not say what it returns"


def test_what_is_raised_by_name_is_documented() -> None:
    """A public function whose own body raises ValueError says so."""
    silent = []
    for name, value in NAMES.items():
        if not inspect.isfunction(value):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
        raised = {
            node.exc.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        }
        said = section(inspect.cleandoc(value.__doc__ or ""), "Raises")
        silent += [f"{name}: {error}" for error in raised if error.endswith(("Error", "Exit")) and error not in said]
    assert not silent
