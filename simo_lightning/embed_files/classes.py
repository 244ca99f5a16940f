"""Class means of labelled images or embeddings, for classes that the model was not trained on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simo_lightning.checkpoints import TrainingClasses
from simo_lightning.data.folder import list_image_folder
from simo_lightning.embedder import Embedder
from simo_lightning.embeddings_file import open_embeddings
from simo_lightning.functional.knn import check_finite
from simo_lightning.functional.neighbors import unit_vectors


def known_means(classes: TrainingClasses | None) -> bool:
    """Whether any class has a mean."""
    return classes is not None and classes.means is not None and not bool(classes.means.isnan().any(dim=1).all())


def read_classes(path: str | Path, embedder: Embedder, checkpoint_sha256: str | None = None) -> TrainingClasses:
    """Names and mean embeddings of classes.

    Args:
        path: Folder of class folders of images; or a file of labelled embeddings: the .npz file of ``simo predict``, or
            a Parquet file with the columns embedding and label.
        embedder: Embeds the images of a folder.
        checkpoint_sha256: Of the embedder; a Parquet file that names another one is refused.

    Returns:
        Names, sorted or in the order of the file, and the mean of the embeddings of each at length 1.

    Raises:
        FileNotFoundError: If there is no such file or folder, or it holds no class folder.
        OSError: If an image cannot be read.
        ValueError: If the file holds no labels or embeddings of another model, or an image is broken.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path, embedder)
    with open_embeddings(path) as file:
        if checkpoint_sha256 is not None and file.info.get("checkpoint_sha256", checkpoint_sha256) != checkpoint_sha256:
            raise ValueError(f"classes {str(path)!r} must be embedded with the same checkpoint, got another one")
        names, labels = file.labels()
        sums, counts = torch.zeros(len(names), file.dim, dtype=torch.float64), torch.zeros(len(names))
        for start, embeddings in file.chunks():
            _add(sums, counts, torch.from_numpy(embeddings), torch.from_numpy(labels[start : start + len(embeddings)]))
    dim = embedder(np.zeros((1, embedder.preprocessing.channels, *embedder.preprocessing.size), np.uint8)).shape[1]
    if sums.shape[1] != dim:
        raise ValueError(f"classes {str(path)!r} must hold embeddings of {dim} dimensions, got {sums.shape[1]}")
    return TrainingClasses(names, _means(sums, counts))


def _of_folder(folder: Path, embedder: Embedder) -> TrainingClasses:
    images = list_image_folder(folder, embedder.preprocessing).images
    sums: Tensor | None = None
    counts = torch.zeros(len(images.class_names))
    for start in range(0, len(images), 1024):
        stop = min(start + 1024, len(images))
        embeddings = torch.from_numpy(embedder([images.path(index) for index in range(start, stop)]))
        if sums is None:
            sums = torch.zeros(len(images.class_names), embeddings.shape[1], dtype=torch.float64)
        _add(sums, counts, embeddings, images.labels[start:stop])
    assert sums is not None
    return TrainingClasses(images.class_names, _means(sums, counts))


def _add(sums: Tensor, counts: Tensor, embeddings: Tensor, labels: Tensor) -> None:
    check_finite(embeddings, "embeddings of the classes")
    sums.index_add_(0, labels.long(), unit_vectors(embeddings.double()))
    counts.index_add_(0, labels.long(), torch.ones(len(labels)))


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return (sums / counts.unsqueeze(1)).float()  # nan for a class without images
