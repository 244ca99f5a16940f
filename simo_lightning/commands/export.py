"""``simo export CHECKPOINT FILE``: ONNX or .pt2."""

from pathlib import Path

from simo_lightning.export import export_checked, exported_metadata

POSITIONAL: dict[str, str | None] = {"checkpoint": None, "file": None}


def run(
    checkpoint: str,
    file: str,
    tolerance: float = 1e-4,
    image_size: int | list[int] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    in_channels: int | None = None,
    trusted: list[str] | None = None,
) -> None:
    """Write an encoder, compare the file's embeddings with the model's, and print what was written.

    Args:
        checkpoint: A checkpoint, or a folder of save_pretrained.
        file: The file to write, FILE.onnx (needs the extra export) or FILE.pt2. It takes uint8 images of the model's
            size, any number of them.
        tolerance: Largest difference of the embeddings that is accepted, in units of their length where that is above
            1; above it no file is written.
        image_size: Side of the images in pixels, or height and width, for a checkpoint that does not hold it.
        mean: Mean of each channel on the scale 0..1, for a checkpoint that does not hold it.
        std: Standard deviation of each channel, with mean.
        in_channels: Channels of the images, for a checkpoint that does not hold them.
        trusted: Import paths of classes or packages of your own that the checkpoint names.
    """
    if isinstance(image_size, list) and len(image_size) != 2:
        raise ValueError(f"image_size must be a side, or height and width, got {image_size}")
    path, difference = export_checked(
        checkpoint,
        file,
        tolerance,
        image_size=(image_size[0], image_size[1]) if isinstance(image_size, list) else image_size,
        mean=mean,
        std=std,
        in_channels=in_channels,
        trusted=trusted or (),
    )
    found = exported_metadata(path)
    preprocessing, names = found.get("preprocessing"), found.get("class_names")
    size = "" if preprocessing is None else f" of {_sides(preprocessing['image_size'])} pixels"
    known = mean is not None or (preprocessing is not None and preprocessing["mean"] is not None)
    print(f"written     {path} ({Path(path).stat().st_size:,} bytes)")
    print(f"takes       {'uint8' if known else 'normalised float32'} images{size}, any number of them")
    print(f"returns     vectors of {found['embedding_dim']} numbers")
    print(f"stores      {'no names of classes' if names is None else f'the names of {len(names):,} classes'}")
    print(f"checked     largest difference from the model {difference:.1e}, accepted {tolerance:g}")


def _sides(image_size: int | list[int]) -> str:
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    return f"{height} x {width}"
