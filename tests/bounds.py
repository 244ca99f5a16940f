"""Bounds for float32 that hold on every processor: derived from float32's own error against float64."""

from collections.abc import Callable

import torch
from torch import Tensor

UNIT = torch.finfo(torch.float32).eps  # 2**-23, spacing of float32 at 1


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in units of the largest absolute value of `exact`."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return float((actual - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def assert_float32_error(actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 4.0) -> float:
    """`actual` errs at most `factor` times as much as `plain` does, both against `exact`.

    `plain` is the same quantity computed in float32 in the plainest way (one process, one batch), `exact` in float64.
    Where `plain` is right by luck, one unit of rounding takes the place of its error.

    Returns the error of `actual`, relative to the largest value of `exact`.
    """
    error, allowed = relative_error(actual, exact), factor * max(relative_error(plain, exact), UNIT)
    assert error <= allowed, f"relative error {error:.3e} exceeds {factor} x float32's own, {allowed:.3e}"
    return error


def assert_stable(actual: Tensor, function: Callable[[Tensor], Tensor], inputs: Tensor, factor: float = 32.0) -> None:
    """`actual` errs at most `factor` times as much as `function` changes when its inputs are rounded to float32.

    The usual measure of a stable algorithm: its result is the exact one of inputs that differ by a few units of
    rounding. `function` is evaluated in float64, on the inputs and on four draws of inputs that differ from them by up
    to one unit each; so the bound follows the condition of the problem and no processor.
    """
    exact, generator = function(inputs.double()), torch.Generator().manual_seed(0)
    changes = []
    for _ in range(4):
        noise = 2 * torch.rand(inputs.shape, generator=generator, dtype=torch.float64) - 1
        changes.append(relative_error(function(inputs.double() * (1 + UNIT * noise)), exact))
    error, allowed = relative_error(actual, exact), factor * max(*changes, UNIT)
    assert error <= allowed, f"relative error {error:.3e} exceeds {factor} x that of rounded inputs, {allowed:.3e}"
