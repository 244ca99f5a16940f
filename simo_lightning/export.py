"""Export of an encoder to a file that does not need this package: torch.export's .pt2, or ONNX."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from simo_lightning.checkpoints import known_preprocessing, load_encoder
from simo_lightning.class_paths import Trusted
from simo_lightning.extras import import_extra, missing_extra
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.version import __version__

Format = Literal["torch", "onnx"]


class RawImageEncoder(nn.Module):
    """An encoder that normalises its uint8 images itself.

    Args:
        encoder: Maps normalised images to embeddings.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel on the same scale, > 0.

    Raises:
        ValueError: If mean and std differ in length, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise ValueError(
                f"mean and std must have the same length and std be positive, got {list(mean)} and {list(std)}"
            )
        self.encoder = encoder
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of uint8 images ``(N, C, H, W)``."""
        embeddings: Tensor = self.encoder((images.float() - self.mean) / self.std)
        return embeddings


def export_encoder(
    source: str | Path | nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    format: Format | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    in_channels: int | None = None,
    trusted: Iterable[Trusted] = (),
) -> Path:
    """Write an encoder, in evaluation mode and float32, with a dynamic batch size.

    The file of a model whose preprocessing is known takes uint8 images ``(N, C, H, W)`` of the model's size and
    normalises them itself. Read it with ``torch.export.load(path).module()(images)`` or ONNX Runtime. Its input is
    named "images", its output "embeddings". The names of the classes, the preprocessing and the dimension of the
    embeddings are stored with it: in ONNX as ``metadata_props``, in .pt2 as extra files; see
    :func:`exported_metadata`.

    Args:
        source: A checkpoint, a module with an ``encoder``, or an encoder, which is not changed.
        path: File to write; its folder is created.
        image_size: Side of the images in pixels, or height and width; None for that of the source's preprocessing.
        format: "torch" (.pt2) or "onnx", which needs the extra ``export``; None for that of the file's suffix.
        mean: Mean of each channel on the scale 0..1; None for that of the source's preprocessing. If neither is known
            the file takes normalised float32 images.
        std: Standard deviation of each channel on the same scale; with ``mean``.
        in_channels: Channels of the images; None for those of the preprocessing or of ``mean``, else the encoder's
            ``in_channels``, else 3.
        trusted: For a checkpoint, as in :func:`~simo_lightning.checkpoints.load_encoder`.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If the extra ``export`` is not installed.
        ValueError: If the source has no encoder, the format is unknown, only one of mean and std is given, an argument
            contradicts the source's preprocessing, the image size is not known, or the encoder does not accept such
            images; for a checkpoint, as ``load_encoder``.

    Example:
        >>> from simo_lightning import ImageEncoder, SimOModule
        >>> from simo_lightning.preprocessing import Preprocessing
        >>> folder = getfixture("tmp_path")
        >>> preprocessing = Preprocessing(32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
        >>> module = SimOModule(ImageEncoder("resnet10", width=0.125), preprocessing=preprocessing)
        >>> written = export_encoder(module, folder / "encoder.pt2")
        >>> torch.export.load(written).module()(torch.zeros(5, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([5, 16])
    """
    path = Path(path)
    if format is None:
        format = {".pt2": "torch", ".onnx": "onnx"}.get(path.suffix)  # type: ignore[assignment]
    if format not in ("torch", "onnx"):
        raise ValueError(f"format must be 'torch' or 'onnx', or the path end in .pt2 or .onnx, got {format!r}, {path}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given both or neither, got {mean} and {std}")
    model, preprocessing, names = _encoder_of(source, trusted)
    if preprocessing is not None:
        given = {"image_size": image_size, "mean": mean, "std": std, "channels": in_channels}
        preprocessing.check_arguments(given, "the exported file")
        image_size, in_channels = preprocessing.size, preprocessing.channels
        mean, std = preprocessing.mean or mean, preprocessing.std or std
    if image_size is None:
        raise ValueError("image_size must be given for an encoder whose preprocessing is not known, got None")
    channels = in_channels or (len(mean) if mean is not None else getattr(model, "in_channels", None) or 3)
    if mean is not None and std is not None:
        model = RawImageEncoder(model, mean, std)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    # two images, since torch.export treats a batch size of one as a constant
    images = torch.zeros(2, channels, height, width, dtype=torch.float32 if mean is None else torch.uint8)
    model = model.eval().requires_grad_(False)
    embeddings = model(images)  # raises the encoder's own error if the images do not fit
    metadata = {
        "class_names": names,
        "preprocessing": None if preprocessing is None else asdict(preprocessing),
        "embedding_dim": embeddings.shape[1],
        "simo_lightning": __version__,
    }
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    (_write_torch if format == "torch" else _write_onnx)(model, images, path, texts)
    return path


def export_checked(
    source: str | Path | nn.Module, path: str | Path, tolerance: float = 1e-4, **arguments: Any
) -> tuple[Path, float]:
    """Write an encoder as :func:`export_encoder` does, and compare the file's embeddings with the encoder's.

    Args:
        source: As for ``export_encoder``.
        path: File to write, .onnx or .pt2. It is replaced only by a file that has passed.
        tolerance: Largest difference that is accepted, > 0; see :func:`largest_difference`.
        arguments: Of ``export_encoder``.

    Returns:
        The path and the largest difference.

    Raises:
        ValueError: If the difference is above the tolerance; no file is then written. Otherwise as ``export_encoder``.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"path must end in .onnx or .pt2, got {path}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}_", dir=path.parent) as folder:
        written = export_encoder(source, Path(folder, path.name), **arguments)
        difference = largest_difference(written, source, **arguments)
        if not difference <= tolerance:
            raise ValueError(
                f"the embeddings of {path} must differ from the model's by at most {tolerance:g}, got "
                f"{difference:.2g}: no file is written"
            )
        os.replace(written, path)
    return path, difference


@torch.no_grad()
def largest_difference(path: str | Path, source: str | Path | nn.Module, **arguments: Any) -> float:
    """The largest difference between the embeddings of an exported file and those of its source.

    Args:
        path: A file of :func:`export_encoder`, .onnx or .pt2.
        source: As it was passed there.
        arguments: As they were passed there.

    Returns:
        Largest absolute difference of a coordinate over batches of 1 and 5 random images and one black and one white
        image, in units of the vector's length where that is above 1.

    Raises:
        ImportError: For ONNX, if onnxruntime is not installed.
    """
    encoder, preprocessing, _ = _encoder_of(source, arguments.get("trusted") or ())
    mean, std = arguments.get("mean"), arguments.get("std")
    size, channels = arguments.get("image_size"), arguments.get("in_channels")
    if preprocessing is not None:
        size, channels = preprocessing.size, preprocessing.channels
        mean, std = preprocessing.mean or mean, preprocessing.std or std
    assert size is not None
    height, width = (size, size) if isinstance(size, int) else size
    channels = channels or (len(mean) if mean else getattr(encoder, "in_channels", None) or 3)
    if mean is not None and std is not None:
        preprocessing = Preprocessing((height, width), tuple(mean), tuple(std), channels)
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(256, (number, channels, height, width), dtype=torch.uint8, generator=generator)
        for number in (1, 5)
    ]
    batches.append(torch.stack([torch.zeros_like(batches[0][0]), torch.full_like(batches[0][0], 255)]))
    encoder.eval()
    run, largest = _opened(Path(path)), 0.0
    for images in batches:
        if mean is None:
            inputs = given = images / 255
        else:
            assert preprocessing is not None
            inputs, given = preprocessing.normalize(images), images
        expected, found = encoder(inputs), run(given)
        scale = expected.norm(dim=1, keepdim=True).clamp(min=1)
        difference = float(((found - expected) / scale).abs().max())
        largest = max(largest, difference if difference == difference else float("inf"))
    return largest


def exported_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`export_encoder` stored in a file beside the graph.

    Args:
        path: The file, .onnx or .pt2.

    Returns:
        ``class_names``, ``preprocessing`` (the arguments of :class:`~simo_lightning.preprocessing.Preprocessing`),
        ``embedding_dim`` and the version of ``simo_lightning``; None for what was not known. Empty for another file.

    Raises:
        ImportError: For ONNX, if onnxruntime is not installed.
    """
    if Path(path).suffix == ".onnx":
        found = dict(_session(Path(path)).get_modelmeta().custom_metadata_map)
    else:
        found = dict.fromkeys(_METADATA, "")
        torch.export.load(path, extra_files=found)
    return {name: json.loads(found[name]) for name in _METADATA if found.get(name)}


_METADATA = ("class_names", "preprocessing", "embedding_dim", "simo_lightning")


def _opened(path: Path) -> Any:
    """The exported file as a function of images."""
    if path.suffix != ".onnx":
        return torch.export.load(path).module()
    session = _session(path)

    def run(images: Tensor) -> Tensor:
        found: np.ndarray = session.run(["embeddings"], {"images": images.numpy()})[0]
        return torch.from_numpy(found)

    return run


def _session(path: Path) -> Any:
    return import_extra("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _encoder_of(
    source: str | Path | nn.Module, trusted: Iterable[Trusted]
) -> tuple[nn.Module, Preprocessing | None, list[str] | None]:
    """A copy of the encoder on the CPU in float32, its preprocessing and its classes as far as they are known."""
    if isinstance(source, (str, Path)):
        source = load_encoder(source, map_location="cpu", trusted=trusted).float()
        return source, _preprocessing_of(source), getattr(getattr(source, "classes", None), "names", None)
    if not isinstance(source, nn.Module):
        raise ValueError(f"source must be a checkpoint, a module or an encoder, got {type(source).__name__}")
    inner = getattr(source, "encoder", source)
    encoder = inner if isinstance(inner, nn.Module) else source
    names = getattr(getattr(source, "classes", None), "names", None)
    return deepcopy(encoder).cpu().float(), known_preprocessing(source) or _preprocessing_of(encoder), names


def _preprocessing_of(encoder: nn.Module) -> Preprocessing | None:
    found = getattr(encoder, "preprocessing", None)
    return found if isinstance(found, Preprocessing) else None


def _write_torch(model: nn.Module, images: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=_dynamic_batch())
    torch.export.save(program, path, extra_files=dict(metadata))


def _write_onnx(model: nn.Module, images: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(missing_extra(str(error)) or str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporter, about torch's own operators
        program: Any = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=_dynamic_batch(),
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props.update(metadata)
        program.save(path, external_data=False)


def _dynamic_batch() -> Any:
    return ({0: torch.export.Dim("batch")},)
