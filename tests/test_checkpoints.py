import os
import signal
import threading
from pathlib import Path

import torch

from simo_lightning.callbacks.checkpoints import AtomicCheckpointIO
from tests.rank_processes import start_ranks

LARGE = 64 * 2**20  # bytes


def write(path: Path) -> None:
    """Write one checkpoint, and be killed while a second is being written over it."""
    writer, unfinished = AtomicCheckpointIO(), path.with_name(f".{path.name}.unfinished")
    writer.save_checkpoint({"step": 1, "rows": torch.arange(9)}, path)

    def kill() -> None:
        while not unfinished.exists() or unfinished.stat().st_size == 0:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill).start()
    writer.save_checkpoint({"step": 2, "rows": [torch.zeros(2**20, dtype=torch.uint8) for _ in range(64)]}, path)


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path, unfinished = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.unfinished"
    assert start_ranks(1, write, path) == [-signal.SIGKILL]
    assert 0 < unfinished.stat().st_size < LARGE
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == 1
    assert torch.equal(checkpoint["rows"], torch.arange(9))
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert not unfinished.exists()
