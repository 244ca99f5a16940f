"""Draws the pictures of the report into files, each with its title, caption and alternative text."""

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
    "tsne": ("t-SNE", "Neighbours stay neighbours; sizes of the groups and distances between them mean little."),
    "umap": ("UMAP", "Neighbours stay neighbours; sizes of the groups and distances between them mean little."),
}
_NEIGHBORS = 5
_MOST_IN_LEGEND = 30  # classes that a map always shows
_PANELS = 6
_ANIMATED = 20  # snapshots of an animation


class EmbeddedImages(NamedTuple):
    """Embeddings of a split.

    Attributes:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        images: uint8 ``(M, C, H, W)``, of the first M embeddings; None where there are none.
    """

    embeddings: Tensor
    labels: Tensor
    images: Tensor | None = None


class Picture(NamedTuple):
    """A picture and its texts.

    Attributes:
        path: PNG or GIF.
        title: Above it.
        alt: Alternative text, for readers who do not see it.
        text: Caption: how to read it.
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
        text: One sentence below it.
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
    """Draw every picture that the data allow.

    Args:
        folder: Must exist; the pictures are written into it.
        data: Of the split.
        moments: Class moments of all its embeddings.
        class_names: C names.
        snapshots: Of training, in order; fewer than two, or those of other classes, are not drawn.
        projections: Maps to the plane.
        queries: Images whose nearest neighbours are shown, or how many, taken from the classes in turn; 0 for none.
        max_points: Points of a map, the classes in proportion; of more than 30 classes every n-th, so that each has ten
            points or more.

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
    """The rows whose embeddings have the largest cosine with those of the queries.

    Args:
        embeddings: ``(N, D)``.
        queries: Rows, ``(Q,)``.
        k: At most N - 1.

    Returns:
        Rows ``(Q, k)``, nearest first, never the query itself.

    Example:
        >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]), torch.tensor([0]), k=2)
        tensor([[2, 1]])
    """
    unit = normalize(embeddings, dim=1)
    cosines = unit[queries] @ unit.mT  # (Q, N)
    cosines[torch.arange(len(queries)), queries] = float("-inf")
    return cosines.topk(k, dim=1).indices


def choose_queries(labels: Tensor, queries: int | Sequence[int]) -> Tensor:
    """Rows whose nearest neighbours are shown.

    Args:
        labels: Of the rows that have images, ``(M,)``.
        queries: Rows, or how many: then the first of each class, the second of each class, and so on.

    Returns:
        Rows ``(Q,)``.

    Raises:
        ValueError: If a row is not in ``0..M - 1``, or the number is negative.

    Example:
        >>> choose_queries(torch.tensor([1, 1, 0, 2]), 3).tolist()
        [2, 0, 3]
    """
    if isinstance(queries, int):
        if queries < 0:
            raise ValueError(f"queries must be a number >= 0 or a list of images, got {queries}")
        seen: Counter[int] = Counter()
        order = []  # (how many of its class come before it, label, row)
        for row, label in enumerate(labels.tolist()):
            order.append((seen[label], label, row))
            seen[label] += 1
        return torch.tensor([row for *_, row in sorted(order)[:queries]], dtype=torch.long)
    if any(not 0 <= query < len(labels) for query in queries):
        raise ValueError(f"queries must be images 0..{len(labels) - 1} of the split, got {list(queries)}")
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
    # of thousands of classes some, ten points each: one point of each class would say nothing about the classes
    shown = every_nth(len(class_names), max(_MOST_IN_LEGEND, max_points // 10))
    rows = (data.labels % shown.step == 0).nonzero().squeeze(1)
    kept = rows[stratified_subset(data.labels[rows], max_points, seed=0)]
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
    rows = torch.cat([chosen.unsqueeze(1), nearest], dim=1)  # (Q, 1 + K)
    path = folder / "neighbors.png"
    plotting.neighbors_figure(data.images[rows], data.labels[rows], class_names).savefig(path)
    text = (
        f"Searched in the first {count:,} images of the split. Queries, from 0: {', '.join(map(str, chosen.tolist()))}."
    )
    return [Picture(path, "Nearest images", plotting.describe_neighbors(data.labels[rows], class_names), text)]


def _draw_training(folder: Path, snapshots: Sequence[Snapshot], class_names: Sequence[str]) -> list[Picture]:
    if len(snapshots) < 2 or any(len(each.counts) != len(class_names) for each in snapshots):
        return []
    few = plotting.pick_snapshots(snapshots, _PANELS)
    star = len(few[0].classes) == len(class_names)  # the mean of every class is known
    drawn = [(each.title, each.star_coordinates if star else each.points) for each in few]
    points = drawn, snapshots[-1].labels, class_names
    cosines = [(each.title, each.cosines) for each in few], None, [class_names[i] for i in few[0].classes]
    moving = [(each.title, each.points) for each in plotting.pick_snapshots(snapshots, _ANIMATED)]
    paths = [folder / name for name in ("training_points.png", "training_similarity.png", "training.gif")]
    plotting.small_multiples_figure(*points).savefig(paths[0])
    plotting.small_multiples_figure(*cosines).savefig(paths[1])
    plotting.save_animation(moving, paths[2], *points[1:])
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
        Picture(paths[2], "Embeddings, animated", plotting.describe_sequence(moving, *points[1:]), one_map),
    ]
