"""What the README shows works."""

import re
import warnings
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Starting from v1.9.0, `tensorboardX` has been removed")
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "digits.ckpt").is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"configs/([\w/]+\.yaml)", README))))
def test_configs_that_are_named_exist(name: str) -> None:
    assert (Path(__file__).parent.parent / "configs" / name).is_file()
