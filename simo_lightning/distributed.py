"""Gathering and reductions over processes; the only file that calls torch.distributed."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


def world_size() -> int:
    """Number of processes; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 if torch.distributed is not initialized."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate a tensor of all processes along its first axis, in the order of the ranks, with gradient.

    Every process then computes the same loss on the same batch. The backward pass gives each process the sum over all
    processes of the gradients of its part; DDP's mean over processes turns it into the exact gradient of one such loss.

    Args:
        rows: ``(N, ...)``, any dtype; N may differ between processes, the other sizes may not.

    Returns:
        ``(sum of N, ...)`` of the same dtype; ``rows`` itself on one process.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows) if rows.is_floating_point() else _gather(rows)[0]
    return gathered


def total_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over all processes, with gradient.

    For a loss that each process computes from such totals, so that its value is the same on all. As with
    :func:`gather_rows`, the backward pass sums the gradients of all processes, and DDP's mean over processes turns them
    into the exact gradient of one such loss.

    Args:
        values: Floats of any shape, the same on every process.

    Returns:
        The sum, on every process; ``values`` itself on one process.
    """
    if world_size() == 1:
        return values
    total: Tensor = _TotalOverRanks.apply(values)
    return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over all processes, without gradient.

    Args:
        values: Any shape, the same on every process.

    Returns:
        The sum, on every process.
    """
    if world_size() == 1:
        return values
    return _all_reduced(values)


def largest_over_ranks(value: int, device: torch.device) -> int:
    """Largest of one number per process, for decisions that must be the same on all.

    Args:
        value: Number of this process.
        device: Device that the backend communicates on.

    Returns:
        The largest, on every process.
    """
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def broadcast_buffers(module: nn.Module) -> None:
    """Give the buffers of a module, such as BatchNorm's running statistics, the values of the first process.

    Args:
        module: Changed in place; the same on every process.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def shard_weights(module: nn.Module, mesh: Any) -> None:
    """Spread the weights of a module over processes (FSDP2), block by block.

    A block is a module with submodules of its own in an ``nn.Sequential`` or ``nn.ModuleList``, such as a residual
    block or a transformer layer. Its weights are gathered for its forward and backward pass alone. Weights outside of
    blocks are gathered together.

    Args:
        module: Changed in place; does nothing if it is sharded already or has no parameters.
        mesh: One-dimensional DeviceMesh of the processes.
    """
    if isinstance(module, FSDPModule) or next(module.parameters(), None) is None:
        return
    for parent in reversed(list(module.modules())):  # inner blocks before those that contain them
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for block in parent.children():
                if next(block.children(), None) is not None and next(block.parameters(), None) is not None:
                    fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if callable(getattr(module, "terms", None)):  # a loss is called by it, and its weights are gathered in calls alone
        register_fsdp_forward_method(module, "terms")


def exchange_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """Send each process its part of the rows, without gradient.

    Args:
        rows: ``(sum of counts, ...)``, the rows for process 0 first.
        counts: Rows for each process, int64 ``(W,)``, the same on every process.

    Returns:
        This process's part of the rows of every process, ``(W, counts[rank], ...)``, in the order of the ranks.
    """
    own = int(counts[rank()])
    if world_size() == 1:
        return rows.unsqueeze(0)
    received = rows.new_empty(world_size() * own, *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), [own] * world_size(), counts.tolist())
    return received.view(world_size(), own, *rows.shape[1:])


def _gather(rows: Tensor) -> tuple[Tensor, list[int]]:
    """The tensors of all ranks and their lengths. Each is padded to the longest: collectives require one shape."""
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(length) for length in sizes]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]), lengths


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered, lengths = _gather(rows)
        start = sum(lengths[: dist.get_rank()])
        ctx.own = slice(start, start + len(rows))
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.own]


class _TotalOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
