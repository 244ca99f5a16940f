"""Embeddings of images and image files by a trained encoder, without a trainer."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from simo_lightning.checkpoints import TrainingClasses, known_preprocessing, load_encoder
from simo_lightning.class_paths import Trusted
from simo_lightning.functional.decomposition import OrthogonalShares, orthogonal_shares
from simo_lightning.functional.neighbors import unit_vectors
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.tensor_files import first_line

# A picture: a file, or a PIL image.
Picture = str | Path | Image.Image
EmbeddingPrecision = Literal["32", "bf16"]


class Embedder:
    """Maps images and image files to embeddings.

    Args:
        encoder: Maps normalised images ``(N, C, H, W)`` to embeddings ``(N, D)``. It is put in evaluation mode, on the
            device.
        preprocessing: How an image becomes its input; mean and std must be known.
        classes: Names and mean embeddings of the classes, for :meth:`scores` and :meth:`shares`.
        device: "auto" takes the GPU if there is one.
        precision: "32", or "bf16" for autocast.
        batch_size: Images that are embedded at a time.
        num_workers: Processes that read image files; 0 reads them in this one.

    Attributes:
        encoder: As passed.
        preprocessing: As passed.
        classes: As passed.
        device: On which the encoder is.

    Raises:
        ValueError: If ``batch_size`` or ``num_workers`` is out of range, the precision is unknown, the machine has no
            such device, or the preprocessing has no mean.

    Example:
        >>> from simo_lightning import ImageEncoder
        >>> preprocessing = Preprocessing(32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
        >>> embedder = Embedder(ImageEncoder("resnet10", width=0.125, image_size=32), preprocessing)
        >>> embedder(torch.zeros(3, 3, 48, 40, dtype=torch.uint8)).shape
        (3, 16)
    """

    def __init__(
        self,
        encoder: nn.Module,
        preprocessing: Preprocessing,
        classes: TrainingClasses | None = None,
        device: str | torch.device = "auto",
        precision: EmbeddingPrecision = "32",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if precision not in ("32", "bf16"):
            raise ValueError(f"precision must be '32' or 'bf16', got {precision!r}")
        if preprocessing.mean is None:
            raise ValueError("preprocessing must have mean and std to embed images, got None")
        self.device = _available(device)
        self.encoder = encoder.to(self.device).eval()
        self.preprocessing = preprocessing
        self.classes = classes
        self.precision = precision
        self.batch_size = batch_size
        self.num_workers = num_workers

    @classmethod
    def load(cls, path: str | Path, trusted: Iterable[Trusted] | Trusted = (), **options: Any) -> Self:
        """Make an embedder of a checkpoint.

        Args:
            path: The file, or a folder of ``save_pretrained``.
            trusted: As in :func:`~simo_lightning.checkpoints.load_encoder`.
            options: ``device``, ``precision``, ``batch_size`` and ``num_workers`` of this class.

        Returns:
            The embedder.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, or its preprocessing is not known.
        """
        encoder = load_encoder(path, map_location="cpu", trusted=trusted)
        preprocessing = known_preprocessing(encoder) or getattr(encoder, "preprocessing", None)
        if preprocessing is None or preprocessing.mean is None:
            raise ValueError(
                f"checkpoint {path} does not say how its images are normalised: load its encoder by load_encoder, and "
                "pass it to Embedder with a Preprocessing"
            )
        return cls(encoder, preprocessing, getattr(encoder, "classes", None), **options)

    def __call__(self, images: Tensor | np.ndarray | Sequence[Picture] | str | Path) -> np.ndarray:
        """Embed images.

        Args:
            images: uint8 ``(N, C, H, W)`` of any size, or image files and PIL images, or one file.

        Returns:
            float32 ``(N, D)``.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If a file is no image, or a tensor has another type or number of channels.
        """
        if isinstance(images, str | Path):
            images = [images]
        if isinstance(images, Tensor | np.ndarray):
            pixels: Iterable[Tensor] = torch.as_tensor(images).split(self.batch_size)
        else:
            pixels = self._read(list(images))
        parts = [self.embed(batch).cpu() for batch in pixels]
        embeddings: np.ndarray = torch.cat(parts).numpy() if parts else self.embed(self._no_images()).cpu().numpy()
        return embeddings

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings of one batch.

        Args:
            pixels: uint8 ``(N, C, H, W)``, of any size.

        Returns:
            float32 ``(N, D)``, on the device.
        """
        # contiguous: another memory format, as of a transposed picture, would be computed with other rounding
        inputs = self.preprocessing(pixels.to(self.device, non_blocking=True).contiguous())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embeddings: Tensor = self.encoder(inputs)
        return embeddings.float()

    def scores(self, embeddings: Tensor | np.ndarray) -> Tensor:
        """Cosine of embeddings with the class means.

        Args:
            embeddings: ``(N, D)``.

        Returns:
            float32 ``(N, C)``, -inf for a class without training images.

        Raises:
            ValueError: If the class means are not known.
        """
        means = unit_vectors(self._class_means().nan_to_num(nan=0.0))
        cosines = unit_vectors(torch.as_tensor(embeddings).float().cpu()) @ means.mT
        return cosines.masked_fill(self._class_means().isnan().any(dim=1), float("-inf"))

    def shares(self, embeddings: Tensor | np.ndarray) -> OrthogonalShares:
        """Orthogonal decomposition of embeddings by the class means.

        Args:
            embeddings: ``(N, D)``.

        Returns:
            As :func:`~simo_lightning.functional.decomposition.orthogonal_shares`.

        Raises:
            ValueError: If the class means are not known.
        """
        return orthogonal_shares(torch.as_tensor(embeddings).float().cpu(), self._class_means())

    def _class_means(self) -> Tensor:
        if self.classes is None or self.classes.means is None:
            raise ValueError(
                "the model's class means must be known, which a validation during training stores; got none"
            )
        return self.classes.means

    def _no_images(self) -> Tensor:
        return torch.zeros(0, self.preprocessing.channels, *self.preprocessing.size, dtype=torch.uint8)

    def _read(self, pictures: list[Picture]) -> Iterator[Tensor]:
        yield from DataLoader(_Pictures(pictures, self.preprocessing), self.batch_size, num_workers=self.num_workers)


def _available(device: str | torch.device) -> torch.device:
    """A device that this machine has."""
    if device == "auto":
        device = torch.accelerator.current_accelerator() or "cpu" if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # whatever torch raises without the driver
        raise ValueError(f"device must be one of this machine, got {str(device)!r} ({first_line(error)})") from error


class _Pictures(Dataset[Tensor]):
    """uint8 images ``(C, H, W)`` of the model's size."""

    def __init__(self, pictures: Sequence[Picture], preprocessing: Preprocessing) -> None:
        self.pictures = pictures
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        if isinstance(picture, Image.Image):
            return torch.from_numpy(np.ascontiguousarray(self.preprocessing.square(picture)))
        return torch.from_numpy(np.ascontiguousarray(self.preprocessing.read(picture)[0]))
