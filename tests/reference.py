"""The formulas once more, as the paper writes them: explicit loops over pairs in float64, apart from the package.

Written on torch scalars so that the gradient comes from autograd through the loops themselves.
"""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor


def distance(a: Tensor, b: Tensor) -> Tensor:
    """d = |a - b|^2."""
    return ((a - b) ** 2).sum()


def alignment(a: Tensor, b: Tensor, leaning: float) -> Tensor:
    """o = (a . b)^2, leant."""
    return leaning * (a @ b) ** 2 + (1 - leaning)


def average(values: list[Tensor], like: Tensor) -> Tensor:
    """Mean; 0 of nothing."""
    return torch.stack(values).mean() if values else like.sum() * 0


def shape(form: str) -> Callable[[Tensor], Tensor]:
    """What a form makes of a ratio."""
    return (lambda ratio: ratio) if form == "ratio" else (lambda ratio: torch.log(1 + ratio))


def eq1(rows: Tensor, similar: bool, eps: float, leaning: float) -> Tensor:
    """Eq. 1 on one group, with means over pairs."""
    pairs = list(combinations(range(len(rows)), 2))
    d = average([distance(rows[i], rows[j]) for i, j in pairs], rows)
    o = average([alignment(rows[i], rows[j], leaning) for i, j in pairs], rows)
    return d / (eps + o) if similar else o / (eps + d)


def class_mean(embeddings: Tensor, labels: list[int], label: int) -> Tensor:
    members = [embeddings[i] for i in range(len(labels)) if labels[i] == label]
    total = members[0]
    for member in members[1:]:
        total = total + member
    return total / len(members)


def group(embeddings: Tensor, labels: list[int], form: str, eps: float, leaning: float) -> dict[str, Tensor]:
    f, similar_losses = shape(form), []
    for label in set(labels):
        members = [i for i in range(len(labels)) if labels[i] == label]
        if len(members) > 1:
            similar_losses.append(f(eq1(embeddings[members], True, eps, leaning)))
    across = [(i, j) for i, j in combinations(range(len(labels)), 2) if labels[i] != labels[j]]
    d = average([distance(embeddings[i], embeddings[j]) for i, j in across], embeddings)
    o = average([alignment(embeddings[i], embeddings[j], leaning) for i, j in across], embeddings)
    return {
        "similar": average(similar_losses, embeddings),
        "dissimilar": f(o / (eps + d)) if across else embeddings.sum() * 0,
    }


def class_(embeddings: Tensor, labels: list[int], form: str, eps: float, leaning: float) -> dict[str, Tensor]:
    f, dissimilar_losses = shape(form), []
    for first, other in combinations(sorted(set(labels)), 2):
        pairs = [
            (i, j) for i in range(len(labels)) for j in range(len(labels)) if labels[i] == first and labels[j] == other
        ]
        d = average([distance(embeddings[i], embeddings[j]) for i, j in pairs], embeddings)
        o = average([alignment(embeddings[i], embeddings[j], leaning) for i, j in pairs], embeddings)
        dissimilar_losses.append(f(o / (eps + d)))
    similar = group(embeddings, labels, form, eps, leaning)["similar"]
    return {"similar": similar, "dissimilar": average(dissimilar_losses, embeddings)}


GF2_POLYNOMIALS = {8: 0b1011, 16: 0b10011, 32: 0b100101}


def polynomial_product(x: int, y: int) -> int:
    """Product of two polynomials over GF(2), bit i the coefficient of the power i."""
    product = 0
    for bit in range(y.bit_length()):
        product ^= (x << bit) * (y >> bit & 1)
    return product


def polynomial_remainder(x: int, divisor: int) -> int:
    while x.bit_length() >= divisor.bit_length():
        x ^= divisor << (x.bit_length() - divisor.bit_length())
    return x


def axis(label: int, dim: int) -> Tensor:
    """The unit vector of a class: a coordinate axis, a Gold sequence by polynomial division over GF(2) (dimensions 8,
    16 and 32), or signs from the finalizer of SplitMix64 in 64-bit integers.
    """
    if 0 <= label < dim:
        return torch.tensor([float(column == label) for column in range(dim)], dtype=torch.float64)
    signs, mask = [], 2**64 - 1
    if dim in GF2_POLYNOMIALS and 0 <= label < dim + dim**2:
        a, b = divmod(label - dim, dim)
        for x in range(dim):
            cube = polynomial_remainder(polynomial_product(polynomial_product(x, x), x), GF2_POLYNOMIALS[dim])
            signs.append((-1.0) ** ((a & cube).bit_count() + (b & x).bit_count()))
        return torch.tensor(signs, dtype=torch.float64) / dim**0.5
    for column in range(dim):
        mixed = (label * dim + column + 1) * 0x9E3779B97F4A7C15 & mask
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
        signs.append(1.0 - 2.0 * ((mixed ^ mixed >> 31) & 1))
    return torch.tensor(signs, dtype=torch.float64) / dim**0.5


