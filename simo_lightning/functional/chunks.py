"""Sums over chunks of rows, so that memory is that of one chunk, in the backward pass as well."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_of_chunks(
    function: Callable[..., Tensor], rows: int, split: tuple[Tensor, ...], whole: tuple[Tensor, ...]
) -> Tensor:
    """Sum of ``function(*chunk of split, *whole)`` over chunks of rows.

    More than one chunk is computed once more in the backward pass. Differentiable any number of times.

    Args:
        function: Returns a tensor whose shape does not depend on the rows. It depends on no other tensor that requires
            a gradient.
        rows: Of a chunk, at least 1.
        split: Tensors ``(N, ...)``.
        whole: Tensors of any shape, the same for every chunk.

    Returns:
        The sum, as if all rows were one chunk.

    Example:
        >>> rows, scale = torch.ones(5, 2, requires_grad=True), torch.tensor(3.0)
        >>> sum_of_chunks(lambda x, scale: scale * x.sum(), 2, (rows,), (scale,))
        tensor(30., grad_fn=<_SumOfChunksBackward>)
    """
    if len(split[0]) <= rows:
        return function(*split, *whole)
    if torch.compiler.is_compiling():  # which cannot trace a backward pass that calls autograd, and frees what it can
        chunks = zip(*(tensor.split(rows) for tensor in split), strict=True)
        parts = [checkpoint(function, *each, *whole, use_reentrant=False, preserve_rng_state=False) for each in chunks]
        return torch.stack(parts).sum(dim=0)
    result: Tensor = _SumOfChunks.apply(function, rows, len(split), *split, *whole)
    return result


class _SumOfChunks(torch.autograd.Function):
    """Keeps nothing of a chunk, not even its graph, and writes all gradients to tensors that exist from the start.

    With one checkpoint per chunk, nodes and gradients that must stay are allocated next to the large matrices of
    their chunk, and the C allocator cannot use that memory for the next: 65,536 embeddings of 10,000 classes take
    5 GB, where their largest matrix has 8 MB.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], rows: int, number: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.rows, ctx.number = function, rows, number
        ctx.save_for_backward(*tensors)
        total: Tensor | None = None
        for chunk in zip(*(tensor.split(rows) for tensor in tensors[:number]), strict=True):
            part = function(*chunk, *tensors[number:])
            total = part if total is None else total + part
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, again = ctx.saved_tensors, torch.is_grad_enabled()  # again: with create_graph=True
        wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[3 + i]]
        grads = {i: torch.zeros_like(tensors[i]) for i in wanted}
        for start in range(0, len(tensors[0]), ctx.rows):
            part = slice(start, start + ctx.rows)
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                chunk = [each[part] if i < ctx.number else each for i, each in enumerate(tensors)]
                # Views of their own: where inputs depend on each other, each receives its own share alone
                chunk = [each.view_as(each) for each in (chunk if again else [each.detach() for each in chunk])]
                for i in wanted:
                    chunk[i].requires_grad_()
                found = torch.autograd.grad(
                    ctx.function(*chunk), [chunk[i] for i in wanted], grad, create_graph=again, materialize_grads=True
                )
            for i, value in zip(wanted, found, strict=True):
                if i < ctx.number:
                    grads[i][part] = value
                else:
                    grads[i] += value
        return None, None, None, *(grads.get(i) for i in range(len(tensors)))
