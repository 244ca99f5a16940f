"""Cost of one step on each of W ranks, as a model: bytes over the network, and operations of the loss.

W ranks of n rows of P classes each, N = W n, D dimensions, C classes in all, float32. Collectives are rings: an
all-gather of B bytes sends B (W - 1) / W from each rank, an all-reduce twice as much. The centroid level multiplies an
(N, D) by a (D, C) matrix once forward and twice backward: 6 N C D operations.

- gather: the embeddings of all ranks go to all; each computes the loss of all N rows; the gradient is all-reduced.
- sums: each rank sends the labels of its P classes with their counts, and the class sums (C, D) are all-reduced, with
  gradient; each rank computes the loss of its n rows. At the centroid level that gives the same value and gradient: the
  loss is a sum over rows, given the means.

Milliseconds are bytes at BANDWIDTH plus operations at RATE: assumptions, not measurements.
"""

BANDWIDTH = 25e9  # bytes/s of a rank in a ring: 200 Gbit/s of network for each GPU
RATE = 10e12  # float32 operations/s that such thin matrices reach; a GPU's peak is several times as high
ENCODER = 25.6e6 * 4  # bytes of ResNet-50's gradients, which DDP all-reduces at every step
CASES = ((120, 16, 10, 10), (256, 128, 1_000, 64))  # n, D, C, P


def gather_cost(world: int, rows: int, dim: int, classes: int, own_classes: int) -> tuple[float, float]:
    """Bytes sent by one rank and operations of the loss: embeddings, labels, and the gradient twice.

    Example:
        >>> gather_cost(2, rows=1, dim=4, classes=1, own_classes=1)
        (56.0, 48)
    """
    total = world * rows
    return (world - 1) / world * (3 * total * dim * 4 + total * 8), 6 * total * classes * dim


def sums_cost(world: int, rows: int, dim: int, classes: int, own_classes: int) -> tuple[float, float]:
    """Bytes sent by one rank and operations of the loss: labels and counts of its classes, the sums and their gradient.

    Example:
        >>> sums_cost(2, rows=1, dim=4, classes=1, own_classes=1)
        (48.0, 24)
    """
    return (world - 1) / world * (4 * classes * dim * 4 + world * own_classes * 16), 6 * rows * classes * dim


def markdown() -> str:
    """The tables of docs/scaling.md."""
    lines = []
    for case in CASES:
        rows, dim, classes, own = case
        fewer = next(world for world in range(2, 10**6) if sums_cost(world, *case)[0] < gather_cost(world, *case)[0])
        lines += [
            f"{rows} embeddings of {own} classes per rank, D = {dim}, C = {classes:,}; "
            f"sums send less from {fewer} ranks on.\n",
            "| ranks | N | gather: MB sent | GFLOP of the loss | ms | sums: MB sent | GFLOP | ms | DDP's own MB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for world in (1, 8, 64, 256, 1024, 8192):
            costs = (gather_cost(world, *case), sums_cost(world, *case))
            numbers = [n for b, f in costs for n in (b / 1e6, f / 1e9, 1e3 * (b / BANDWIDTH + f / RATE))]
            cells = [f"{number:.3g}" for number in (*numbers, 2 * (world - 1) / world * ENCODER / 1e6)]
            lines.append(f"| {world:,} | {world * rows:,} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()
