"""The house: imports point down, and rooms of one floor do not know each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "simo_lightning"
FLOORS = {
    1: {"functional", "distributed", "extras", "version", "lightning_private"},
    2: {"losses", "metrics", "encoders", "schedules", "checkpoints", "data", "plotting", "loggers", "run_folder"},
    3: {"export", "module", "probe", "callbacks", "semi_supervised"},
    4: {"report", "testing", "parser"},
    5: {"cli"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(path: Path) -> set[str]:
    """Modules that a file imports, at its top or inside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    """Rooms that a file imports."""
    parts = [module.split(".") for module in modules(path) if module.startswith("simo_lightning.")]
    return {part[1] for part in parts} & FLOOR_OF.keys()


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    for other in rooms(path) - {own}:
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_under_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 300


def test_only_one_file_touches_torch_distributed() -> None:
    users = [path.name for path in FILES if any(name.startswith("torch.distributed") for name in modules(path))]
    assert users == ["distributed.py"]
