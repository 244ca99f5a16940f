"""A strategy that shards weights and optimizer states over the processes (FSDP2) and saves them as shards."""

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from simo_lightning.distributed import broadcast_buffers, largest_over_ranks
from simo_lightning.retry import retry_while_lost
from simo_lightning.tensor_files import (
    SHARDED_REST,
    is_sharded,
    named_in_error,
    read_sharded,
    replace_folder,
    shard_errors,
    unfinished_of,
)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with safe checkpoints, for models that do not fit into one GPU.

    ``SimOModule.configure_model`` shards its encoder over the processes. What is different from Lightning's strategy:

    - A sharded checkpoint is written beside its target, which it then replaces, so that the former one stays intact
      until the new one is complete. Lightning writes into the former one.
    - A checkpoint is checked before it is opened, since torch reads the list of a checkpoint's shards by pickle: one
      that holds anything but tensors and plain data is refused.
    - Buffers, such as BatchNorm's running statistics, are those of the first process in validation and checkpoints, as
      DDP has it.

    Args:
        data_parallel_size: Processes that see different images; "auto": all, divided by ``tensor_parallel_size``.
        tensor_parallel_size: Processes that share the layers of one image. Needs a ``configure_model`` of your own.
        arguments: Of Lightning's ModelParallelStrategy, such as ``save_distributed_checkpoint=False`` for checkpoints
            in one file.
    """

    _folders: frozenset[Path] = frozenset()  # that have been there

    def __init__(self, data_parallel_size: int | str = "auto", tensor_parallel_size: int = 1, **arguments: Any) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, **arguments)  # type: ignore[arg-type]

    def setup_environment(self) -> None:
        """Count the processes, then set them up."""
        if self._data_parallel_size == "auto":
            assert isinstance(self._tensor_parallel_size, int)
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights as shards, the buffers of the first process."""
        self._share_buffers()
        return super().lightning_module_state_dict()

    def on_validation_start(self) -> None:
        """Let all processes embed with the same running statistics."""
        self._share_buffers()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder of shards, one file per process, or one file.

        Args:
            checkpoint: Of this process.
            filepath: Target.
            storage_options: None.

        Raises:
            OSError: If a process cannot write its part; the former checkpoint is kept.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        unfinished = unfinished_of(path)
        try:
            self._on_all(path, partial(self._clear, path, unfinished))
            self._on_all(path, partial(_check_folder, unfinished))
            self._on_all(path, partial(self._write, checkpoint, unfinished))
            self._on_all(path, partial(self._replace, path, unfinished))
        except Exception:  # on all processes, so that none is still writing
            if self.is_global_zero:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states into this process's shards, from any number of shards or one file.

        Args:
            checkpoint_path: Folder or file.
            weights_only: False opens a folder unchecked, which **runs the code it holds**.

        Returns:
            All other entries of the checkpoint.

        Raises:
            ValueError: If it holds more than tensors and plain data.
        """
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded(path) and weights_only is not False:
            read_sharded(path, tensors=False)
        return super().load_checkpoint(path, True if weights_only is None else weights_only)

    def _share_buffers(self) -> None:
        if self.lightning_module is not None:
            broadcast_buffers(self.lightning_module)

    def _on_all(self, path: Path, action: Callable[[], None]) -> None:
        """Do a part of a save on all processes, again while the folder is lost, and raise on all if one fails."""

        def named() -> None:
            with named_in_error(path):
                action()

        retry_while_lost(named, path, largest=partial(largest_over_ranks, device=self.root_device))

    def _clear(self, path: Path, unfinished: Path) -> None:
        """Make an empty folder; the folder around it only once, as one that is missing later is lost."""
        if self.is_global_zero:
            if path.parent not in self._folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders = self._folders | {path.parent}
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()

    def _write(self, checkpoint: dict[str, Any], unfinished: Path) -> None:
        with shard_errors():
            super().save_checkpoint(dict(checkpoint), unfinished)  # Lightning takes entries out of it

    def _replace(self, path: Path, unfinished: Path) -> None:
        if self.is_global_zero:
            with (unfinished / SHARDED_REST).open("rb+") as file:  # torch has done so with the shards
                os.fsync(file.fileno())
            replace_folder(unfinished, path)


def _check_folder(folder: Path) -> None:
    """On each process, before any of them writes: one that fails alone would leave the others waiting."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
