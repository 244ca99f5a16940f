"""Geometry once more: NumPy float64 loops over the embeddings themselves, and other libraries.

Every function takes ``rows (N, D)`` and ``labels (N,)``. Those of LOOPS, one for each declared metric and with its
name, are the definitions; those of OTHERS come from another library or transcribe a published one.
"""

from itertools import combinations

import numpy as np
import scipy.linalg
import scipy.spatial
import scipy.stats
from numpy.typing import NDArray
from scipy.sparse.linalg import svds
from sklearn.decomposition import PCA
from sklearn.metrics import calinski_harabasz_score
from sklearn.metrics.pairwise import cosine_similarity

from simo_lightning.functional.geometry import GEOMETRY

Floats = NDArray[np.float64]


def members(rows, labels) -> list[Floats]:
    """Rows of each class that has some."""
    return [np.array([row for row, label in zip(rows, labels, strict=True) if label == c]) for c in sorted(set(labels))]


def class_means(rows, labels) -> list[Floats]:
    return [np.mean(own, axis=0) for own in members(rows, labels)]


def centered(rows, labels) -> list[Floats]:
    means = class_means(rows, labels)
    return [mean - np.mean(means, axis=0) for mean in means]


def cosine(a, b) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def cosines(vectors) -> list[float]:
    return [cosine(a, b) for a, b in combinations(vectors, 2)]


def class_cosine(rows, labels):
    return np.mean(np.abs(cosines(class_means(rows, labels))))


def class_cosine_max(rows, labels):
    return max(np.abs(cosines(class_means(rows, labels))))


def centered_cosine(rows, labels):
    return np.mean(np.abs(cosines(centered(rows, labels))))


def centered_cosine_max(rows, labels):
    return max(np.abs(cosines(centered(rows, labels))))


def simplex_deviation(rows, labels):
    return np.mean([abs(value + 1 / (len(set(labels)) - 1)) for value in cosines(centered(rows, labels))])


def equinorm(rows, labels):
    norms = [np.linalg.norm(mean) for mean in centered(rows, labels)]
    return np.std(norms) / np.mean(norms)


def equiangularity(rows, labels):
    return np.std(cosines(centered(rows, labels)))


def effective_rank(rows, labels):
    singular = np.linalg.svd(rows, compute_uv=False)
    return np.exp(scipy.stats.entropy(singular / singular.sum()))


def stable_rank(rows, labels):
    return sum(value**2 for row in rows for value in row) / np.linalg.svd(rows, compute_uv=False)[0] ** 2


def covariances(rows, labels) -> list[Floats]:
    """Of the classes with two rows or more."""
    found = []
    for own in members(rows, labels):
        if len(own) > 1:
            mean = np.mean(own, axis=0)
            found.append(sum(np.outer(row - mean, row - mean) for row in own) / len(own))
    return found


def participation_ratio(rows, labels):
    spectra = [np.linalg.eigvalsh(covariance) for covariance in covariances(rows, labels)]
    return np.mean([spectrum.sum() ** 2 / (spectrum**2).sum() for spectrum in spectra])


def along(rows, labels) -> list[float]:
    found = []
    for own in members(rows, labels):
        if len(own) > 1:
            mean = np.mean(own, axis=0)
            found.append(np.mean([((row - mean) @ mean / np.linalg.norm(mean)) ** 2 for row in own]))
    return found


def variance_along(rows, labels):
    return np.mean(along(rows, labels))


def variance_across(rows, labels):
    if rows.shape[1] == 1:
        return np.nan
    pairs = zip(covariances(rows, labels), along(rows, labels), strict=True)
    return np.mean([(np.trace(covariance) - part) / (rows.shape[1] - 1) for covariance, part in pairs])


def subspace_overlap(rows, labels):
    bases = []
    for own in members(rows, labels):
        _, singular, directions = np.linalg.svd(own, full_matrices=False)
        bases.append(directions[:2][singular[:2] > 1e-6 * singular[0]])
    shared = [
        sum((u @ v) ** 2 for u in first for v in other) / min(len(first), len(other))
        for first, other in combinations(bases, 2)
    ]
    return np.mean(shared)


def scatter_ratio(rows, labels):
    center = np.mean(rows, axis=0)
    classes = list(zip(members(rows, labels), class_means(rows, labels), strict=True))
    within = sum(((row - mean) ** 2).sum() for own, mean in classes for row in own)
    return within / sum(len(own) * ((mean - center) ** 2).sum() for own, mean in classes)


def scatters(rows, labels) -> tuple[Floats, Floats]:
    """S_W and S_B of neural collapse."""
    classes = list(zip(members(rows, labels), class_means(rows, labels), strict=True))
    within = sum(np.outer(row - mean, row - mean) for own, mean in classes for row in own) / len(rows)
    return within, sum(np.outer(mean, mean) for mean in centered(rows, labels)) / len(classes)


