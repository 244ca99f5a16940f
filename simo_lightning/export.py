"""An encoder as a file that needs nothing of this package: torch.export's .pt2, or ONNX."""

import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simo_lightning.checkpoints import load_encoder
from simo_lightning.class_paths import Trusted
from simo_lightning.extras import missing_extra

Format = Literal["torch", "onnx"]


class RawImageEncoder(nn.Module):
    """An encoder with its normalisation: takes images as they are in files.

    Args:
        encoder: From normalised images to embeddings.
        mean: Of each channel, on the scale 0..1.
        std: Of each channel on the same scale, > 0.

    Raises:
        ValueError: If mean and std differ in length, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise ValueError(f"mean and std must have as many values, std positive, got {list(mean)} and {list(std)}")
        self.encoder = encoder
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images: uint8 ``(N, C, H, W)`` in 0..255.

        Returns:
            ``(N, D)``.
        """
        embeddings: Tensor = self.encoder((images.float() - self.mean) / self.std)
        return embeddings


def export_encoder(
    source: str | Path | nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int],
    format: Format | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    in_channels: int | None = None,
    trusted: Iterable[Trusted] = (),
) -> Path:
    """Write an encoder, in evaluation mode and float32, with a free batch size.

    Read it by ``torch.export.load(path).module()(images)``, or by ONNX Runtime with the input "images" and the output
    "embeddings".

    Args:
        source: A checkpoint, a module with an ``encoder``, or an encoder itself, which is not changed.
        path: File to write; its folder is made.
        image_size: Side of the images in pixels, or height and width.
        format: "torch" (.pt2) or "onnx", which needs the extra ``export``; None: by the ending of the path.
        mean: Mean of each channel on the scale 0..1, such as the data module's ``mean`` after setup; the file then
            takes uint8 images in 0..255 and normalises them itself. None: it takes normalised float32 images.
        std: Standard deviation of each channel on the same scale; with ``mean``.
        in_channels: Channels of the images; None: of ``mean``, else the encoder's ``in_channels``, else 3.
        trusted: For a checkpoint, as in :func:`~simo_lightning.checkpoints.load_encoder`.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If the extra ``export`` is not installed.
        ValueError: If the source has no encoder, the format is not known, only one of mean and std is given, or the
            encoder does not take such images.

    Example:
        >>> from simo_lightning import ImageEncoder
        >>> folder = getfixture("tmp_path")
        >>> written = export_encoder(ImageEncoder("resnet10", width=0.125), folder / "encoder.pt2", image_size=32)
        >>> torch.export.load(written).module()(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 16])
    """
    path = Path(path)
    if format is None:
        format = {".pt2": "torch", ".onnx": "onnx"}.get(path.suffix)  # type: ignore[assignment]
    if format not in ("torch", "onnx"):
        raise ValueError(f"format must be 'torch' or 'onnx', or the path end in .pt2 or .onnx, got {format!r}, {path}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given both or neither, got {mean} and {std}")
    model = _encoder_of(source, trusted)
    channels = in_channels or (len(mean) if mean is not None else getattr(model, "in_channels", None) or 3)
    if mean is not None and std is not None:
        model = RawImageEncoder(model, mean, std)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    # two images: a batch of one would be taken for a constant
    images = torch.zeros(2, channels, height, width, dtype=torch.float32 if mean is None else torch.uint8)
    model = model.eval().requires_grad_(False)
    model(images)  # images that do not fit are told by the encoder, in its words
    path.parent.mkdir(parents=True, exist_ok=True)
    (_write_torch if format == "torch" else _write_onnx)(model, images, path)
    return path


def _encoder_of(source: str | Path | nn.Module, trusted: Iterable[Trusted]) -> nn.Module:
    if isinstance(source, (str, Path)):
        return load_encoder(source, map_location="cpu", trusted=trusted).float()
    if not isinstance(source, nn.Module):
        raise ValueError(f"source must be a checkpoint, a module or an encoder, got {type(source).__name__}")
    encoder = getattr(source, "encoder", source)
    copied: nn.Module = deepcopy(encoder if isinstance(encoder, nn.Module) else source)
    return copied.cpu().float()


def _write_torch(model: nn.Module, images: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=_free_batch()), path)


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(missing_extra(str(error)) or str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of torch's own operators
        torch.onnx.export(
            model,
            (images,),
            path,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=_free_batch(),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _free_batch() -> Any:
    return ({0: torch.export.Dim("batch")},)
