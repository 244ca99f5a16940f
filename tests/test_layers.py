"""Imports point down: a module imports only modules of lower layers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "simo_lightning"
# Top-level modules and subpackages of the package. A new one gets a line here: the lowest layer that can hold it.
LAYERS = {
    0: {"retry"},
    1: {
        "class_paths",
        "distributed",
        "extras",
        "functional",
        "lightning_private",
        "preprocessing",
        "tensor_files",
        "version",
    },
    2: {
        "checkpoints",
        "data",
        "embeddings_file",
        "encoders",
        "loggers",
        "losses",
        "metrics",
        "parameter_groups",
        "plotting",
        "run_folder",
        "schedules",
        "strategies",
    },
    3: {"callbacks", "export", "probe", "semi_supervised", "sharing", "streaming"},
    4: {"embedder", "help", "module", "report"},
    5: {"completion", "embed_files", "search", "testing"},
    6: {"explain", "parser"},
    7: {"commands"},
    8: {"cli"},
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """Top-level modules of this package that a file imports."""
    parts = [name.split(".") for name in imports(path) if name.startswith("simo_lightning.")]
    return {part[1] for part in parts if (PACKAGE / part[1]).is_dir() or (PACKAGE / f"{part[1]}.py").is_file()}


def test_every_module_has_a_layer() -> None:
    assert {module_of(path) for path in FILES} <= LAYER_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    for other in imported_modules(path) - {own}:
        assert LAYER_OF[other] < LAYER_OF[own], f"{own} imports {other}"


def test_only_one_file_communicates() -> None:
    """The other one reads sharded checkpoints, without a process group."""
    users = [path.name for path in FILES if any(name.startswith("torch.distributed") for name in imports(path))]
    assert users == ["distributed.py", "tensor_files.py"]
