"""Everything that explains the embedding of one image."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simo_lightning.checkpoints import TrainingClasses
from simo_lightning.embed_files import find_images
from simo_lightning.embedder import Embedder, Picture
from simo_lightning.embeddings_file import open_embeddings
from simo_lightning.explain.attribution import Attribution, attribution, last_feature_map
from simo_lightning.functional.decomposition import OrthogonalBasis, OrthogonalShares, orthogonal_basis
from simo_lightning.search import NearestNeighbors
from simo_lightning.search.images import find_checkpoint


class View(NamedTuple):
    """One image and what its similarity to a direction comes from.

    Attributes:
        name: Of the image.
        pixels: uint8 ``(C, H, W)``, as the model sees it.
        embedding: float32 ``(D,)``.
        shares: Orthogonal shares ``(C,)`` and rest, a scalar; None if the class means are not known.
        target: Name of the direction, a class or the other image.
        integrated_gradients: Of the cosine with the direction, of this image alone.
        grad_cam: The same; None for an encoder that is not convolutional.
    """

    name: str
    pixels: Tensor
    embedding: Tensor
    shares: OrthogonalShares | None
    target: str
    integrated_gradients: Attribution
    grad_cam: Attribution | None

    @property
    def cosine(self) -> float:
        """Cosine of the embedding with the direction."""
        return float(self.integrated_gradients.cosines)


class Neighbor(NamedTuple):
    """An image of the gallery.

    Attributes:
        path: Its file.
        cosine: With the image that is explained.
    """

    path: str
    cosine: float


@dataclass(frozen=True)
class Explanation:
    """Why an image is similar to a class or to another image.

    Attributes:
        views: Of the image; and with ``against`` of the other image, whose direction is the first one's embedding.
        classes: Names and means of the classes; None if the checkpoint has none.
        basis: Orthonormal directions of the classes; None without class means.
        nearest: The five classes with the largest cosines, and the cosines.
        neighbors: Nearest images of the gallery; empty without one.
    """

    views: list[View]
    classes: TrainingClasses | None = None
    basis: OrthogonalBasis | None = None
    nearest: list[tuple[str, float]] = field(default_factory=list)
    neighbors: list[Neighbor] = field(default_factory=list)


def explain(
    embedder: Embedder,
    image: Picture,
    against: Picture | None = None,
    class_name: str | None = None,
    gallery: str | Path | None = None,
    checkpoint: str | Path | None = None,
    k: int = 5,
    steps: int = 64,
) -> Explanation:
    """Explain the embedding of one image.

    Args:
        embedder: Of the model.
        image: A file or a PIL image.
        against: Another image, to whose embedding the similarity is explained.
        class_name: The class to whose mean the similarity is explained. Without it and ``against`` that with the
            largest cosine.
        gallery: Where nearest images are looked for: a file that ``simo embed`` wrote, or a folder of images.
        checkpoint: File that ``embedder`` was loaded from, which a gallery's file is checked against; None: not
            checked.
        k: Nearest images, at most.
        steps: As in :func:`attribution`.

    Returns:
        Shares, nearest classes and images, and the attributions.

    Raises:
        FileNotFoundError: If the gallery is missing.
        ModuleNotFoundError: If captum, of the extra ``explain``, is missing.
        OSError: If an image cannot be read.
        ValueError: If both ``against`` and ``class_name`` are given; if the class or the class means are not known; or
            if the gallery has no paths, or was made by another checkpoint.
    """
    if against is not None and class_name is not None:
        raise ValueError(f"only one of against and class_name can be given, got {against!s:.80} and {class_name!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    pixels = [_read(embedder, picture) for picture in ([image] if against is None else [image, against])]
    embeddings = [embedder.embed(each.unsqueeze(0)).clone().squeeze(0).cpu() for each in pixels]
    classes = embedder.classes if embedder.classes is not None and embedder.classes.means is not None else None
    cosines = None if classes is None else embedder.scores(embeddings[0].unsqueeze(0)).squeeze(0)
    nearest: list[tuple[str, float]] = []
    if classes is not None and cosines is not None:
        order = cosines.argsort(descending=True, stable=True).tolist()[:5]
        nearest = [(classes.names[index], float(cosines[index])) for index in order if cosines[index] > -torch.inf]
    if against is None:
        directions = [_class_mean(classes, class_name, cosines)]
    else:
        names = [_name(image), _name(against)]
        directions = [(names[1], embeddings[1]), (names[0], embeddings[0])]
    neighbors = [] if gallery is None else _nearest_images(embedder, embeddings[0], gallery, checkpoint, k)
    views = []
    for picture, each, embedding, (name, direction) in zip(
        (image, against), pixels, embeddings, directions, strict=False
    ):
        shares = None
        if classes is not None:
            decomposed = embedder.shares(embedding.unsqueeze(0))
            shares = OrthogonalShares(decomposed.shares.squeeze(0), decomposed.rest.squeeze(0))
        inputs = embedder.preprocessing(each.unsqueeze(0).to(embedder.device))
        gradients = attribution(embedder.encoder, inputs, direction, steps=steps)
        convolutional = last_feature_map(embedder.encoder, inputs) is not None
        grad_cam = attribution(embedder.encoder, inputs, direction, "grad_cam") if convolutional else None
        views.append(View(_name(picture), each, embedding, shares, name, gradients, grad_cam))
    basis = orthogonal_basis(classes.means) if classes is not None and classes.means is not None else None
    return Explanation(views, classes, basis, nearest, neighbors)


def _name(picture: Picture | None) -> str:
    """File name with its folder, which often is the class."""
    return "/".join(Path(picture).parts[-2:]) if isinstance(picture, str | Path) else "image"


def _read(embedder: Embedder, picture: Picture) -> Tensor:
    """uint8 (C, H, W) of the model's size."""
    preprocessing = embedder.preprocessing
    pixels = preprocessing.square(picture) if isinstance(picture, Image.Image) else preprocessing.read(picture)[0]
    return torch.from_numpy(np.array(pixels))


