"""What the README shows works."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Starting from v1.9.0, `tensorboardX` has been removed")
        exec(compile(blocks[0], "README.md", "exec"), names)
    assert (tmp_path / "digits.ckpt").is_file()
    logged = names["trainer"].callback_metrics
    assert logged["val/knn"] > 0.5  # chance is 0.1
    for name in re.findall(r"\b(?:train|val)/\w+", blocks[0]):
        assert name in logged


@pytest.mark.parametrize("name", sorted(set(re.findall(r"configs/([\w/]+\.yaml)", README))))
def test_configs_that_are_named_exist(name: str) -> None:
    assert (ROOT / "configs" / name).is_file()
