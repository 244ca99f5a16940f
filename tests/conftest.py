import os
import warnings
from pathlib import Path

import pytest

# Every process of a test runs on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls inside Lightning


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder, since runs/ and data/ are relative paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("SIMO_RUN_DIR", raising=False)


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