def centroid(
    embeddings: Tensor,
    labels: list[int],
    form: str,
    eps: float,
    leaning: float,
    smoothing: float,
    prototype_weight: float | None,
) -> dict[str, Tensor]:
    f, similar_losses, dissimilar_losses, entropies = shape(form), [], [], []
    classes = sorted(set(labels))
    means = {label: class_mean(embeddings, labels, label) for label in classes}
    if prototype_weight is None:  # a prototype counts as twelve embeddings of its class
        share = {label: 12 / (12 + labels.count(label)) for label in classes}
    else:
        share = dict.fromkeys(classes, prototype_weight)
    means = {label: (1 - share[label]) * mean + share[label] * axis(label, len(mean)) for label, mean in means.items()}
    for row, own in zip(embeddings, labels, strict=True):
        logits = {}
        for label in classes:
            d, o = distance(row, means[label]), alignment(row, means[label], leaning)
            logits[label] = torch.log((eps + o) / (eps + d))
            if label != own:
                dissimilar_losses.append(f(o / (eps + d)))
            elif labels.count(own) > 1 or share[own] > 0:
                similar_losses.append(f(d / (eps + o)))
        if labels.count(own) > 1 or share[own] > 0:
            normaliser = torch.log(sum(torch.exp(logit) for logit in logits.values()))
            every = sum(normaliser - logit for logit in logits.values()) / len(classes)
            entropies.append((1 - smoothing) * (normaliser - logits[own]) + smoothing * every)
    if form == "softmax":
        return {"softmax": average(entropies, embeddings)}
    return {"similar": average(similar_losses, embeddings), "dissimilar": average(dissimilar_losses, embeddings)}


def pair(
    embeddings: Tensor, labels: list[int], form: str, eps: float, leaning: float, smoothing: float
) -> dict[str, Tensor]:
    f, similar_losses, dissimilar_losses = shape(form), [], []
    if form == "softmax":
        return {"softmax": _pair_softmax(embeddings, labels, eps, leaning, smoothing)}
    for i, j in combinations(range(len(labels)), 2):
        d, o = distance(embeddings[i], embeddings[j]), alignment(embeddings[i], embeddings[j], leaning)
        if labels[i] == labels[j]:
            similar_losses.append(f(d / (eps + o)))
        else:
            dissimilar_losses.append(f(o / (eps + d)))
    return {"similar": average(similar_losses, embeddings), "dissimilar": average(dissimilar_losses, embeddings)}


def _pair_softmax(embeddings: Tensor, labels: list[int], eps: float, leaning: float, smoothing: float) -> Tensor:
    entropies = []
    for i in range(len(labels)):
        logits = {
            j: torch.log(
                (eps + alignment(embeddings[i], embeddings[j], leaning))
                / (eps + distance(embeddings[i], embeddings[j]))
            )
            for j in range(len(labels))
            if j != i
        }
        partners = [j for j in logits if labels[j] == labels[i]]
        if partners:
            normaliser = torch.log(sum(torch.exp(logit) for logit in logits.values()))
            own = sum(normaliser - logits[j] for j in partners) / len(partners)
            every = sum(normaliser - logit for logit in logits.values()) / len(logits)
            entropies.append((1 - smoothing) * own + smoothing * every)
    return average(entropies, embeddings)


def simo(
    embeddings: Tensor,
    labels: list[int],
    level: str,
    form: str,
    eps: float = 0.01,
    leaning: float = 1.0,
    smoothing: float = 0.0,
    prototype_weight: float | None = 0.0,
) -> dict[str, Tensor]:
    """Terms of the loss, unweighted, with the class-means term."""
    if level in ("group", "class"):
        terms = (group if level == "group" else class_)(embeddings, labels, form, eps, leaning)
    elif level == "centroid":
        terms = centroid(embeddings, labels, form, eps, leaning, smoothing, prototype_weight)
    else:
        terms = pair(embeddings, labels, form, eps, leaning, smoothing)
    classes = sorted(set(labels))
    if len(classes) > 1:
        means = torch.stack([class_mean(embeddings, labels, label) for label in classes])
        terms["mean"] = shape("ratio" if form == "ratio" else "log")(eq1(means, False, eps, leaning))
    else:
        terms["mean"] = embeddings.sum() * 0
    return terms
