import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Every process of a test runs on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "ATEN_CPU_CAPABILITY" in os.environ:  # kernels that Inductor has cached for other instructions would crash
    capability = os.environ["ATEN_CPU_CAPABILITY"]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{capability}"))
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls inside Lightning


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder, since runs/ and data/ are relative paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("SIMO_RUN_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", ["simo"])  # LightningCLI warns of two sources of words


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``simo fit`` of two epochs, one for the whole session: read it, or copy it to change it."""
    from tests.digits_run import make_run

    base = tmp_path_factory.getbasetemp()
    return make_run(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size, such as "512k", in memory; the test is skipped where this is not allowed."""
    folders: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode != 0:
            pytest.skip("a file system can be mounted by root alone")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# The files that take longest, the longest first: started at the end, one would leave the other cores idle.
LONGEST = [
    "test_benchmarks.py",
    "test_docs.py",
    "test_cli.py",
    "test_cluster.py",
    "test_resume.py",
    "test_testing.py",
    "test_notebooks.py",
    "test_report.py",
    "test_reduce.py",
    "test_hostile_files.py",
    "test_embed_command.py",
    "test_callbacks.py",
    "test_run_folder.py",
    "test_backbones.py",
    "test_finetuning.py",
    "test_callbacks_default.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_configure(config: pytest.Config) -> None:
    # Emitted by Lightning about its own code or the small size of a test's run.
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*GPU available but not used.*",
        r".*The `srun` command is available on your system.*",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
