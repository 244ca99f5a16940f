"""The pictures of the report, each with title, caption and alternative text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from simo_lightning import plotting
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import Curve, Projection, Snapshot
from simo_lightning.plotting.canvas import save, share
from simo_lightning.report.curves import drawn_names

PROJECTIONS: dict[str, tuple[str, str]] = {
    "pca": ("PCA", "Projection on the two directions of largest variance."),
    "tsne": ("t-SNE", "Keeps neighbours together; sizes of clusters and distances between them mean little."),
    "umap": ("UMAP", "Keeps neighbours together; sizes of clusters and distances between them mean little."),
}
_PANELS = 6
_FRAMES = 20  # snapshots of the animation


class EmbeddedImages(NamedTuple):
    """Embeddings of a split.

    Attributes:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        images: uint8 ``(M, C, H, W)`` of some embeddings, or None.
        index: Which embeddings have images, ascending ``(M,)``; None: the first M.
    """

    embeddings: Tensor
    labels: Tensor
    images: Tensor | None = None
    index: Tensor | None = None

    @property
    def pictured(self) -> Tensor:
        """Which embeddings have images, ``(M,)``."""
        count = 0 if self.images is None else len(self.images)
        return torch.arange(count) if self.index is None else self.index


class Picture(NamedTuple):
    """A picture with its texts.

    Attributes:
        path: PNG or GIF.
        title: Heading.
        alt: Alternative text for screen readers.
        text: Caption that explains how to read it.
    """

    path: Path
    title: str
    alt: str
    text: str

    @property
    def moves(self) -> bool:
        """Whether it is an animation."""
        return self.path.suffix == ".gif"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        with Image.open(self.path) as image:
            return image.size


def choose_queries(labels: Tensor, queries: int | Sequence[int]) -> Tensor:
    """Indices of the images whose nearest neighbours are shown.

    Args:
        labels: Of the embeddings that have images, ``(M,)``.
        queries: Indices, or their number: then the first image of classes that are spread over all of them or, of more
            images than classes, the first image of each class, the second of each class, and so on.

    Returns:
        Indices ``(Q,)``.

    Raises:
        ValueError: If an index is not in ``0..M - 1``, or the number is negative.

    Example:
        >>> choose_queries(torch.tensor([1, 1, 0, 2]), 3).tolist()
        [2, 0, 3]
    """
    if isinstance(queries, int):
        if queries < 0:
            raise ValueError(f"queries must be a number >= 0 or a list of indices, got {queries}")
        classes = labels.unique()
        if 0 < queries < len(classes):
            chosen = classes[torch.arange(queries) * len(classes) // queries]
            return (labels == chosen.unsqueeze(1)).int().argmax(dim=1)
        seen: Counter[int] = Counter()
        order = []  # (images of its class before it, label, index)
        for index, label in enumerate(labels.tolist()):
            order.append((seen[label], label, index))
            seen[label] += 1
        return torch.tensor([index for *_, index in sorted(order)[:queries]], dtype=torch.long)
    if any(not 0 <= query < len(labels) for query in queries):
        raise ValueError(f"queries must be indices 0..{len(labels) - 1} of images of the split, got {list(queries)}")
    return torch.tensor(list(queries), dtype=torch.long)


def draw_similarity(folder: Path, means: Tensor, class_names: Sequence[str], order: Tensor) -> Picture:
    """The cosines between class means.

    Args:
        folder: Must exist; the picture is written into it.
        means: Class means ``(C, D)``.
        class_names: C names.
        order: Of the classes in the picture, ``(C,)``.

    Returns:
        The picture.
    """
    path, ordered = folder / "similarity.png", [class_names[index] for index in order.tolist()]
    save(plotting.class_similarity_figure(means[order], ordered), path)
    text = (
        "Off the diagonal 0 is best: such classes are orthogonal. Near 1 two classes share a direction; where all do, "
        "the embedding has collapsed."
    )
    return Picture(path, "Cosine between class means", plotting.describe_similarity(means[order], ordered), text)


def draw_norms(folder: Path, moments: ClassMoments, class_names: Sequence[str]) -> Picture:
    """Norm and spread of each class; arguments as in :func:`draw_spectrum`."""
    path = folder / "norms.png"
    save(plotting.norms_figure(moments, class_names), path)
    text = "A class whose spread is as large as its norm has no clear direction."
    return Picture(path, "Norm and spread of each class", plotting.describe_norms(moments, class_names), text)


def draw_spectrum(folder: Path, moments: ClassMoments) -> Picture:
    """Singular values.

    Args:
        folder: Must exist; the picture is written into it.
        moments: Class moments of all embeddings.

    Returns:
        The picture.
    """
    path = folder / "spectrum.png"
    save(plotting.spectrum_figure(moments), path)
    text = "Orthogonal classes need as many large values as there are classes; one or two large values show a collapse."
    return Picture(path, "Singular values", plotting.describe_spectrum(moments), text)


def draw_maps(
    folder: Path,
    points: Mapping[Projection, Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    total: int,
) -> list[Picture]:
    """The maps.

    Args:
        folder: Must exist; the pictures are written into it.
        points: ``(M, 2)`` of each projection.
        labels: Class of each point, ``(M,)``.
        class_names: C names.
        total: Number of embeddings of the split.

    Returns:
        One picture per projection.
    """
    present = len(labels.unique())
    note = "" if present == len(class_names) else f"\n{share(present, len(class_names))} classes"
    pictures = []
    for projection, places in points.items():
        name, text = PROJECTIONS[projection]
        path = folder / f"{projection}.png"
        title = f"{name} of {len(labels):,} of {total:,} embeddings{note}"
        save(plotting.scatter_figure(places, labels, class_names, title), path)
        pictures.append(Picture(path, name, plotting.describe_scatter(places, labels, class_names, title), text))
    return pictures


def draw_curves(folder: Path, curves: Mapping[str, Curve]) -> list[Picture]:
    """The values that the run logged in training.

    Args:
        folder: Must exist; the picture is written into it.
        curves: By their logged names.

    Returns:
        One picture; none if the run logged nothing.
    """
    names = drawn_names(curves)
    if not names:
        return []
    path, runs = folder / "curves.png", {"Training": curves}
    save(plotting.curves_figure(runs, names, "optimizer step"), path)
    text = "Values in the run's metrics.csv by optimizer step."
    return [Picture(path, "Training curves", plotting.describe_curves(runs, names), text)]


def draw_training(folder: Path, snapshots: Sequence[Snapshot], class_names: Sequence[str]) -> list[Picture]:
    """The same images in the epochs of training.

    Args:
        folder: Must exist; the pictures are written into it.
        snapshots: In order.
        class_names: C names.

    Returns:
        Three pictures; none if there are fewer than two snapshots or their classes differ.
    """
    if len(snapshots) < 2 or any(len(each.counts) != len(class_names) for each in snapshots):
        return []
    few = plotting.pick_snapshots(snapshots, _PANELS)
    star = len(few[0].classes) == len(class_names)  # the mean of every class is known
    drawn = [(each.title, each.star_coordinates if star else each.points) for each in few]
    points = drawn, snapshots[-1].labels, class_names
    cosines = [(each.title, each.cosines) for each in few], None, [class_names[i] for i in few[0].classes]
    frames = [(each.title, each.points) for each in plotting.pick_snapshots(snapshots, _FRAMES)]
    paths = [folder / name for name in ("training_points.png", "training_similarity.png", "training.gif")]
    save(plotting.small_multiples_figure(*points), paths[0])
    save(plotting.small_multiples_figure(*cosines), paths[1])
    plotting.save_animation(frames, paths[2], *points[1:])
    one_map = "One map for all epochs: PCA of the last one."
    axes = (
        "Star coordinates: each class has an axis, and a point is the sum of its cosines with the class means along "
        "the axes. Tight orthogonal classes lie on a circle, a collapsed embedding in the middle."
    )
    return [
        Picture(paths[0], "Embeddings", plotting.describe_sequence(*points), axes if star else one_map),
        Picture(
            paths[1],
            "Cosine between class means",
            plotting.describe_sequence(*cosines),
            f"1 is red, 0 white, -1 blue; {share(len(few[0].classes), len(class_names))} classes.",
        ),
        Picture(paths[2], "Embeddings, animated", plotting.describe_sequence(frames, *points[1:]), one_map),
    ]
