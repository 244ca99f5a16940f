"""Images that ``simo pack`` has packed into a few large files, read memory-mapped."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from simo_lightning.data.folder import FolderImages, Listing
from simo_lightning.data.hub import open_splits
from simo_lightning.data.sources import Split
from simo_lightning.preprocessing import Preprocessing

INFO = "pack.json"  # options, and the size and SHA-256 digest of each other file
SPLITS = "dataset_dict.json"  # written last
FORMAT = 1


@dataclass(frozen=True, eq=False)
class PackedImages(FolderImages):
    """Labelled images of one split, which stay in memory-mapped files and are decoded batch by batch.

    Workers share the pages of the files; nothing but labels and names is copied.

    Args:
        root: Folder of the files of the split.
        names: Path of each image in the folder or manifest that was packed.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        decoder: Reads the stored bytes.
        table: ``datasets.Dataset`` with a column ``image``.
        rows: Row of each image in ``table``, int64 ``(N,)``.
    """

    table: Any
    rows: np.ndarray
    checked: ClassVar[bool] = True

    def file(self, index: int) -> BinaryIO:
        """The bytes of one image file, with a name for messages."""
        content = self.table.data.column("image")[int(self.rows[index])]["bytes"]
        file = io.BytesIO(content.as_buffer())
        file.name = str(self.path(index))
        return file

    @property
    def stored(self) -> list[str]:
        """Files that hold the images, relative to ``root``."""
        return sorted(Path(file["filename"]).name for file in self.table.cache_files)

    @property
    def advice(self) -> str:
        """What to do about an image that does not decode; all did when they were packed."""
        return f"simo pack {self.root.parent} --verify tells which files have changed since they were packed"

    def subset(self, indices: Tensor) -> PackedImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        chosen = indices.numpy()
        return replace(self, names=self.names[chosen], labels=self.labels[indices], rows=self.rows[chosen])


@dataclass(frozen=True)
class PackedFolder:
    """The splits of a packed folder.

    Args:
        root: The folder.
        parts: ``datasets.Dataset`` of each split, with the columns image, path, label and perhaps coarse.
        class_level: That was given when a tree of folders was packed.
    """

    root: Path
    parts: dict[Split, Any]
    class_level: int | None

    @property
    def splits(self) -> list[Split]:
        """The splits that there are."""
        return list(self.parts)

    def listing(self, split: Split, decoder: Preprocessing) -> Listing | None:
        """The images of one split, in the order of the folder or manifest; no image is read.

        Args:
            split: The split.
            decoder: Reads the stored bytes.

        Returns:
            The images; None if there is no such split.
        """
        part = self.parts.get(split)
        if part is None:
            return None
        known = part.features["label"].names
        present, labels = np.unique(part.data.column("label").to_numpy(), return_inverse=True)
        images = PackedImages(
            root=self.root / split,
            names=np.array(part.data.column("path").to_pylist(), dtype=np.str_),
            labels=torch.from_numpy(labels.astype(np.int64)),
            class_names=[known[label] for label in present],
            decoder=decoder,
            table=part,
            rows=np.arange(len(labels), dtype=np.int64),
        )
        return Listing(images)

    def coarse(self) -> dict[str, str]:
        """Coarse class of each class of the training split.

        Raises:
            ValueError: If none are stored, or a class of the training split has no or several coarse classes.
        """
        part = self.parts["train"]
        if "coarse" not in part.column_names:
            raise ValueError(f"coarse 'manifest' requires packed data of a manifest with a column coarse: {self.root}")
        names, coarse_names = part.features["label"].names, part.features["coarse"].names
        columns = [part.data.column(name).fill_null(-1).to_numpy() for name in ("label", "coarse")]
        found: dict[str, str] = {}
        for label, number in np.unique(np.stack(columns, axis=1), axis=0).tolist():
            coarse = "" if number < 0 else coarse_names[number]
            if not coarse or found.setdefault(names[label], coarse) != coarse:
                raise ValueError(
                    f"coarse must be one name for all images of class {names[label]!r} in {str(self.root)!r}, "
                    f"got {coarse!r}" + (f" and {found[names[label]]!r}" if names[label] in found else "")
                )
        return found


def is_packed(folder: str | Path | None) -> bool:
    """Whether ``simo pack`` writes, or has written, to a folder."""
    return folder is not None and (Path(folder).expanduser() / INFO).is_file()


def read_info(folder: Path) -> dict[str, Any]:
    """Content of the file ``pack.json``.

    Args:
        folder: A packed folder, complete or not.

    Returns:
        Its options, and under "files", once all images are packed, size and SHA-256 digest of each file.

    Raises:
        ValueError: If the file is damaged or of another version.
    """
    try:
        info = json.loads((folder / INFO).read_text())
        version = info["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / INFO)!r} is not a file of simo pack: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder / INFO)!r} must be of format {FORMAT}, got {version!r}")
    found: dict[str, Any] = info
    return found


def complete_info(folder: Path) -> dict[str, Any]:
    """Content of ``pack.json`` of a complete folder.

    Raises:
        ValueError: If packing has not ended; or as :func:`read_info`.
    """
    info = read_info(folder)
    if "files" not in info or not (folder / SPLITS).is_file():
        raise ValueError(f"{str(folder)!r} is not packed completely: start the same simo pack again, which goes on")
    return info


def open_packed(folder: str | Path, class_level: int | None = None) -> PackedFolder:
    """Open a packed folder: labels and names are read, images are not.

    Args:
        folder: That ``simo pack`` has written.
        class_level: None, or as it was when the images were packed.

    Returns:
        Its splits.

    Raises:
        FileNotFoundError: If a file is missing.
        ImportError: If ``datasets`` is not installed.
        ValueError: If packing has not ended, a file has another size than was written, or ``class_level`` is another
            one.
    """
    root = Path(folder).expanduser().absolute()
    info = complete_info(root)
    if class_level not in (None, info["class_level"]):
        raise ValueError(
            f"class_level must be null or {info['class_level']}, with which {str(root)!r} was packed, got {class_level}"
        )
    for name, file in info["files"].items():
        size = (root / name).stat().st_size
        if size != file["bytes"]:
            raise ValueError(f"{str(root / name)!r} must have {file['bytes']:,} bytes as it was packed, got {size:,}")
    parts = open_splits(root)
    sizes = ", ".join(f"{len(part):,} in the {split} split" for split, part in parts.items())
    rank_zero_info(f"{str(root)!r}: packed images, {sizes}")
    return PackedFolder(root, parts, info["class_level"])
