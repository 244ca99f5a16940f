"""Draws the pictures of the report into files, each with its words."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from simo_lightning.data.sources import stratified_subset
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.plotting import (
    Frame,
    Projection,
    class_similarity_figure,
    describe_neighbors,
    describe_norms,
    describe_scatter,
    describe_similarity,
    describe_spectrum,
    describe_strip,
    neighbors_figure,
    norms_figure,
    pick_frames,
    project_2d,
    save_animation,
    scatter_figure,
    spectrum_figure,
    strip_figure,
)

_PROJECTIONS = {
    "pca": ("PCA", "The shadow of the embeddings on the two directions of largest variance."),
    "tsne": ("t-SNE", "Neighbours stay neighbours; sizes of and distances between the groups mean little."),
    "umap": ("UMAP", "Neighbours stay neighbours; sizes of and distances between the groups mean little."),
}
_NEIGHBORS = 5
_STRIP_FRAMES = 6
_MOVING_FRAMES = 20


class EmbeddedImages(NamedTuple):
    """What an encoder made of a split.

    Attributes:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        images: uint8 ``(M, C, H, W)``, of the first M rows; None where there are none.
    """

    embeddings: Tensor
    labels: Tensor
    images: Tensor | None = None


class Picture(NamedTuple):
    """A picture and its words.

    Attributes:
        path: PNG or GIF.
        title: Above it.
        alt: Says what it shows to who does not see it.
        text: Below it: how to read it.
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
    frames: Sequence[Frame] = (),
    projections: Sequence[Projection] = ("pca", "tsne"),
    queries: int | Sequence[int] = 8,
    max_points: int = 2000,
) -> list[Section]:
    """Draw every picture that the data allow.

    Args:
        folder: Exists; the pictures are written into it.
        data: Of the split.
        moments: Of all its embeddings.
        class_names: C names.
        frames: Of training, in order; fewer than two, or of other classes, and there is nothing to show of it.
        projections: Maps of the plane.
        queries: Rows whose nearest neighbours are shown, or how many, taken from the classes in turn; 0 for none.
        max_points: Points of a map, the classes in proportion.

    Returns:
        The sections that have pictures.

    Raises:
        ValueError: If a query is no row with an image, or the embeddings are not finite.
    """
    chosen = torch.zeros(0, dtype=torch.long)
    if data.images is not None and len(data.images) > 1:
        chosen = choose_queries(data.labels[: len(data.images)], queries)
    sections = [
        Section("Classes", "Which classes share a direction, and how long their embeddings are.", []),
        Section("Maps", "The embeddings in the plane; a class has the same colour everywhere.", []),
        Section("Dimensions", "How many directions are in use.", []),
        Section(
            "Nearest neighbours", "An image, left, and those whose embeddings have the largest cosine with it.", []
        ),
        Section("Along training", "The same images in the epochs of training.", []),
    ]
    classes, maps, dimensions, neighbors, training = (section.pictures for section in sections)
    classes += _draw_classes(folder, moments, class_names)
    maps += _draw_maps(folder, data, class_names, projections, max_points)
    dimensions += _draw_spectrum(folder, moments, class_names)
    if len(frames) > 1 and all(len(frame.counts) == len(class_names) for frame in frames):
        training += _draw_training(folder, frames, class_names)
    if data.images is not None and len(chosen):
        neighbors += _draw_neighbors(folder, data.embeddings, data.labels, data.images, chosen, class_names)
    return [section for section in sections if section.pictures]


def nearest_neighbors(embeddings: Tensor, queries: Tensor, k: int) -> Tensor:
    """The rows whose embeddings have the largest cosine with those of others.

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
    """Rows to ask for.

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
        one_hot = labels.unsqueeze(1) == labels.unique()  # (M, P)
        place = one_hot.cumsum(dim=0)[one_hot] - 1  # how many of its class come before a row, (M,)
        order = sorted(range(len(labels)), key=lambda row: (int(place[row]), int(labels[row])))
        return torch.tensor(order[:queries], dtype=torch.long)
    if any(not 0 <= query < len(labels) for query in queries):
        raise ValueError(f"queries must be images 0..{len(labels) - 1} of the split, got {list(queries)}")
    return torch.tensor(list(queries), dtype=torch.long)


