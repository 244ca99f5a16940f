"""Real processes for tests, forked from a server that has imported everything already."""

import multiprocessing as mp
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.rank_fit", "simo_lightning.cli"])


def start_ranks(world: int, job: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run ``job(*arguments)`` in that many processes as ranks of one job. Returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=_run, args=(rank, world, port, job, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=90)
        # Ends a rank that waits for one that is gone, and the readers of one that was killed.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return [process.exitcode for process in ranks]


def _run(rank: int, world: int, port: int, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    mp.set_start_method("fork", force=True)  # of readers; else each rank would start, and load, a server of its own
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
    job(*arguments)


def saved(folder: Path, name: str, world: int) -> list[Any]:
    """What each rank saved as ``name.<rank>.pt``."""
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(world)]
