import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_fit import BATCHES, fit
from tests.rank_processes import saved, start_ranks

TERM, USR1, KILL, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT
# name: signals {step: (rank, signal)}, save every n steps, exit code of the first rank, step of last.ckpt
ENDS: dict[str, tuple[dict[int, tuple[int, int]], int | None, int, int]] = {
    "kill -9 after an epoch": ({10: (0, KILL)}, None, -9, 8),
    "kill -9 within an epoch": ({5: (0, KILL)}, 3, -9, 3),
    "kill -9 in the second epoch": ({14: (0, KILL)}, 5, -9, 10),
    "SIGTERM": ({11: (-1, TERM)}, None, 143, 12),
    "SIGTERM in the last batch of an epoch": ({7: (-1, TERM)}, None, 143, 9),
    "SIGINT": ({2: (-1, INT)}, None, 1, 3),
    "SIGUSR1, then kill -9": ({10: (-1, USR1), 13: (0, KILL)}, None, -9, 11),
}
FAST = {  # world, workers
    (1, 0): ["kill -9 within an epoch", "SIGTERM", "SIGTERM in the last batch of an epoch"],
    (2, 0): ["kill -9 in the second epoch", "SIGTERM", "SIGUSR1, then kill -9"],
}
CASES = [
    pytest.param(world, workers, end, marks=[] if end in FAST.get((world, workers), []) else pytest.mark.slow)
    for world in (1, 2) for workers in (0, 2) for end in ENDS
]  # fmt: skip


def run(folder: Path, name: str, world: int = 1, workers: int = 0, *rest: Any, **named: Any) -> list[int | None]:
    return start_ranks(world, _run, folder, name, world, workers, rest, named)


def _run(folder: Path, name: str, world: int, workers: int, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
    fit(folder, name, world, workers, *rest, **named)


def seen(folder: Path, name: str, world: int) -> list[list[str]]:
    return [(folder / f"{name}.{rank}.txt").read_text().splitlines() for rank in range(world)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of 1 and 2 processes that were never stopped."""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp(f"whole{world}")
        assert run(folders[world], "run", world) == [0] * world
        assert all(len(lines) == len(set(lines)) == 2 * BATCHES for lines in seen(folders[world], "run", world))
    return folders


@pytest.mark.parametrize("world, workers, end", CASES)
def test_a_run_that_was_ended_goes_on_to_the_last_bit(
    whole: dict[int, Path], tmp_path: Path, world: int, workers: int, end: str
) -> None:
    signals, every, code, step = ENDS[end]
    signals = {at: (rank % world, number) for at, (rank, number) in signals.items()}  # -1: the last rank, it alone
    codes = run(tmp_path, "run", world, workers, None, signals, every)
    assert codes[0] == code
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=False)["global_step"] == step
    assert run(tmp_path, "again", world, workers, checkpoint) == [0] * world
    for rank, expected in enumerate(seen(whole[world], "run", world)):
        before, after = seen(tmp_path, "run", world)[rank], seen(tmp_path, "again", world)[rank]
        assert step <= len(before) < 2 * BATCHES
        assert before == expected[: len(before)]
        assert after == expected[step:]
    for expected_weights, weights in zip(
        saved(whole[world], "run", world), saved(tmp_path, "again", world), strict=True
    ):
        assert expected_weights.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected_weights[name]), name