def _class_mean(classes: TrainingClasses | None, name: str | None, cosines: Tensor | None) -> tuple[str, Tensor]:
    """What to call the mean of a class, and the mean; of the nearest class without a name."""
    if classes is None or classes.means is None or cosines is None:
        raise ValueError(
            "the model must know its class means, which a validation during training stores, or the similarity to "
            "another image must be asked for (against); got no means"
        )
    known = cosines > -torch.inf
    if name is None:
        if not known.any():
            raise ValueError("the model must have a class with a mean, got none")
        name = classes.names[int(cosines.argmax())]
    if name not in classes.names:
        near = difflib.get_close_matches(name, classes.names, n=3)
        raise ValueError(
            f"class_name must be one of the {len(classes.names)} classes of the model, got {name!r}"
            + (f"; do you mean {' or '.join(near)}?" if near else "")
        )
    index = classes.names.index(name)
    if not known[index]:
        raise ValueError(f"class_name must be a class with training images, got {name!r}, which had none")
    return f"the mean of {name}", classes.means[index]


def _nearest_images(
    embedder: Embedder, embedding: Tensor, gallery: str | Path, checkpoint: str | Path | None, k: int
) -> list[Neighbor]:
    path = Path(gallery).expanduser()
    if path.is_dir():
        files = list(find_images([path]))
        if not files:
            raise ValueError(f"gallery must hold at least one image, got none in {str(path)!r}")
        cosines, rows = NearestNeighbors(embedder(files)).search(embedding.unsqueeze(0), min(k, len(files)))
        paths = [files[row] for row in rows[0].tolist()]
    elif not path.exists():
        raise FileNotFoundError(f"no gallery at {str(path)!r}: it must be a file of simo embed or a folder of images")
    else:
        with open_embeddings(path) as file:
            if "path" not in file.columns:
                raise ValueError(f"gallery {str(path)!r} must have a column path, got {', '.join(file.columns)}")
            if checkpoint is not None:
                find_checkpoint(file, checkpoint)
            cosines, rows = NearestNeighbors(file).search(embedding.unsqueeze(0), max(1, min(k, file.rows)))
            paths = file.column("path", rows[0].tolist())
    return [Neighbor(str(name), float(cosine)) for name, cosine in zip(paths, cosines[0].tolist(), strict=True)]