def nc1(rows, labels):
    within, between = scatters(rows, labels)
    return np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / len(set(labels))


def alignment(rows, labels):
    pairs = [(i, j) for i, j in combinations(range(len(rows)), 2) if labels[i] == labels[j]]
    return np.mean([((rows[i] - rows[j]) ** 2).sum() for i, j in pairs])


def rms_norm(rows, labels):
    return np.sqrt(np.mean([row @ row for row in rows]))


def norm_spread(rows, labels):
    squares = [row @ row for row in rows]
    return np.sqrt(np.mean([(square - np.mean(squares)) ** 2 for square in squares])) / np.mean(squares)


LOOPS = {name: value for name, value in globals().items() if name in GEOMETRY}


def _off_diagonal(vectors):
    return cosine_similarity(np.stack(vectors))[np.triu_indices(len(vectors), 1)]


def _calinski_harabasz(rows, labels):
    num_classes = len(set(labels))
    return (len(rows) - num_classes) / (num_classes - 1) / calinski_harabasz_score(rows, labels)


def _coherence(rows, labels):
    """NC2 as in the analysis code of Han, Papyan & Donoho (arXiv 2106.02073): "Avg|Cos + 1/(C-1)|"."""
    vectors = np.stack(centered(rows, labels), axis=1)  # (D, C)
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    num_classes = vectors.shape[1]
    gram = vectors.T @ vectors + np.ones((num_classes, num_classes)) / (num_classes - 1)
    return np.abs(gram - np.diag(np.diag(gram))).sum() / (num_classes * (num_classes - 1))


def _tr_sw_inv_sb(rows, labels):
    """NC1 by the same code's route, C - 1 singular vectors of S_B; over C, as in PNAS 2020."""
    within, between = scatters(rows, labels)
    vectors, values, _ = svds(between, k=len(set(labels)) - 1, random_state=0)
    return np.trace(within @ vectors @ np.diag(1 / values) @ vectors.T) / len(set(labels))


def self_duality(rows, labels, weight):
    """NC3 by the same code: squared Frobenius distance of the two, each of Frobenius norm 1; W and M are (D, C)."""
    means, weight = np.stack(centered(rows, labels), axis=1), weight.T
    return np.linalg.norm(weight / np.linalg.norm(weight, "fro") - means / np.linalg.norm(means, "fro")) ** 2


def _angles(rows, labels):
    bases = [np.linalg.svd(own)[2][:2].T for own in members(rows, labels)]
    return np.mean([np.mean(np.cos(scipy.linalg.subspace_angles(a, b)) ** 2) for a, b in combinations(bases, 2)])


def _pca(rows, labels):
    ratios = [PCA().fit(own).explained_variance_ratio_ for own in members(rows, labels)]
    return np.mean([1 / (ratio**2).sum() for ratio in ratios])


def _projected(rows, labels):
    projections = [own @ (own.mean(axis=0) / np.linalg.norm(own.mean(axis=0))) for own in members(rows, labels)]
    return np.mean([np.var(projection) for projection in projections])


def _pdist(rows, labels):
    pairs = np.concatenate([scipy.spatial.distance.pdist(own, "sqeuclidean") for own in members(rows, labels)])
    return pairs.mean()


#: Library and function, for classes of several embeddings in more dimensions than classes.
OTHERS = {
    "alignment": ("scipy pdist", _pdist),
    "centered_cosine": ("scikit-learn cosine_similarity", lambda *a: np.abs(_off_diagonal(centered(*a))).mean()),
    "centered_cosine_max": ("scikit-learn cosine_similarity", lambda *a: np.abs(_off_diagonal(centered(*a))).max()),
    "subspace_overlap": ("scipy subspace_angles", _angles),
    "nc1": ("Han, Papyan & Donoho, tr{Sw Sb^-1}", _tr_sw_inv_sb),
    "norm_spread": ("scipy variation", lambda rows, _: scipy.stats.variation((rows**2).sum(axis=1))),
    "class_cosine": ("scikit-learn cosine_similarity", lambda *a: np.abs(_off_diagonal(class_means(*a))).mean()),
    "class_cosine_max": ("scikit-learn cosine_similarity", lambda *a: np.abs(_off_diagonal(class_means(*a))).max()),
    "participation_ratio": ("scikit-learn PCA", _pca),
    "simplex_deviation": ("Han, Papyan & Donoho, Avg|Cos + 1/(C-1)|", _coherence),
    "stable_rank": ("numpy norms", lambda rows, _: (np.linalg.norm(rows) / np.linalg.norm(rows, 2)) ** 2),
    "variance_along": ("numpy var of projections", _projected),
    "scatter_ratio": ("scikit-learn calinski_harabasz", _calinski_harabasz),
}
