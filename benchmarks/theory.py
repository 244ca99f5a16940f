"""The tables and the figure of docs/theory.md: python -m benchmarks.theory [NAME ...] [--figure FILE.png].

Float64 on one CPU; every value comes from SimOLoss and autograd or from free embeddings that minimise a loss.
"""

import argparse
import math
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from simo_lightning import SimOLoss
from simo_lightning.functional.decomposition import orthogonal_shares

EPS = 0.01
SMALL = 1e-5  # angle in radians at which the slope over the angle is the second derivative at 0
NAMES = {"pair": "class, centroid, pair"}  # the same for classes that are points
CLASSES = 10
LEVELS = (("group", "ratio"), ("group", "log"), ("pair", "ratio"), ("pair", "log"), ("centroid", "softmax"))
SHAPES = ((3, 2), (4, 2), (5, 3), (6, 3), (10, 4), (20, 8))  # C, D
Loss = Callable[[Tensor], Tensor]


def minimise(loss: Loss, rows: int, dim: int, starts: int = 6) -> tuple[float, Tensor]:
    """The lowest loss of free unit vectors ``(rows, dim)`` by L-BFGS, and these vectors.

    Of seeded random starts the one that is best after 40 steps goes on.
    """

    def descend(start: Tensor, steps: int) -> tuple[float, Tensor]:
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([x], 1, steps, None, 1e-10, 1e-14, 20, "strong_wolfe")

        def step() -> Tensor:
            x.grad = None
            value = loss(F.normalize(x, dim=1))
            value.backward()
            return value

        optimizer.step(step)  # type: ignore[no-untyped-call]
        unit = F.normalize(x.detach(), dim=1)
        return float(loss(unit)), unit

    found = []
    for seed in range(starts):
        start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(descend(start, 40))
    return descend(min(found, key=lambda pair: pair[0])[1], 400)


