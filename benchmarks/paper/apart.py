"""Which classes stay apart: two classes are merged where the nearer of their two means does not tell them."""

from typing import NamedTuple

import torch
from torch import Tensor

from simo_lightning.functional.moments import check_embeddings

# Between chance, 0.5, and 1: of two classes' samples, a quarter or more lie nearer to the other's mean.
MERGED_BELOW = 0.75


class Apart(NamedTuple):
    """How far classes are told apart by their means.

    Attributes:
        accuracy: Share of each class's samples whose nearest mean of all is their own class's, ``(C,)``.
        pairwise: Balanced accuracy of the nearer of two means on those two classes' samples, ``(C, C)``, 1 on the
            diagonal; 0.5 is chance.
        groups: Group of each class, ``(C,)`` int64, numbered from 0: merged classes, and those merged with them, are
            one group.
    """

    accuracy: Tensor
    pairwise: Tensor
    groups: Tensor

    @property
    def count(self) -> int:
        """Number of groups: C if all classes stay apart, 1 if none does."""
        return int(self.groups.max()) + 1

    @property
    def alone(self) -> int:
        """Number of classes that share their group with no other."""
        return int((self.groups.bincount() == 1).sum())


def classes_apart(means: Tensor, embeddings: Tensor, labels: Tensor, merged_below: float = MERGED_BELOW) -> Apart:
    """Tell classes by the nearest of their means, all at once and two by two.

    Args:
        means: Class means of the training images, ``(C, D)``, C >= 2.
        embeddings: Of images that the means are not of, ``(N, D)``.
        labels: Class of each, ``(N,)`` in ``0..C - 1``, each class at least once.
        merged_below: Two classes are merged where their pairwise accuracy is lower, in (0.5, 1].

    Returns:
        Accuracies and groups; by Euclidean distance: normalise both first for the angle alone.

    Raises:
        ValueError: If shapes do not fit, a class has no sample, or ``merged_below`` is out of range.

    Example:
        >>> means = torch.tensor([[0.0], [0.1], [9.0]])
        >>> samples = torch.tensor([[0.2], [0.0], [0.0], [0.1], [9.0], [8.0]])
        >>> apart = classes_apart(means, samples, torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> apart.count, apart.alone, apart.groups.tolist()
        (2, 1, [0, 0, 1])

    Source:
        Ours; arXiv 2410.05233 says that without orthogonality "only 4 distinguishable groups" are left, not by what.
    """
    check_embeddings(embeddings, labels)
    classes = len(means)
    if classes < 2 or means.shape[1:] != embeddings.shape[1:]:
        raise ValueError(f"means must be (C, {embeddings.shape[1]}) with C >= 2, got {tuple(means.shape)}")
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes or int(counts.min()) == 0:
        raise ValueError(f"labels must hold every class of 0..{classes - 1}, got counts {counts.tolist()}")
    if not 0.5 < merged_below <= 1:
        raise ValueError(f"merged_below must lie in (0.5, 1], got {merged_below}")
    distances = torch.cdist(embeddings.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist")  # (N, C)
    own = distances.gather(1, labels.unsqueeze(1))  # (N, 1)
    nearest = distances.argmin(1) == labels
    # a tie counts half: where everything has collapsed into a point nothing is told
    told = (own < distances).double() + 0.5 * (own == distances).double()  # (N, C) own mean nearer than that of c
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    share = (one_hot.T @ told) / counts[:, None]  # (C, C) of class a's samples, nearer to a than to c
    pairwise = ((share + share.T) / 2).fill_diagonal_(1.0)
    accuracy = (one_hot.T @ nearest.double()) / counts
    return Apart(accuracy, pairwise, _components(pairwise < merged_below))


def _components(joined: Tensor) -> Tensor:
    """Connected components ``(C,)`` of a symmetric relation ``(C, C)``, numbered by their first member."""
    reach = joined | torch.eye(len(joined), dtype=torch.bool)
    for _ in range(len(joined).bit_length()):  # each squaring doubles the length of the paths
        reach = (reach.double() @ reach.double()) > 0
    first = reach.long().argmax(dim=1)  # smallest member of each class's component
    return first.unique(return_inverse=True)[1]
