"""The pictures of the report, each with title, caption and alternative text."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from simo_lightning import plotting
from simo_lightning.data.sources import stratified_subset
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import Projection, Snapshot
from simo_lightning.plotting.canvas import every_nth, share

_PROJECTIONS = {
    "pca": ("PCA", "Projection on the two directions of largest variance."),
    "tsne": ("t-SNE", "Keeps neighbours together; sizes of clusters and distances between them mean little."),
    "umap": ("UMAP", "Keeps neighbours together; sizes of clusters and distances between them mean little."),
}
_NEIGHBORS = 5
_MAX_LEGEND = 30  # classes that a map always shows
_PANELS = 6
_FRAMES = 20  # snapshots of the animation


class EmbeddedImages(NamedTuple):
    """Embeddings of a split.

    Attributes:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        images: uint8 ``(M, C, H, W)`` of the first M embeddings, or None.
    """

    embeddings: Tensor
    labels: Tensor
    images: Tensor | None = None


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


class Section(NamedTuple):
    """Pictures under one heading.

    Attributes:
        title: Heading.
        text: One sentence below the heading.
        pictures: One or more.
    """

    title: str
    text: str
    pictures: list[Picture]


def draw_sections(
    folder: Path,
    data: EmbeddedImages,
    moments: ClassMoments,
    class_names: Sequence[str],
    snapshots: Sequence[Snapshot] = (),
    projections: Sequence[Projection] = ("pca", "tsne"),
    queries: int | Sequence[int] = 8,
    max_points: int = 2000,
) -> list[Section]:
    """Draw all pictures that the data allow.

    Args:
        folder: Must exist; the pictures are written into it.
        data: Of the split.
        moments: Class moments of all embeddings.
        class_names: C names.
        snapshots: Of training, in order. They are not drawn if there are fewer than two or their classes differ.
        projections: Maps to the plane.
        queries: Indices of images whose nearest neighbours are shown, or their number, taken from the classes in turn;
            0 for none.
        max_points: Points of a map, stratified by class. Of more than 30 classes every n-th is shown, so that each
            has at least ten points.

    Returns:
        The sections that have pictures.

    Raises:
        ValueError: If a query has no image, or the embeddings are not finite.
    """
    chosen = torch.zeros(0, dtype=torch.long)
    if data.images is not None and len(data.images) > 1:  # before anything is drawn
        chosen = choose_queries(data.labels[: len(data.images)], queries)
    sections = [
        Section(
            "Classes",
            "Which classes share a direction, and how long their embeddings are.",
            _draw_classes(folder, moments, class_names),
        ),
        Section(
            "Maps",
            "The embeddings in the plane; a class has the same colour everywhere.",
            _draw_maps(folder, data, class_names, projections, max_points),
        ),
        Section("Dimensions", "How many directions are in use.", _draw_spectrum(folder, moments)),
        Section(
            "Nearest neighbours",
            "A query image, left, and the images whose embeddings have the largest cosine with it.",
            _draw_neighbors(folder, data, chosen, class_names),
        ),
        Section(
            "Along training",
            "The same images in the epochs of training.",
            _draw_training(folder, snapshots, class_names),
        ),
    ]
    return [section for section in sections if section.pictures]


def nearest_neighbors(embeddings: Tensor, queries: Tensor, k: int) -> Tensor:
    """Indices of the embeddings with the largest cosine with the queries.

    Args:
        embeddings: ``(N, D)``.
        queries: Indices, ``(Q,)``.
        k: At most N - 1.

    Returns:
        Indices ``(Q, k)``, nearest first, without the query itself.

    Example:
        >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]), torch.tensor([0]), k=2)
        tensor([[2, 1]])
    """
    unit = normalize(embeddings, dim=1)
    cosines = unit[queries] @ unit.mT  # (Q, N)
    cosines[torch.arange(len(queries)), queries] = float("-inf")
    return cosines.topk(k, dim=1).indices


def choose_queries(labels: Tensor, queries: int | Sequence[int]) -> Tensor:
    """Indices of the images whose nearest neighbours are shown.

    Args:
        labels: Of the embeddings that have images, ``(M,)``.
        queries: Indices, or their number: then the first image of each class, the second of each class, and so on.

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
        seen: Counter[int] = Counter()
        order = []  # (images of its class before it, label, index)
        for index, label in enumerate(labels.tolist()):
            order.append((seen[label], label, index))
            seen[label] += 1
        return torch.tensor([index for *_, index in sorted(order)[:queries]], dtype=torch.long)
    if any(not 0 <= query < len(labels) for query in queries):
        raise ValueError(f"queries must be indices 0..{len(labels) - 1} of images of the split, got {list(queries)}")
    return torch.tensor(list(queries), dtype=torch.long)


