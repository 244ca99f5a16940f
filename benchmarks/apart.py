"""Which classes stay apart: two classes are merged where the nearer of their two means does not separate them."""

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

# Between chance, 0.5, and 1: a quarter or more of two classes' samples lie nearer to the other class mean.
MERGED_BELOW = 0.75


def classes_apart(means: Tensor, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Separate classes by the nearest of their means, all at once and two by two.

    Args:
        means: Class means of the training images, ``(C, D)``.
        embeddings: Of other images, ``(N, D)``; compared by Euclidean distance: normalise both for cosines.
        labels: Class of each, ``(N,)``, each class at least once.

    Returns:
        Accuracy of the nearest class mean for each class, ``(C,)``; balanced accuracy of the nearer of two means on
        the samples of those two classes, ``(C, C)``; connected component of merged pairs of each class, ``(C,)``,
        numbered by their first classes.

    Source:
        Ours; arXiv 2410.05233 reports that without orthogonality "only 4 distinguishable groups" are left, without
        a definition.
    """
    counts = torch.bincount(labels, minlength=len(means))
    if len(counts) > len(means) or int(counts.min()) == 0:
        raise ValueError(f"labels must hold every class of 0..{len(means) - 1}, got counts {counts.tolist()}")
    distances = torch.cdist(embeddings.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist")  # (N, C)
    own = distances.gather(1, labels.unsqueeze(1))  # (N, 1)
    # a tie counts half: where all means are one point nothing is separated
    nearer = (own < distances).double() + 0.5 * (own == distances).double()  # (N, C) own mean nearer than that of c
    one_hot = torch.nn.functional.one_hot(labels, len(means)).double()
    share = (one_hot.T @ nearer) / counts[:, None]  # (C, C) of class a's samples, nearer to a than to c
    pairwise = ((share + share.T) / 2).fill_diagonal_(1.0)
    component = torch.from_numpy(connected_components(pairwise.numpy() < MERGED_BELOW)[1])
    first = (component[:, None] == component).int().argmax(dim=1)  # smallest class of each class's component
    accuracy = one_hot.T @ (distances.argmin(1) == labels).double() / counts
    return accuracy, pairwise, first.unique(return_inverse=True)[1]
