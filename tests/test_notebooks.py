"""The notebooks run from top to bottom, and hold no outputs in git."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Said by Jupyter of its own connection, or by Lightning of a test's machine.
foreign = pytest.mark.filterwarnings("ignore:.*IPC.*:UserWarning", "ignore::DeprecationWarning:zmq")


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_quickstart", "02_the_loss", "03_your_own_data"]


@by_name
def test_outputs_are_stripped_and_nothing_names_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}  # no version of whoever saved it
    for cell in notebook.cells:
        assert not cell.metadata, cell.metadata
        assert cell.cell_type == "markdown" or (cell.execution_count is None and not cell.outputs), cell.source
    assert not re.search(r"/(home|Users|tmp|root|work)/|C:\\\\", path.read_text())


@foreign
@by_name
def test_it_runs_and_shows_its_pictures(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not list(tmp_path.iterdir())  # what it wrote, it took away
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not said
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
