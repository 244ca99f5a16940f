"""A checkpoint that cannot be written, on a file system that is really full and under a real limit of file size."""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simo_lightning.callbacks.checkpoints import AtomicCheckpointIO
from tests.digits_run import QUIET, SIMO, SMALL
from tests.rank_processes import start_ranks

SMALL_STATE, LARGE_STATE = {"values": torch.arange(9)}, {"values": torch.zeros(2**20)}


def write_over(path: Path, answer: Path) -> None:
    """Write a checkpoint, then a larger one over it under a limit that it does not fit."""
    AtomicCheckpointIO().save_checkpoint(SMALL_STATE, path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the system ends the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    try:
        AtomicCheckpointIO().save_checkpoint(LARGE_STATE, path)
    except OSError as error:
        answer.write_text(f"{error.errno} {error}")


def assert_told(answer: str, number: int, path: Path) -> None:
    reason = os.strerror(number)
    assert (
        answer
        == f"{number} [Errno {number}] checkpoint {path} cannot be written: {reason}; the one before it is intact"
    )
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(torch.load(path, weights_only=True)["values"], torch.arange(9))


def test_a_checkpoint_over_the_limit_of_file_size_leaves_the_one_before(tmp_path: Path) -> None:
    path, answer = tmp_path / "run" / "last.ckpt", tmp_path / "answer"
    assert start_ranks(1, write_over, path, answer) == [0]
    assert_told(answer.read_text(), errno.EFBIG, path)


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    """A file system of 512 KiB."""
    return mounted("512k")


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(small_disk: Path) -> None:
    path = small_disk / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL_STATE, path)
    with pytest.raises(OSError, match="cannot be written") as caught:
        AtomicCheckpointIO().save_checkpoint(LARGE_STATE, path)
    assert_told(f"{caught.value.errno} {caught.value}", errno.ENOSPC, path)


def test_a_run_on_a_full_disk_is_reported_in_one_line(small_disk: Path) -> None:
    words = ["fit", *SMALL, *QUIET, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--best", "null"]
    done = subprocess.run(
        [SIMO, *words, "--run_dir", str(small_disk / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(
        f"simo: error: [Errno {errno.ENOSPC}] checkpoint {small_disk}/run/checkpoints/last.ckpt cannot"
    )
    assert "No space left on device" in line
    assert not list((small_disk / "run" / "checkpoints").iterdir())