def off_diagonal(means: Tensor) -> Tensor:
    """Cosines of different rows."""
    unit = F.normalize(means, dim=1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


def significant(number: float) -> str:
    """Four significant digits."""
    if abs(number) < 1e-9:  # rounding
        return "0"
    digits = 3 - math.floor(math.log10(abs(number)))
    return f"{round(number, digits):,.{max(0, digits)}f}"


def welch(classes: int, dim: int) -> float:
    """The lowest mean squared cosine of C unit vectors in D < C dimensions."""
    return (classes - dim) / (dim * (classes - 1))


def at_angle(theta: Tensor, classes: int) -> Tensor:
    """Two embeddings of each class: classes 0 and 1 at +-theta / 2 about the middle of their axes, others on theirs."""
    half = math.pi / 4 + theta / 2 * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    pair = F.pad(torch.stack([half.cos(), half.sin()], dim=1), (0, classes - 2))
    return torch.cat([pair, torch.eye(classes, dtype=torch.float64)[2:]]).repeat_interleave(2, dim=0)


def slope(loss: SimOLoss, angle: float, classes: int = CLASSES) -> float:
    """Derivative of the loss by the angle between two classes, in radians."""
    theta = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
    value = loss(at_angle(theta, classes), torch.arange(classes).repeat_interleave(2))
    return float(torch.autograd.grad(value, theta)[0])


def of_one_pair(level: str, form: str, eps: float, classes: int = CLASSES) -> SimOLoss:
    """The loss without prototypes, weighted so that one pair of classes counts once.

    Ratio and log are means over C (C - 1) / 2 pairs of classes, softmax one over the embeddings of C classes.
    """
    weight = classes / 2 if form == "softmax" else classes * (classes - 1) / 2
    similar = weight if form == "softmax" else 1.0
    return SimOLoss(level, form, eps, 1.0, True, similar, weight, 0.0, 0.0, 0.0)  # type: ignore[arg-type]


def saddle() -> str:
    heads = ["level", "form", "eps 0.1", "eps 0.01", "eps 0.001", "steepest", "at", "at 60°"]
    """Second derivative of the loss at merged classes, and the steepest descent away from there."""
    lines = []
    for level, form in LEVELS:
        bends = [slope(of_one_pair(level, form, eps), SMALL) / SMALL for eps in (0.1, EPS, 0.001)]
        loss = of_one_pair(level, form, EPS)
        tried = [*(x / 5 for x in range(1, 50)), *range(10, 81)]
        push = {degrees: -slope(loss, math.radians(degrees)) for degrees in tried}
        best = max(push, key=lambda degrees: push[degrees])
        cells = [significant(bend) for bend in bends]
        lines.append([NAMES.get(level, level), form, *cells, f"{push[best]:.3g}", f"{best:g}°", f"{push[60]:.3g}"])
    return table(heads, lines)


def prototypes() -> str:
    heads = ["prototype_weight", "ratio", "leading", "log", "leading", "softmax", "leading"]
    lines = []
    for weight in (0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 1.0):
        cells = []
        for form, scale in (("ratio", EPS**-2), ("log", EPS**-1), ("softmax", EPS**-1 / 2)):
            loss = SimOLoss("centroid", form, EPS, mean_weight=0.0, prototype_weight=weight)  # type: ignore[arg-type]
            cells += [significant(abs(slope(loss, 0.0, 2))), significant(2**0.5 * weight * scale)]
        lines.append([f"{weight:g}", *cells])
    return table(heads, lines)


def means() -> str:
    heads = ["K", "prototype_weight", "own embedding in its center", "noise of the center", "own distance"]
    lines = []
    for count in (2, 5, 12, 50):
        for weight in (0.0, 0.5, 1.0):
            own = (1 - weight) / count
            noise = (1 - weight) ** 2 / count
            distance = (1 - own) ** 2 + (1 - weight) ** 2 * (count - 1) / count**2
            lines.append([str(count), f"{weight:g}", *(f"{number:.3f}" for number in (own, noise, distance))])
    return table(heads, lines)


def likelihood() -> str:
    heads = ["cosine", "o", "d", "similar", "p(same)", "dissimilar", "p(different)", "sum of both - 1"]
    lines = []
    for cosine in (-1.0, -0.5, 0.0, 0.5, 0.9, 1.0):
        other = [cosine, math.sqrt(1 - cosine**2)]
        pair = torch.tensor([[1.0, 0.0], other], dtype=torch.float64)
        losses = [
            SimOLoss("pair", "log", EPS, dissimilar_weight=1.0)(pair, torch.tensor([0, label])) for label in (0, 1)
        ]
        similar, different = (float(loss) for loss in losses)
        p, q = math.exp(-similar), math.exp(-different)
        numbers = (cosine**2, 2 - 2 * cosine, similar, p, different, q, p + q - 1)
        lines.append([f"{cosine:g}", *(f"{number:.4f}" for number in numbers)])
    return table(heads, lines)


def best_cosine(eps: float) -> float:
    """The cosine at which the odds (eps + cos^2) / (eps + 2 - 2 cos) are lowest."""
    return (2 + eps - math.sqrt(eps**2 + 8 * eps + 4)) / 2


def optimum() -> str:
    labels = torch.arange(CLASSES).repeat_interleave(2)
    plain = {"mean_weight": 0.0, "prototype_weight": 0.0}
    simplex = f"{-1 / (CLASSES - 1):.4f}"
    rows: list[tuple[str, Loss, str]] = [
        ("`SimOLoss(prototype_weight=0.5)`", lambda x: SimOLoss(prototype_weight=0.5)(x, labels), "0.0000"),
        ("`SimOLoss()`, prototype weight 0.86", lambda x: SimOLoss()(x, labels), "0.0000"),
        ("log, no prototypes", lambda x: SimOLoss(prototype_weight=0.0)(x, labels), "0.0000"),
    ]
    for eps in (EPS, 0.1):
        loss = SimOLoss("centroid", "softmax", eps, **plain)  # type: ignore[arg-type]
        rows.append(
            (f"softmax, eps {eps:g}", lambda x, loss=loss: loss(x, labels), f"{best_cosine(eps):.4f}")  # type: ignore[misc]
        )
    smooth = SimOLoss.softmax(mean_weight=0.2, prototype_weight=0.0)
    rows.append(("softmax, eps 0.1, label smoothing 0.1, mean weight 0.2", lambda x: smooth(x, labels), "0.0000"))
    rows.append(("normalised softmax, temperature 0.1", lambda x: normalised_softmax(x, labels), simplex))
    lines = []
    for name, function, predicted in rows:
        value, x = minimise(function, len(labels), 16)
        centers = torch.stack([x[labels == label].mean(dim=0) for label in range(CLASSES)])
        cosines = off_diagonal(centers)
        numbers = (float(cosines.min()), float(cosines.max()), float(centers.norm(dim=1).min()))
        lines.append([name, f"{value:.4f}", predicted, *(f"{number + 0.0:.4f}" for number in numbers)])
    return table(
        ["loss", "value", "cosine derived", "smallest found", "largest found", "shortest class mean"], lines
    ).replace("-0.0000", "0.0000")


def normalised_softmax(x: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy with the cosines between embeddings and class means, over a temperature, as logits."""
    centers = torch.stack([x[labels == label].mean(dim=0) for label in labels.unique()])
    return F.cross_entropy(x @ F.normalize(centers, dim=1).T / temperature, labels)


def frames() -> str:
    lines = []
    for classes, dim in SHAPES:
        once, twice = torch.arange(classes), torch.arange(classes).repeat_interleave(2)
        cells = [f"{welch(classes, dim):.4f}"]
        for level, form in (("group", "ratio"), ("pair", "ratio"), ("pair", "log"), ("centroid", "softmax")):
            loss = SimOLoss(level, form, EPS, mean_weight=0.0, prototype_weight=0.0)  # type: ignore[arg-type]
            labels = twice if form == "softmax" else once  # softmax counts classes of two embeddings or more

            def of_classes(x: Tensor, loss: SimOLoss = loss, labels: Tensor = labels) -> Tensor:
                return loss(x[labels], labels)

            _, x = minimise(of_classes, classes, dim, starts=16 if classes < 6 else 6)
            cosines = off_diagonal(x)
            # where there are several local minima of nearly the same loss, the squares are the same
            several = level == "group" or classes > 2 * dim
            cells.append(
                f"{float(cosines.square().mean()):.4f}" + ("" if several else f" ({float(cosines.min()):.2f})")
            )
        lines.append([str(classes), str(dim), *cells])
    return table(["C", "D", "Welch's bound", "group, ratio", "pair, ratio", "pair, log", "softmax"], lines)


def collapse() -> str:
    """Log form without prototypes, class means at equal angles in the plane: points, and one of four reversed."""
    lines, loss = [], SimOLoss(eps=EPS, mean_weight=0.0, prototype_weight=0.0)
    for classes in (4, 6, 8, 10, 20):
        angles = torch.arange(classes, dtype=torch.float64) * (2 * math.pi / classes)
        labels = torch.arange(classes).repeat_interleave(4)
        x = torch.stack([angles.cos(), angles.sin()], dim=1)[labels]
        points = float(loss(x, labels))
        x[::4] *= -1
        lines.append([str(classes), f"{points:.4f}", f"{float(loss(x, labels)):.4f}"])
    return table(["C", "points", "one of four reversed"], lines)


def probabilities(degrees: float, eps: float = EPS) -> tuple[float, float, float]:
    """Of a unit vector at an angle to the first of two orthonormal class means: share, p(same) and softmax p."""
    angle = math.radians(degrees)
    x = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    centers = torch.eye(2, dtype=torch.float64)
    o, d = (x @ centers.T).square(), (x - centers).square().sum(dim=1)
    odds = (eps + o[0]) / (eps + d)
    same = (eps + o[0, 0]) / (eps + o[0, 0] + d[0])
    return float(orthogonal_shares(x, centers).shares[0, 0]), float(same), float(odds[0] / odds.sum())


def temperature(degrees: float) -> float:
    """The temperature at which the softmax probability without eps is the share, between two orthonormal means."""
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    return 1 + math.log((1 - sine) / (1 - cosine)) / (2 * math.log(cosine / sine))


def shares() -> str:
    lines = []
    for degrees in (0, 10, 20, 30, 40, 45, 50, 60, 70, 80, 90):
        numbers = [f"{number:.4f}" for number in probabilities(degrees)]
        found = f"{temperature(degrees):.4f}" if degrees not in (0, 45, 90) else ""
        lines.append([f"{degrees}°", *numbers, found])
    return table(["angle", "share", "p(same)", "softmax", "temperature at eps 0"], lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (saddle, prototypes, means, likelihood, optimum, frames, collapse, shares)
}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def figure() -> Figure:
    """The loss of two classes over their angle, the odds of a wrong class over its cosine, shares and probabilities."""
    drawn = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    angles = [x / 2 for x in range(-180, 181)]
    labels = torch.arange(2).repeat_interleave(2)
    for weight, color in ((0.0, "#D55E00"), (0.1, "#E69F00"), (0.5, "#0072B2")):
        loss = SimOLoss(eps=EPS, mean_weight=0.0, prototype_weight=weight)
        values = [float(loss(at_angle(torch.tensor(math.radians(x), dtype=torch.float64), 2), labels)) for x in angles]
        left.plot(angles, values, color=color, label=f"prototype_weight {weight:g}")
    left.set(xlabel="angle between two classes, degrees", ylabel="loss, log form", xticks=range(-90, 91, 45))
    left.set_ylim(top=6.2)
    left.legend(frameon=False, fontsize="small", loc="upper left")
    cosines = torch.linspace(-1, 0.6, 200, dtype=torch.float64)
    for eps, color in ((0.01, "#0072B2"), (0.1, "#D55E00")):
        middle.plot(cosines, (eps + cosines**2) / (eps + 2 - 2 * cosines), color=color, label=f"eps {eps:g}")
        best = best_cosine(eps)
        middle.plot(best, (eps + best**2) / (eps + 2 - 2 * best), "o", color=color)
    middle.set(xlabel="cosine of two class means", ylabel="odds of the other class")
    middle.legend(frameon=False, fontsize="small")
    rows = [probabilities(x / 2) for x in range(181)]
    for name, values, color, style in zip(
        ("share", "p(same)", "softmax"), zip(*rows, strict=True), ("black", "#0072B2", "#D55E00"), "-:-", strict=True
    ):
        right.plot([x / 2 for x in range(181)], list(values), color=color, linestyle=style, label=name)
    right.set(xlabel="angle to the first of two means, degrees", xticks=range(0, 91, 15))
    right.legend(frameon=False, fontsize="small")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return drawn


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--figure", type=Path, help="draw the figure into this file and print no table")
    given = parser.parse_args(words)
    unknown = [name for name in given.names if name not in TABLES]
    if unknown:
        parser.error(f"tables are {', '.join(TABLES)}, got {', '.join(unknown)}")
    if given.figure:
        figure().savefig(given.figure, dpi=80)
        return
    print("\n\n".join(TABLES[name]() for name in given.names or TABLES))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other commands do, when piped into head
    main()
