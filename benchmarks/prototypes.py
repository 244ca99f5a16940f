"""Cosines of the prototypes of more classes than dimensions, against random signs and Welch's bound."""

import torch
from torch import Tensor

from simo_lightning.functional.prototypes import class_prototypes

CASES = ((200, 64), (1_000, 128), (1_000, 384), (10_000, 512))  # C, D
RANDOM = 2**40  # the first of labels without axis or Gold sequence


def cosines(labels: Tensor, dim: int) -> tuple[float, float, float]:
    """Mean, root mean square and largest |cosine| of two prototypes."""
    prototypes = class_prototypes(labels, dim, torch.float64)
    found = (prototypes @ prototypes.T).abs().fill_diagonal_(0)
    pairs = len(labels) * (len(labels) - 1)
    return float(found.sum() / pairs), float((found.square().sum() / pairs).sqrt()), float(found.max())


def markdown() -> str:
    """The table of docs/method.md."""
    lines = [
        "| C | D | bound | mean | root mean square | largest | random: mean | root mean square | largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for classes, dim in CASES:
        bound = ((classes - dim) / (dim * (classes - 1))) ** 0.5
        numbers = (bound, *cosines(torch.arange(classes), dim), *cosines(RANDOM + torch.arange(classes), dim))
        lines.append(f"| {classes:,} | {dim} | {' | '.join(f'{number:.4f}' for number in numbers)} |")
    return "\n".join(lines)
