"""Class prototypes: a fixed unit vector for every label, independent of the data."""

import torch
from torch import Tensor

from simo_lightning.functional.hashing import GOLDEN, splitmix64

# Irreducible polynomials over GF(2) of degree 1, 2, ..., with bit i for x^i: they define the multiplication in GF(2^m).
_POLYNOMIALS = (0x3, 0x7, 0xB, 0x13, 0x25, 0x43, 0x83, 0x11B, 0x211, 0x409, 0x805, 0x1053, 0x201B)


def class_prototypes(labels: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit vectors, one for each label, the same in every process and run.

    Labels ``0..D - 1`` have the coordinate axes, which are orthogonal. Where D is a power of two, 8 to 8,192, labels up
    to ``D^2 + D - 1`` have Gold sequences, vectors of signs ``+-1 / sqrt(D)``: their cosines with each other are 0 or
    ``+-sqrt(2 / D)`` for D = 8, 32, 128, 512, ..., at most ``2 / sqrt(D)`` for D = 16, 64, 256, ..., and
    those with the axes ``+-1 / sqrt(D)``. Any other label has signs that are a hash of it, with random cosines of about
    ``1 / sqrt(D)``, of which the largest is several times as large.

    Args:
        labels: Integers ``(C,)``, any values.
        dim: D.
        dtype: Of the result.

    Returns:
        ``(C, D)`` of length 1.

    Example:
        >>> class_prototypes(torch.tensor([0, 2, 7]), dim=4)
        tensor([[ 1.0000,  0.0000,  0.0000,  0.0000],
                [ 0.0000,  0.0000,  1.0000,  0.0000],
                [ 0.5000,  0.5000, -0.5000, -0.5000]])

    Source:
        Gold, IEEE Trans. Inf. Theory 14(1), 1968, in the form ``(-1)^(a . x^3 + b . x)`` over GF(2^m), D = 2^m. No C
        vectors have a mean squared cosine below ``(C - D) / (D (C - 1))`` (Welch, IEEE Trans. Inf. Theory 20(3), 1974).
        Classifiers with fixed orthogonal or simplex weights: Pernici et al., arXiv 2103.15632; Yang et al.,
        arXiv 2203.09081.
    """
    labels = labels.long()
    columns = torch.arange(dim, device=labels.device)
    axes = (labels.unsqueeze(1) == columns).to(dtype)  # (C, D), a row of zeros where the label has no axis
    if int(axes.sum()) == len(labels):
        return axes
    power_of_two = 8 <= dim <= 2 ** len(_POLYNOMIALS) and dim.bit_count() == 1
    gold = (labels >= 0) & (labels < (dim + dim**2 if power_of_two else dim))
    negative = torch.empty_like(axes, dtype=torch.bool)  # the signs
    negative[gold] = _gold_sequences((labels[gold] - dim).unsqueeze(1), dim)
    negative[~gold] = splitmix64((labels[~gold].unsqueeze(1) * dim + columns + 1) * GOLDEN).bitwise_and(1).bool()
    signs = 1 - 2 * negative.to(dtype)
    return torch.where(axes.any(dim=1, keepdim=True), axes, signs / dim**0.5)


def _gold_sequences(numbers: Tensor, dim: int) -> Tensor:
    """Gold sequences ``a * dim + b``, ``(C, D)``: True, negative, where ``(a & x^3) ^ (b & x)`` has odd parity."""
    x = torch.arange(dim, dtype=torch.int16, device=numbers.device)
    a, b = (numbers // dim).short(), (numbers % dim).short()
    bits = (_cubes(dim).to(x) & a) ^ (x & b)
    for shift in (8, 4, 2, 1):
        bits = bits ^ bits >> shift
    return (bits & 1).bool()


def _cubes(dim: int) -> Tensor:
    """``x^3`` of every x in GF(dim), ``(dim,)``; the bits of a number are the coefficients of a polynomial."""
    degree = dim.bit_length() - 1

    def times(x: Tensor, y: Tensor) -> Tensor:
        product = torch.zeros_like(x)
        for bit in range(degree):
            product = product ^ x * (y >> bit & 1)
            x = x << 1
            x = torch.where(x >= dim, x ^ _POLYNOMIALS[degree - 1], x)
        return product

    numbers = torch.arange(dim)
    return times(times(numbers, numbers), numbers)
