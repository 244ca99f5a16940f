"""What the report contains, from the embeddings of a split: texts, pictures, rows of images, and the map's data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simo_lightning import plotting
from simo_lightning.data.sources import stratified_subset
from simo_lightning.functional.moments import ClassMoments
from simo_lightning.functional.retrieval import RetrievalScores, retrieval_scores
from simo_lightning.plotting import Curve, Projection, Snapshot
from simo_lightning.plotting.canvas import every_nth, printable, share
from simo_lightning.plotting.scatter import square_around
from simo_lightning.report.analysis import (
    ClassScores,
    Headline,
    Neighbors,
    cluster_order,
    find_neighbors,
    headline,
    knn_leave_one_out,
    scores_per_class,
    worst_pairs,
)
from simo_lightning.report.gallery import Gallery, Strip
from simo_lightning.report.interactive import has_bokeh, map_document, matrix_document
from simo_lightning.report.pictures import (
    PROJECTIONS,
    EmbeddedImages,
    Picture,
    choose_queries,
    draw_curves,
    draw_maps,
    draw_norms,
    draw_shares,
    draw_similarity,
    draw_spectrum,
    draw_training,
)
from simo_lightning.report.rows import MetricGroup, MetricRow, metric_groups
from simo_lightning.report.thumbnails import Sprite, make_sprite

_MOST_COMPARED = 20_000  # images that are compared with each other
_MOST_SHARES = 2**25  # orthogonal shares, one for each image and class: 256 MiB in float64
_MAX_LEGEND = 30  # classes that a map always shows, each with its own switch
_WORST_PAIRS = 20
_MOST_IN_MATRIX = 1000  # classes of the matrix: it has a byte for each pair, and clustering compares all of them
_MOST_UNORDERED = 10  # classes that keep the order of the data


@dataclass
class Table:
    """A table of texts.

    Attributes:
        head: Names of the columns.
        rows: Texts; the first column names the row.
        shares: For each row the length of a bar behind the second column, in [0, 1]; empty: no bars.
        notes: For each row a text below its name; empty: none.
    """

    head: list[str]
    rows: list[list[str]]
    shares: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """Contents under one heading.

    Attributes:
        title: Heading.
        text: One sentence below the heading.
        pictures: Static pictures.
        strips: Rows of images.
        table: A table; the first rows are shown, the others on demand.
        groups: Metrics.
        interactive: "map" or "matrix": where the page shows the interactive one of them in place of the pictures.
    """

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    table: Table | None = None
    groups: list[MetricGroup] = field(default_factory=list)
    interactive: str | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.pictures or self.strips or self.table or self.groups)


@dataclass
class Contents:
    """All of a page.

    Attributes:
        headline: The numbers at the top.
        sections: In order.
        map_points: Points of the map by projection, ``(M, 2)`` each.
        map_index: Which embeddings these are, ``(M,)``.
        order: Of the classes in the matrix of cosines: those with images, of more than 1,000 every n-th.
        data: For page.js; empty without Bokeh.
        sprite: The images of the map's points; None without images or without Bokeh.
    """

    headline: list[Headline] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    map_points: dict[Projection, Tensor] = field(default_factory=dict)
    map_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    data: dict[str, Any] = field(default_factory=dict)
    sprite: Sprite | None = None


def make_contents(
    folder: Path,
    data: EmbeddedImages,
    moments: ClassMoments,
    class_names: Sequence[str],
    rows: list[MetricRow],
    snapshots: Sequence[Snapshot] = (),
    projections: Sequence[Projection] = ("pca", "tsne"),
    queries: int | Sequence[int] = 8,
    max_points: int = 2000,
    curves: Mapping[str, Curve] | None = None,
    files: Sequence[str] | None = None,
    training_means: Tensor | None = None,
    not_computed: str = "",
) -> Contents:
    """Analyse the embeddings and draw all pictures.

    Args:
        folder: Must exist; the pictures are written into it.
        data: Of the split.
        moments: Class moments of all embeddings.
        class_names: C names.
        rows: The metrics.
        snapshots: Of training, in order. They are not drawn if there are fewer than two or their classes differ.
        projections: Maps to the plane.
        queries: Indices of images whose nearest neighbours are shown, or their number, spread over the classes; 0 for
            none.
        max_points: Points of a map, stratified by class. Of more than 30 classes every n-th is shown, so that each
            has at least ten points.
        curves: What the run logged in training.
        files: Name of each image of the split; None: an image is called by its number.
        training_means: Class means of the training images ``(C, D)``, for the orthogonal shares; None: those of the
            split.
        not_computed: Which metrics have no row, and why.

    Returns:
        The contents.

    Raises:
        ValueError: If a query has no image, or the embeddings are not finite.
    """
    chosen = _chosen_queries(data, queries)  # before anything is drawn
    compared = _Compared(data, class_names, files)
    present = (moments.counts > 0).nonzero().squeeze(1)
    contents = Contents(order=present[list(every_nth(len(present), _MOST_IN_MATRIX))])
    if len(class_names) > _MOST_UNORDERED:
        contents.order = contents.order[cluster_order(plotting.class_cosines(moments.means[contents.order]))]
    values = {row.name: row.value for row in rows}
    contents.headline = headline(
        compared.embeddings,
        compared.labels,
        class_names,
        values.get("map_at_r", compared.mean("average_precision")),
        values.get("recall_at_1", compared.mean("recall_at_1")),
        values["knn"] if "knn" in values else float("nan"),
    )
    similarity = draw_similarity(folder, moments.means, class_names, contents.order)
    contents.map_index = _map_index(data, class_names, max_points)
    points = {each: plotting.project_2d(data.embeddings[contents.map_index], each) for each in projections}
    contents.map_points = points
    map_labels = data.labels[contents.map_index]
    maps = draw_maps(folder, points, map_labels, class_names, len(data.labels)) if points else []
    contents.sections = [
        Section(
            "Similarity of the classes",
            "Which classes share a direction."
            + (" Similar classes are neighbours." if len(class_names) > _MOST_UNORDERED else "")
            + (f" {share(len(contents.order), len(present))} classes." if len(contents.order) < len(present) else ""),
            [similarity],
            table=_pairs_table(moments.means, class_names),
            interactive="matrix",
        ),
        Section("Map", "The embeddings in the plane; a class has the same colour everywhere.", maps, interactive="map"),
        Section(
            "Metrics",
            "Over all images of the split. A value may be undefined, for example with one class."
            + (f" {not_computed[0].upper()}{not_computed[1:]}." if not_computed else ""),
            groups=metric_groups(rows),
        ),
        *compared.sections(chosen),
        _shares(folder, compared, class_names, moments.means, training_means),
        Section("Use of dimensions", "How many directions are in use.", [draw_spectrum(folder, moments)]),
        Section("Norms", "How long the embeddings of each class are.", [draw_norms(folder, moments, class_names)]),
        Section("Training curves", "What the run logged.", draw_curves(folder, curves or {})),
        Section(
            "Along training",
            "The same images in the epochs of training.",
            draw_training(folder, snapshots, class_names),
        ),
    ]
    contents.sections = [section for section in contents.sections if not section.empty]
    if has_bokeh():
        _add_interactive(contents, data, moments, class_names, maps, similarity, files)
    return contents


class _Compared:
    """The images that are compared with each other: those that have pictures, or without any up to 20,000."""

    def __init__(self, data: EmbeddedImages, class_names: Sequence[str], files: Sequence[str] | None) -> None:
        if data.images is not None and len(data.images) > 1:
            self.index = data.pictured
            self.images: Tensor | None = data.images
        else:
            self.index = torch.tensor(list(every_nth(len(data.labels), _MOST_COMPARED)))
            self.images = None
        self.total = len(data.labels)
        self.embeddings, self.labels = data.embeddings[self.index], data.labels[self.index]
        self.class_names = class_names
        titles = [_title(index, files) for index in self.index.tolist()]
        self.gallery = Gallery(self.images, self.labels, class_names, titles)
        self.neighbors: Neighbors | None = None
        self.scores: RetrievalScores | None = None
        if len(self.labels) > 1:
            self.neighbors = find_neighbors(self.embeddings)
            self.scores = retrieval_scores(self.embeddings, self.labels, ks=(1,))

    def mean(self, name: str) -> float:
        """Mean of a score over the images."""
        if self.scores is None:
            return float("nan")
        values = self.scores.recall[:, 0] if name == "recall_at_1" else self.scores.average_precision
        return float(values.nanmean())

    def sections(self, chosen: Tensor) -> list[Section]:
        """What the comparison shows, with the neighbours of the chosen queries."""
        if self.neighbors is None or self.scores is None:
            return []
        among = f"Compared are {share(len(self.labels), self.total)} images."
        found = [
            Section(
                "Recall of each class",
                "How often the nearest image is of the same class, the worst classes first, and what the vote of the "
                f"nearest images takes their images for instead. {among}",
                table=self._recall_table(self.scores),
            )
        ]
        if self.images is None:
            return found
        wrong, suspects = self.gallery.wrong_labels(self.neighbors, self.labels)
        copies, across, within = self.gallery.duplicates(self.embeddings, self.labels)
        found += [
            Section(
                "Most confused classes",
                "Pairs of classes whose images have each other as nearest image most often.",
                strips=self.gallery.confused(self.neighbors, self.labels),
            ),
            Section(
                "Worst queries",
                "Images whose nearest images are of other classes, one of each class.",
                strips=self.gallery.worst(self.neighbors, self.labels, self.scores),
            ),
            Section(
                "Likely wrong labels",
                f"{_images(suspects)} whose neighbours agree on another class, the most suspicious first: a wrong "
                "label, or an image that the model confuses.",
                strips=wrong,
            ),
            Section(
                "Near duplicates",
                f"Nearly the same pixels and embedding: {_pairs(across)} with two different labels, {_pairs(within)} "
                "with the same label.",
                strips=copies,
            ),
        ]
        if len(chosen):
            numbers = ", ".join(map(str, self.index[chosen].tolist()))
            found.append(
                Section(
                    "Nearest neighbours",
                    "A query image, left, and the images whose embeddings have the largest cosine with it. "
                    f"Queries, from 0: {numbers}.",
                    strips=self.gallery.nearest(chosen, self.neighbors),
                )
            )
        return found

    def _recall_table(self, scores: RetrievalScores) -> Table:
        predicted = knn_leave_one_out(self.neighbors, self.labels, len(self.class_names))  # type: ignore[arg-type]
        found: ClassScores = scores_per_class(self.labels, predicted, scores, len(self.class_names))
        present = found.images.nonzero().squeeze(1)
        order = present[found.recall_at_1[present].nan_to_num(nan=2).argsort(stable=True)]
        rows, notes = [], []
        for label in order.tolist():
            other, count = int(found.confused_with[label]), int(found.confused[label])
            notes.append(f"most often taken for {self.class_names[other]} ({count})" if other >= 0 else "")
            scored = (float(found.recall_at_1[label]), float(found.map_at_r[label]))
            rows.append([self.class_names[label], *map(_number, scored), str(int(found.images[label]))])
        bars = found.recall_at_1[order].nan_to_num(nan=0).tolist()
        return Table(["Class", "Recall@1", "MAP@R", "Images"], rows, bars, notes)


def _shares(
    folder: Path, compared: _Compared, class_names: Sequence[str], means: Tensor, training_means: Tensor | None
) -> Section:
    of = "training images" if training_means is not None else "split's own images"
    text = (
        "The energy of an embedding is split into one share for each class direction, made orthogonal, and a rest. The "
        f"directions are the class means of the {of}."
    )
    used = means if training_means is None else training_means
    kept = list(every_nth(len(compared.labels), max(1, _MOST_SHARES // len(class_names))))
    if len(kept) < len(compared.labels):
        text += f" {share(len(kept), len(compared.labels))} images."
    pictures = draw_shares(folder, compared.embeddings[kept], compared.labels[kept], class_names, used)
    return Section("Orthogonal shares", text, pictures)


def _chosen_queries(data: EmbeddedImages, queries: int | Sequence[int]) -> Tensor:
    """Positions of the queries among the images."""
    if data.images is None or len(data.images) < 2:
        return torch.zeros(0, dtype=torch.long)
    if isinstance(queries, int) or len(data.pictured) == len(data.labels):
        return choose_queries(data.labels[data.pictured], queries)
    wanted = choose_queries(data.labels, queries)
    missing = ~torch.isin(wanted, data.pictured)
    if missing.any():
        raise ValueError(
            f"queries must be indices of images that the report keeps, every {int(data.pictured[1])}th of a large "
            f"split, got {wanted[missing].tolist()}"
        )
    return torch.searchsorted(data.pictured, wanted)


def _map_index(data: EmbeddedImages, class_names: Sequence[str], max_points: int) -> Tensor:
    # of thousands of classes only some, with ten points each: single points would not show how a class spreads
    shown = every_nth(len(class_names), max(_MAX_LEGEND, max_points // 10))
    indices = (data.labels % shown.step == 0).nonzero().squeeze(1)
    return indices[stratified_subset(data.labels[indices], max_points, seed=0)]


def _pairs_table(means: Tensor, class_names: Sequence[str]) -> Table | None:
    pairs = worst_pairs(means.double(), count=_WORST_PAIRS)
    rows = [
        [f"{class_names[first]} and {class_names[second]}", f"{cosine:.3f}"]
        for (first, second), cosine in zip(pairs.classes.tolist(), pairs.cosines.tolist(), strict=True)
    ]
    return Table(["Pairs furthest from orthogonal", "Cosine"], rows, pairs.cosines.abs().tolist()) if rows else None


def _add_interactive(
    contents: Contents,
    data: EmbeddedImages,
    moments: ClassMoments,
    class_names: Sequence[str],
    maps: list[Picture],
    similarity: Picture,
    files: Sequence[str] | None,
) -> None:
    names = [printable(name) for name in class_names]
    contents.data = {
        "names": names,
        "matrix": {
            "document": matrix_document(moments.means, class_names, contents.order),
            "order": contents.order.tolist(),
            "alt": similarity.alt,
        },
    }
    if not contents.map_points:
        return
    index = contents.map_index
    labels = data.labels[index]
    contents.data["map"] = {
        "document": map_document(contents.map_points, labels, len(class_names)),
        "projections": [
            {
                "name": name,
                "title": PROJECTIONS[name][0],
                "text": PROJECTIONS[name][1],
                "limits": square_around(points).tolist(),
                "alt": picture.alt,
            }
            for (name, points), picture in zip(contents.map_points.items(), maps, strict=True)
        ],
        "titles": [printable(_title(each, files)) for each in index.tolist()],
        "classes": [
            {"label": label, "color": color, "count": count}
            for label, color, count in _present(labels, plotting.class_colors(len(class_names)))
        ],
        "switches": len(labels.unique()) <= _MAX_LEGEND,
    }
    if data.images is not None and len(data.images):
        place = torch.full((len(data.labels),), -1)
        place[data.pictured] = torch.arange(len(data.images))
        place = place[index]  # (M,)
        if (place >= 0).any():
            kept = place[place >= 0]
            contents.sprite = make_sprite(data.images[kept])
            cells = torch.full_like(place, -1)
            cells[place >= 0] = torch.arange(len(kept))
            contents.data["map"]["cells"] = cells.tolist()
            contents.data["map"]["sprite"] = contents.sprite._asdict() | {"uri": ""}


def _present(labels: Tensor, colors: Sequence[str]) -> list[tuple[int, str, int]]:
    found, counts = labels.unique(return_counts=True)
    return [(label, colors[label], count) for label, count in zip(found.tolist(), counts.tolist(), strict=True)]


def _title(index: int, files: Sequence[str] | None) -> str:
    return f"image {index}" if files is None else files[index]


def _number(value: float) -> str:
    return "undefined" if value != value else f"{value:.2f}"


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _pairs(count: int) -> str:
    return f"{count:,} pair{'s' * (count != 1)}"
