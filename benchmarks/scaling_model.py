"""Cost of one step on each of W ranks, on paper: what goes over the network, and what the loss computes.

W ranks of n rows, N = W n, D dimensions, C classes, float32. Collectives are rings: an all-gather of B bytes sends
B (W - 1) / W from each rank, an all-reduce twice as much. The centroid level multiplies an (N, D) by a (D, C) matrix
three times forward (class sums, products with the means, distances) and twice as often backward: 18 N C D operations.

- gather: the embeddings of all ranks go to all; each computes the loss of all N rows; the gradient is all-reduced.
- moments: the class sums (C, D) and counts are all-reduced, with gradient; each rank computes the loss of its n rows.
  At the centroid level that gives the same value and gradient: the loss is a sum over rows, given the means.

The seconds stand for no machine that was measured: bytes at BANDWIDTH, operations at RATE.
"""

from typing import NamedTuple

BANDWIDTH = 25e9  # bytes/s of a rank in a ring: 200 Gbit/s of network for each GPU
RATE = 10e12  # float32 operations/s that such thin matrices reach; a GPU's peak is several times as high
ENCODER = 25.6e6 * 4  # bytes of ResNet-50's gradients, which DDP all-reduces at every step
WORLDS = (1, 8, 64, 256, 1024)


class Case(NamedTuple):
    """A batch: n rows on each rank, D dimensions, C classes."""

    rows: int
    dim: int
    classes: int


CASES = (Case(120, 16, 10), Case(256, 128, 1_000))


class Cost(NamedTuple):
    """Of a step on one rank: bytes sent, and operations of the loss."""

    sent: float
    operations: float

    @property
    def milliseconds(self) -> float:
        """One after the other."""
        return 1e3 * (self.sent / BANDWIDTH + self.operations / RATE)


def gather_cost(world: int, case: Case) -> Cost:
    """All-gather of embeddings and labels, loss of all rows, all-reduce of the gradient.

    Args:
        world: W.
        case: n, D and C.

    Returns:
        Its cost.

    Example:
        >>> gather_cost(2, Case(rows=1, dim=4, classes=1))
        Cost(sent=56.0, operations=144)
    """
    rows, share = world * case.rows, (world - 1) / world
    embeddings, labels = rows * case.dim * 4, rows * 8
    return Cost(share * (embeddings + labels + 2 * embeddings), 18 * rows * case.classes * case.dim)


def moments_cost(world: int, case: Case) -> Cost:
    """All-reduce of class sums and counts, and of the gradient of the sums; loss of the rank's own rows.

    Args:
        world: W.
        case: n, D and C.

    Returns:
        Its cost.
    """
    share = (world - 1) / world
    sums = case.classes * case.dim * 4
    return Cost(share * (2 * (sums + case.classes * 4) + 2 * sums), 18 * case.rows * case.classes * case.dim)


def fewer_bytes_from(case: Case) -> int:
    """Number of ranks from which the moments send fewer bytes than the gather."""
    world = 2
    while moments_cost(world, case).sent >= gather_cost(world, case).sent:
        world += 1
    return world


def markdown() -> str:
    """The tables of docs/scaling.md."""
    lines = []
    for case in CASES:
        lines += [
            f"{case.rows} rows a rank, D = {case.dim}, C = {case.classes:,}; the moments send less from "
            f"{fewer_bytes_from(case)} ranks on.",
            "",
            "| ranks | N | gather: MB sent | GFLOP of the loss | ms | moments: MB sent | GFLOP | ms | DDP's own MB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for world in WORLDS:
            gather, moments = gather_cost(world, case), moments_cost(world, case)
            ddp = 2 * (world - 1) / world * ENCODER
            numbers = [gather.sent / 1e6, gather.operations / 1e9, gather.milliseconds]
            numbers += [moments.sent / 1e6, moments.operations / 1e9, moments.milliseconds, ddp / 1e6]
            cells = [f"{world:,}", f"{world * case.rows:,}", *(f"{number:.3g}" for number in numbers)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()