def _draw_classes(folder: Path, moments: ClassMoments, class_names: Sequence[str]) -> list[Picture]:
    similarity, norms = folder / "similarity.png", folder / "norms.png"
    plotting.class_similarity_figure(moments, class_names).savefig(similarity)
    plotting.norms_figure(moments, class_names).savefig(norms)
    return [
        Picture(
            similarity,
            "Cosine between class means",
            plotting.describe_similarity(moments, class_names),
            "Off the diagonal 0 is best: such classes are orthogonal. Near 1 two classes share a direction; where all "
            "do, the embedding has collapsed.",
        ),
        Picture(
            norms,
            "Norm and spread of each class",
            plotting.describe_norms(moments, class_names),
            "A class whose spread is as large as its norm has no clear direction.",
        ),
    ]


def _draw_maps(
    folder: Path, data: EmbeddedImages, class_names: Sequence[str], projections: Sequence[Projection], max_points: int
) -> list[Picture]:
    # of thousands of classes only some, with ten points each: single points would not show how a class spreads
    shown = every_nth(len(class_names), max(_MAX_LEGEND, max_points // 10))
    indices = (data.labels % shown.step == 0).nonzero().squeeze(1)
    kept = indices[stratified_subset(data.labels[indices], max_points, seed=0)]
    embeddings, labels = data.embeddings[kept], data.labels[kept]
    note = "" if len(shown) == len(class_names) else f"\n{share(len(shown), len(class_names))} classes"
    pictures = []
    for projection in projections:
        name, text = _PROJECTIONS[projection]
        path = folder / f"{projection}.png"
        points = plotting.project_2d(embeddings, projection)
        title = f"{name} of {len(kept):,} of {len(data.labels):,} embeddings{note}"
        plotting.scatter_figure(points, labels, class_names, title).savefig(path)
        alt = plotting.describe_scatter(points, labels, class_names, title)
        pictures.append(Picture(path, name, alt, text))
    return pictures


def _draw_spectrum(folder: Path, moments: ClassMoments) -> list[Picture]:
    path = folder / "spectrum.png"
    plotting.spectrum_figure(moments).savefig(path)
    text = "Orthogonal classes need as many large values as there are classes; one or two large values show a collapse."
    return [Picture(path, "Singular values", plotting.describe_spectrum(moments), text)]


def _draw_neighbors(folder: Path, data: EmbeddedImages, chosen: Tensor, class_names: Sequence[str]) -> list[Picture]:
    if data.images is None or len(chosen) == 0:
        return []
    count = len(data.images)
    nearest = nearest_neighbors(data.embeddings[:count], chosen, min(_NEIGHBORS, count - 1))
    indices = torch.cat([chosen.unsqueeze(1), nearest], dim=1)  # (Q, 1 + K)
    path = folder / "neighbors.png"
    plotting.neighbors_figure(data.images[indices], data.labels[indices], class_names).savefig(path)
    text = (
        f"Searched in the first {count:,} images of the split. Queries, from 0: {', '.join(map(str, chosen.tolist()))}."
    )
    return [Picture(path, "Nearest images", plotting.describe_neighbors(data.labels[indices], class_names), text)]


def _draw_training(folder: Path, snapshots: Sequence[Snapshot], class_names: Sequence[str]) -> list[Picture]:
    if len(snapshots) < 2 or any(len(each.counts) != len(class_names) for each in snapshots):
        return []
    few = plotting.pick_snapshots(snapshots, _PANELS)
    star = len(few[0].classes) == len(class_names)  # the mean of every class is known
    drawn = [(each.title, each.star_coordinates if star else each.points) for each in few]
    points = drawn, snapshots[-1].labels, class_names
    cosines = [(each.title, each.cosines) for each in few], None, [class_names[i] for i in few[0].classes]
    frames = [(each.title, each.points) for each in plotting.pick_snapshots(snapshots, _FRAMES)]
    paths = [folder / name for name in ("training_points.png", "training_similarity.png", "training.gif")]
    plotting.small_multiples_figure(*points).savefig(paths[0])
    plotting.small_multiples_figure(*cosines).savefig(paths[1])
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
