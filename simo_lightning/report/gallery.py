"""Rows of images with their classes: neighbours, confusions, labels that look wrong, near duplicates."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from simo_lightning.functional.retrieval import RetrievalScores
from simo_lightning.report.analysis import (
    ConfusedPair,
    ImagePairs,
    NearDuplicates,
    Neighbors,
    WorstQueries,
    WrongLabels,
    confused_pairs,
    likely_wrong_labels,
    near_duplicates,
    worst_queries,
)
from simo_lightning.report.thumbnails import image_uri

_NEIGHBORS = 5
_ROWS = 12  # of one list


class Shot(NamedTuple):
    """One image with its texts.

    Attributes:
        uri: The image as a data URI.
        alt: Alternative text.
        name: Of its class, in full.
        note: Further text.
        kind: "query", "right", "wrong" or "" without a mark.
    """

    uri: str
    alt: str
    name: str
    note: str
    kind: str


class Strip(NamedTuple):
    """Images side by side under a title.

    Attributes:
        title: Such as the two classes.
        text: One sentence.
        shots: The images.
    """

    title: str
    text: str
    shots: list[Shot]


class Gallery:
    """Makes strips of the images of a split.

    Args:
        images: uint8 ``(M, C, H, W)``, or None: then there are no strips.
        labels: Class of each image, ``(M,)``.
        class_names: C names.
        titles: What an image is called, such as its number in the split, M of them.
    """

    def __init__(
        self, images: Tensor | None, labels: Tensor, class_names: Sequence[str], titles: Sequence[str]
    ) -> None:
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.titles = titles

    def shot(self, index: int, kind: str = "", note: str = "") -> Shot:
        """One image.

        Args:
            index: Of the image.
            kind: As for :class:`Shot`.
            note: Further text.

        Returns:
            The image with its texts.
        """
        if self.images is None:
            raise ValueError("images must be given, got None")
        name = self.class_names[int(self.labels[index])]
        says = {"query": "Query: ", "wrong": "Other class: "}.get(kind, "")
        return Shot(image_uri(self.images[index]), f"{says}{name}, {self.title(index)}", name, note, kind)

    def title(self, index: int) -> str:
        """What an image is called, without the folder of its class."""
        return self.titles[index].removeprefix(f"{self.class_names[int(self.labels[index])]}/")

    def nearest(self, queries: Tensor, neighbors: Neighbors, title: str = "", texts: Sequence[str] = ()) -> list[Strip]:
        """Queries and their nearest images.

        Args:
            queries: Indices ``(Q,)``.
            neighbors: Of all images.
            title: Before the name of the class.
            texts: A sentence for each; default: how many neighbours are of its class.

        Returns:
            One strip per query.
        """
        strips = []
        for place, query in enumerate(queries.tolist()):
            found = neighbors.indices[query, :_NEIGHBORS].tolist()
            cosines = neighbors.cosines[query, :_NEIGHBORS].tolist()
            right = [bool(self.labels[other] == self.labels[query]) for other in found]
            shots = [self.shot(query, "query", self.title(query))]
            for other, cosine, same in zip(found, cosines, right, strict=True):
                shots.append(self.shot(other, "right" if same else "wrong", f"cosine {cosine:.2f}"))
            text = texts[place] if texts else f"{sum(right)} of {len(right)} nearest images share the class"
            strips.append(Strip(f"{title}{self.class_names[int(self.labels[query])]}", f"{text}.", shots))
        return strips

    def confused(self, neighbors: Neighbors, labels: Tensor) -> list[Strip]:
        """The pairs of classes that are mixed up most often."""
        return [self._pair_of_classes(pair) for pair in confused_pairs(neighbors, labels, count=_ROWS, num_images=3)]

    def _pair_of_classes(self, pair: ConfusedPair) -> Strip:
        first, second = (self.class_names[label] for label in pair.classes)
        text = (
            f"{pair.confused} of the {pair.out_of} images of both have an image of the other class as their nearest "
            f"({100 * pair.rate:.0f} %)."
        )
        shots = []
        for query, other in pair.images.tolist():
            shots += [self.shot(query, "query", self.title(query)), self.shot(other, "wrong", "nearest")]
        return Strip(f"{first} and {second}", text, shots)

    def worst(self, neighbors: Neighbors, labels: Tensor, scores: RetrievalScores) -> list[Strip]:
        """The images with the lowest average precision, with their neighbours."""
        found: WorstQueries = worst_queries(neighbors, labels, scores.average_precision, count=_ROWS, most_per_class=1)
        texts = [f"Average precision {value:.2f}" for value in found.average_precision.tolist()]
        return self.nearest(found.images, neighbors, texts=texts)

    def wrong_labels(self, neighbors: Neighbors, labels: Tensor) -> tuple[list[Strip], int]:
        """Images whose neighbours agree on another class, and how many there are."""
        found: WrongLabels = likely_wrong_labels(neighbors, labels)
        texts = [
            f"Perhaps {self.class_names[other]}: {100 * share:.0f} % of the neighbours, {100 * own:.0f} % its label"
            for other, share, own in zip(
                found.suggested.tolist(), found.share.tolist(), found.own_share.tolist(), strict=True
            )
        ]
        return self.nearest(found.images[:_ROWS], neighbors, "Labelled ", texts[:_ROWS]), len(found.images)

    def duplicates(self, embeddings: Tensor, labels: Tensor) -> tuple[list[Strip], int, int]:
        """Pairs of nearly equal images, those of two classes first; and how many there are of two classes, of one."""
        found: NearDuplicates = near_duplicates(embeddings, labels, self.images, max_pairs=_ROWS)
        strips = self._pairs(found.across) + self._pairs(found.within)
        return strips[:_ROWS], found.across.total, found.within.total

    def _pairs(self, pairs: ImagePairs) -> list[Strip]:
        strips = []
        for (first, second), cosine, correlation in zip(
            pairs.images.tolist(), pairs.cosines.tolist(), pairs.correlations.tolist(), strict=True
        ):
            same = bool(self.labels[first] == self.labels[second])
            names = [self.class_names[int(self.labels[index])] for index in (first, second)]
            text = f"Correlation of the pixels {correlation:.2f}, cosine of the embeddings {cosine:.2f}."
            title = names[0] if same else f"{names[0]} and {names[1]}: two labels"
            kind = "" if same else "wrong"
            strips.append(Strip(title, text, [self.shot(each, kind, self.title(each)) for each in (first, second)]))
        return strips
