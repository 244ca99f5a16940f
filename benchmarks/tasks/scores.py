"""Scores of a run from its embeddings alone, so that they can be computed again without training.

Every function takes float32 embeddings ``(N, D)`` and labels ``(N,)`` on the CPU.
"""

import math
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.tasks.data import TaskImages
from simo_lightning.functional import (
    class_mean_similarity,
    fpr_at_recall,
    map_at_r,
    neighbor_similarity,
    orthogonal_shares,
    reliability,
    retrieval_scores,
    span_energy,
    unknown_auroc,
)
from simo_lightning.functional.knn import knn_predict

Scores = dict[str, float]
EPISODES, QUERIES = 600, 15  # of few-shot classification
SIZES = (8, 16, 32)  # dimensions that compression cuts to
BINS = 15  # of the calibration error


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of the embeddings of length 1 of each class, ``(C, D)``."""
    sums = torch.zeros(num_classes, embeddings.shape[1]).index_add_(0, labels, normalize(embeddings))
    return sums / torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)


def mean_accuracy(hits: Tensor) -> float:
    """Share of hits."""
    return float(hits.double().mean())


def retrieval(embeddings: Tensor, labels: Tensor) -> Scores:
    """MAP@R, R-precision and Recall@1, each image against all others; images alone in their class do not count."""
    found = retrieval_scores(embeddings, labels, ks=(1,))
    values = {"map_at_r": found.average_precision, "r_precision": found.r_precision, "recall_at_1": found.recall[:, 0]}
    return {name: float(value.double().nanmean()) for name, value in values.items()}


def classification(bank: Tensor, bank_labels: Tensor, test: Tensor, labels: Tensor, probe: bool) -> Scores:
    """kNN(20) and the nearest class mean by cosine; with ``probe`` logistic regression on standardised embeddings."""
    count = int(bank_labels.max()) + 1
    means = normalize(class_means(bank, bank_labels, count))
    nearest = (normalize(test) @ means.T).argmax(1)
    found = {
        "knn": mean_accuracy(knn_predict(test, bank, bank_labels, min(20, len(bank))) == labels),
        "nearest_class_mean": mean_accuracy(nearest == labels),
    }
    if probe:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
        model.fit(bank.numpy(), bank_labels.numpy())
        found["linear_probe"] = float(model.score(test.numpy(), labels.numpy()))
    return found


def few_shot(embeddings: Tensor, labels: Tensor, ways: int, shots: int, seed: int = 0) -> Scores:
    """Accuracy of the nearest mean of ``shots`` images among ``ways`` classes, over 600 episodes of 15 queries a class.

    Returns:
        The mean, and half the width of its 95 % confidence interval; nothing where there are fewer classes.
    """
    units, generator = normalize(embeddings), torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    members = [each for each in members if len(each) > shots]
    if len(members) < ways:
        return {}
    accuracies = []
    for _ in range(EPISODES):
        chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
        drawn = [members[each][torch.randperm(len(members[each]), generator=generator)] for each in chosen]
        means = normalize(torch.stack([units[each[:shots]].mean(0) for each in drawn]))
        queries = [each[shots : shots + QUERIES] for each in drawn]
        predicted = (units[torch.cat(queries)] @ means.T).argmax(1)
        wanted = torch.repeat_interleave(torch.arange(ways), torch.tensor([len(each) for each in queries]))
        accuracies.append((predicted == wanted).double().mean())
    values = torch.stack(accuracies)
    name = f"few_shot_{ways}_way_{shots}_shot"
    return {name: float(values.mean()), f"{name}_interval": float(1.96 * values.std() / math.sqrt(EPISODES))}


def unknown(bank: Tensor, bank_labels: Tensor, known: Tensor, others: Tensor, other_labels: Tensor) -> Scores:
    """AUROC and FPR at 95 % of three scores of known images, by one half of the unknown classes; ``best`` is the score
    with the best AUROC on the other half, so that the choice does not see the images that it is judged by.
    """
    means = class_means(bank, bank_labels, int(bank_labels.max()) + 1)
    scores = {
        "cosine": lambda rows: class_mean_similarity(rows, means),
        "energy": lambda rows: span_energy(rows, means).float(),
        "neighbor": lambda rows: neighbor_similarity(rows, bank, k=5),
    }
    first = other_labels % 2 == 0  # every second class
    found, chosen = {}, {}
    for name, score in scores.items():
        inside, outside = score(known), score(others)
        chosen[name] = float(unknown_auroc(inside, outside[first]))
        found[f"auroc_{name}"] = float(unknown_auroc(inside, outside[~first]))
        found[f"fpr95_{name}"] = float(fpr_at_recall(inside, outside[~first]))
    best = max(chosen, key=lambda name: chosen[name])
    return {**found, "auroc_best": found[f"auroc_{best}"], "fpr95_best": found[f"fpr95_{best}"]}


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The factor of the logits with the smallest cross-entropy, by golden-section search over its logarithm."""
    low, high, golden = -5.0, 7.0, (math.sqrt(5) - 1) / 2

    def loss(logarithm: float) -> float:
        return float(cross_entropy(logits.double() * math.exp(logarithm), labels))

    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Expected calibration error in 15 bins, and accuracy."""
    confidence, predicted = probabilities.max(1)
    correct = predicted == labels
    return float(reliability(confidence.clamp(0, 1), correct, BINS).error), mean_accuracy(correct)


def calibration(
    bank: Tensor,
    bank_labels: Tensor,
    val: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    head: tuple[Tensor, Tensor] | None,
) -> Scores:
    """Expected calibration error of class probabilities: the orthogonal shares as they are; and with a temperature that
    is fitted to validation images their logarithms, the cosines to the class means, and a linear classifier's logits.
    """
    means = class_means(bank, bank_labels, int(bank_labels.max()) + 1)

    def shares(rows: Tensor) -> Tensor:
        return orthogonal_shares(rows, means).shares

    def cosines(rows: Tensor) -> Tensor:
        return normalize(rows) @ normalize(means).T

    logits = {"shares_fitted": lambda rows: shares(rows).clamp(min=1e-6).log(), "softmax": cosines}
    if head is not None:
        logits["classifier"] = lambda rows: rows @ head[0].T + head[1]
    found = {}
    found["ece_shares"], found["accuracy_shares"] = calibration_error(shares(test[0]), test[1])
    for name, of in logits.items():
        factor = temperature(of(val[0]), val[1])
        probabilities = (of(test[0]).double() * factor).softmax(1)
        found[f"ece_{name}"], found[f"accuracy_{name}"] = calibration_error(probabilities, test[1])
    return found


def compression(bank: Tensor, test: Tensor, labels: Tensor) -> Scores:
    """MAP@R after cutting to the leading axes of the training embeddings' second moment, in int8, and in one bit each:
    whether a coordinate is above its mean among the training embeddings, as they are and after a random rotation, which
    keeps all cosines.
    """
    units, rows = normalize(bank), normalize(test)
    # Not centered: the cosines of what is left are compared, as those of the whole embeddings are
    axes = torch.linalg.eigh(units.double().T @ units.double()).eigenvectors.flip(1).float()
    sizes = (size for size in SIZES if size < test.shape[1])
    found = {f"map_at_r_{size}": float(map_at_r(rows @ axes[:, :size], labels)) for size in sizes}
    scale = rows.abs().amax(1, keepdim=True) / 127
    found["map_at_r_int8"] = float(map_at_r((rows / scale).round(), labels))
    rotation = torch.linalg.qr(torch.randn(len(axes), len(axes), generator=torch.Generator().manual_seed(0))).Q
    for name, turned in (("binary", torch.eye(len(axes))), ("rotated_binary", rotation)):
        bits = rows @ turned > units.mean(0) @ turned
        found[f"map_at_r_{name}"] = float(map_at_r(bits.float() * 2 - 1, labels))
    return found


def by_frequency(bank: Tensor, bank_labels: Tensor, test: Tensor, labels: Tensor) -> Scores:
    """Mean accuracy over classes of the nearest class mean: all, and the most, middle and least frequent third."""
    count = int(bank_labels.max()) + 1
    means = normalize(class_means(bank, bank_labels, count))
    hits = ((normalize(test) @ means.T).argmax(1) == labels).double()
    of_class = torch.zeros(count).double().index_add_(0, labels, hits) / torch.bincount(labels, minlength=count)
    order = torch.bincount(bank_labels, minlength=count).argsort(descending=True, stable=True)
    third = count // 3
    parts = {"frequent": order[:third], "middle": order[third:-third], "rare": order[-third:]}
    values = {"balanced": of_class, **{name: of_class[index] for name, index in parts.items()}}
    return {f"accuracy_{name}": float(value.nanmean()) for name, value in values.items()}


def scores(task: str, images: TaskImages, kept: dict[str, Any]) -> Scores:
    """All scores of a run.

    Args:
        task: Name of the task.
        images: Its images.
        kept: What :func:`benchmarks.tasks.train.train` kept.
    """
    rows = {name: torch.from_numpy(value).float() for name, value in kept.items()}
    bank, bank_labels, test, labels = rows["train"], images.bank_labels, rows["test"], images.test.labels
    found = {**retrieval(test, labels)}
    if task == "unseen":
        assert images.unseen is not None
        other = images.unseen.labels
        found |= {f"unseen_{name}": value for name, value in retrieval(rows["unseen"], other).items()}
        found |= {"known_knn": classification(bank, bank_labels, test, labels, probe=False)["knn"]}
        for ways in (5, 20):
            for shots in (1, 5):
                found |= few_shot(rows["unseen"], other, ways, shots)
        return {**found, **unknown(bank, bank_labels, test, rows["unseen"], other)}
    found |= classification(bank, bank_labels, test, labels, probe=task in ("closed", "coarse"))
    if task == "closed":
        head = (rows["weight"], rows["bias"]) if "bias" in rows else None
        found |= calibration(bank, bank_labels, (rows["val"], images.val.labels), (test, labels), head)
        found |= compression(bank, test, labels)
    if task == "tail":
        found |= by_frequency(bank, bank_labels, test, labels)
    return found
