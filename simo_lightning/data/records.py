"""The images of a folder or a manifest as records to pack."""

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from simo_lightning.data.folder import ADVICE, SPLIT_NAMES, Listing, coarse_folders, find_splits, named_as_broken
from simo_lightning.data.manifest import Manifest, list_split, read_manifest
from simo_lightning.data.reading import what_was_left_out
from simo_lightning.data.sources import Split
from simo_lightning.preprocessing import Decoder, Preprocessing


class Record(NamedTuple):
    """An image to pack.

    Attributes:
        file: On disk.
        path: Relative to the folder of its split, or to that of the manifest.
        label: Index into the names of the classes of all splits.
        split: That it belongs to.
        coarse: Name of its coarse class; None: it has none.
    """

    file: str
    path: str
    label: int
    split: Split
    coarse: str | None


def checked_bytes(path: str | Path, advice: str = ADVICE) -> bytes:
    """The bytes of an image file that decodes.

    Args:
        path: The file.
        advice: What to do about one that does not, for the error.

    Returns:
        Its content.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it does not decode; the message names it.
    """
    content = Path(path).read_bytes()
    file = BytesIO(content)
    file.name = str(path)
    with named_as_broken(advice), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about files that it reads all the same
        Decoder()(file, (1, 1))  # as a JPEG at an eighth of its size, whose data are read whole
    return content


class PackedFiles(NamedTuple):
    """What :func:`pack_images` has done.

    Attributes:
        path: The folder.
        images: Number of images in it.
        files: Number of files that hold them.
        size: Bytes of these files.
        written: Images that this call has written; the others were there from an earlier one.
        seconds: That it took to write them.
        notes: One line each about what was left out.
    """

    path: Path
    images: int
    files: int
    size: int
    written: int
    seconds: float
    notes: list[str]


def list_records(
    source: Path, data_dir: str | Path | None = None, class_level: int | None = None, skip: bool = False
) -> tuple[list[Record], list[str], list[str]]:
    """List the images of all splits as :class:`ImageFolderPairDataModule` does; no image is opened.

    Args:
        source: Folder or manifest.
        data_dir: Folder of the relative paths of a manifest; None: that of the manifest.
        class_level: Which folder above an image names its class.
        skip: Whether files that are no images are left out; otherwise they are an error.

    Returns:
        The images, split by split, each sorted by class and path; the names of the classes of all splits, sorted; and
        one line for each split in which something was left out.

    Raises:
        FileNotFoundError: If there is no such source, or no image in it.
        ValueError: If an argument does not fit the source, or the source cannot be listed.
    """
    found: Manifest | dict[Split, Path]
    if source.is_dir():
        if data_dir is not None:
            raise ValueError(f"data_dir must be None unless a manifest is packed, got {str(data_dir)!r}")
        found = find_splits(source, class_level=class_level)
    else:
        if class_level is not None:
            raise ValueError(f"class_level must be None with a manifest, which names the classes, got {class_level}")
        found = read_manifest(source, data_dir)
    decoder = Preprocessing(224)  # of no effect here: files are packed as they are
    each = {split: list_split(found, split, decoder, class_level, skip) for split in SPLIT_NAMES}
    listings = {split: listing for split, listing in each.items() if listing is not None}
    class_names = sorted({name for listing in listings.values() for name in listing.images.class_names})
    number = {name: label for label, name in enumerate(class_names)}
    records = []
    for split, listing in listings.items():
        images, coarse = listing.images, _coarse_of(found, split, listing, class_level)
        labels = [number[name] for name in images.class_names]
        for path, label in zip(images.names.tolist(), images.labels.tolist(), strict=True):
            records.append(Record(os.path.join(images.root, path), path, labels[label], split, coarse.get(path)))
    left_out = {split: "; ".join(what_was_left_out(listing)) for split, listing in listings.items()}
    return records, class_names, [f"{split} split: left out {what}" for split, what in left_out.items() if what]


def _coarse_of(
    found: Manifest | dict[Split, Path], split: Split, listing: Listing, class_level: int | None
) -> dict[str, str | None]:
    """Coarse class of each path: the manifest's, or the folder above its class folder; empty where there is none."""
    if isinstance(found, Manifest):
        columns = found.table.columns
        return {path: name or None for path, name in zip(columns["path"], columns.get("coarse", []), strict=False)}
    try:
        above = {} if split == "unknown" else coarse_folders(listing.images, class_level or 1)
    except ValueError:  # no folder above the class folders, or a class in several
        return {}
    images = listing.images
    classes = [above.get(name) for name in images.class_names]
    return {path: classes[label] for path, label in zip(images.names.tolist(), images.labels.tolist(), strict=True)}