def _draw_classes(folder: Path, moments: ClassMoments, class_names: Sequence[str]) -> list[Picture]:
    similarity = _save(class_similarity_figure(moments, class_names), folder / "similarity.png")
    norms = _save(norms_figure(moments, class_names), folder / "norms.png")
    return [
        Picture(
            similarity,
            "Cosine between class means",
            describe_similarity(moments, class_names),
            "Off the diagonal 0 is best: such classes are orthogonal. Near 1 two classes share a direction; where all "
            "do, the embedding has collapsed.",
        ),
        Picture(
            norms,
            "Norm and spread of each class",
            describe_norms(moments, class_names),
            "A class whose spread is as large as its norm is no direction but a cloud.",
        ),
    ]


def _draw_maps(
    folder: Path, data: EmbeddedImages, class_names: Sequence[str], projections: Sequence[Projection], max_points: int
) -> list[Picture]:
    kept = stratified_subset(data.labels, max_points, seed=0)
    embeddings, labels = data.embeddings[kept], data.labels[kept]
    pictures = []
    for projection in projections:
        name, text = _PROJECTIONS[projection]
        points = project_2d(embeddings, projection)
        title = f"{name} of {len(kept)} of {len(data.labels)} embeddings"
        path = _save(scatter_figure(points, labels, class_names, title), folder / f"{projection}.png")
        pictures.append(Picture(path, name, describe_scatter(points, labels, class_names, title), text))
    return pictures


def _draw_spectrum(folder: Path, moments: ClassMoments, class_names: Sequence[str]) -> list[Picture]:
    path = _save(spectrum_figure(moments, class_names), folder / "spectrum.png")
    text = "As many large values as classes is what orthogonal classes need; one or two large values are a collapse."
    return [Picture(path, "Singular values", describe_spectrum(moments, class_names), text)]


def _draw_training(folder: Path, frames: Sequence[Frame], class_names: Sequence[str]) -> list[Picture]:
    few, many, labels = pick_frames(frames, _STRIP_FRAMES), pick_frames(frames, _MOVING_FRAMES), frames[-1].labels
    cosines = [(frame.title, frame.cosines) for frame in few]
    points = [(frame.title, frame.points) for frame in few]
    moving = [(frame.title, frame.points) for frame in many]
    one_map = "One map for all epochs: PCA of the last one."
    return [
        Picture(
            _save(strip_figure(points, labels, class_names, "points"), folder / "training_points.png"),
            "Embeddings",
            describe_strip(points, labels, class_names, "points"),
            one_map,
        ),
        Picture(
            _save(strip_figure(cosines, None, class_names, "similarity"), folder / "training_similarity.png"),
            "Cosine between class means",
            describe_strip(cosines, None, class_names, "similarity"),
            "Red is 1, white 0, blue -1.",
        ),
        Picture(
            Path(save_animation(moving, folder / "training.gif", labels, class_names)),
            "Embeddings, moving",
            describe_strip(moving, labels, class_names, "points"),
            one_map,
        ),
    ]


def _draw_neighbors(
    folder: Path, embeddings: Tensor, labels: Tensor, images: Tensor, chosen: Tensor, class_names: Sequence[str]
) -> list[Picture]:
    count = len(images)
    nearest = nearest_neighbors(embeddings[:count], chosen, min(_NEIGHBORS, count - 1))
    rows = torch.cat([chosen.unsqueeze(1), nearest], dim=1)  # (Q, 1 + K)
    path = _save(neighbors_figure(images[rows], labels[rows], class_names), folder / "neighbors.png")
    asked = ", ".join(map(str, chosen.tolist()))
    text = f"Among the first {count:,} images of the split, counted from 0; asked for: {asked}."
    return [Picture(path, "Nearest images", describe_neighbors(labels[rows], class_names), text)]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
