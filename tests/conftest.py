import os
import warnings
from pathlib import Path

import pytest

# Nothing here may reach a network, and every process of a test runs on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning itself calls


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own: runs/ and data/ are relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("SIMO_RUN_DIR", raising=False)


def pytest_configure(config: pytest.Config) -> None:
    # Said by Lightning of itself or of a test's small run, not by the package.
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*GPU available but not used.*",
        r".*The `srun` command is available on your system.*",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
