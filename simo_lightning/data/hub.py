"""Labelled images of a Hugging Face data set or of Parquet files, memory-mapped."""

from __future__ import annotations

import glob
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor

from simo_lightning.data.datamodule import PairDataModule
from simo_lightning.data.folder import SPLIT_NAMES
from simo_lightning.data.pictures import Augment
from simo_lightning.data.semi import SemiSupervisedPairDataModule
from simo_lightning.data.sources import ImageSource, Split, name_list
from simo_lightning.extras import missing_extra
from simo_lightning.preprocessing import Decoder, Preprocessing

SECONDS_TO_ANSWER = 2.5  # that the Hub has before it counts as not reachable
# The usual names of the splits of a data set.
NAMES: dict[Split, tuple[str, ...]] = {**SPLIT_NAMES, "val": (*SPLIT_NAMES["val"], "dev")}
EXTRA_SPLITS: tuple[Split, ...] = ("query", "gallery", "unknown")


@dataclass(frozen=True, eq=False)
class HubImages:
    """Labelled images of one split, which stay in memory-mapped files and are decoded batch by batch.

    Args:
        table: ``datasets.Dataset`` with the image column alone, in the format "arrow".
        rows: Row of each image in ``table``, int64 ``(N,)``.
        labels: Class index of each image, int64 ``(N,)``.
        class_names: One name per class.
        decoder: Reads the stored bytes.
        where: What the rows belong to, for error messages.
    """

    table: Any
    rows: np.ndarray
    labels: Tensor
    class_names: list[str]
    decoder: Preprocessing
    where: str = "the data set"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = np.empty((len(indices), self.decoder.channels, *self.decoder.size), dtype=np.uint8)
        for position, file in enumerate(self._files(indices)):
            images[position], _ = self.decoder.read(file)
        return torch.from_numpy(images), self.labels[torch.as_tensor(list(indices), dtype=torch.int64)]

    def picture(self, index: int, size: Any = None) -> Image.Image:
        """One whole picture, upright and in mode RGB, before it is resized.

        Args:
            index: Position of the image, ``0..len(self) - 1``.
            size: As for :class:`~simo_lightning.preprocessing.Decoder`: smallest width and height that are needed.

        Returns:
            The picture.

        Raises:
            OSError: If a file that the data set names cannot be read.
            ValueError: If it is not an image or is damaged; the message names the row.
        """
        (file,) = self._files([index])
        return Decoder(self.decoder.background, self.decoder.max_value)(file, size)[0]

    def subset(self, indices: Tensor) -> HubImages:
        """The images at ``indices`` (int64 ``(M,)``), in that order."""
        return replace(self, rows=self.rows[indices.numpy()], labels=self.labels[indices])

    def _files(self, indices: Sequence[int]) -> Iterator[Any]:
        """What the decoder reads for each index: a path, or a file in memory that has a name for messages."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)].tolist()
        for row, value in zip(rows, self.table[rows].column(0).to_pylist(), strict=True):
            content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            if content is None and path is None:
                raise ValueError(f"row {row} of {self.where} holds no image")
            if content is None:
                yield path
                continue
            file = io.BytesIO(content)
            file.name = f"row {row} of {self.where}"
            yield file


class HubPairDataModule(PairDataModule):
    """A data set of the Hugging Face Hub, a local folder of one, or Parquet files; extra ``hub``.

    The data are memory-mapped: their size is not limited by the memory. Images are decoded from the stored bytes in
    ``num_workers`` processes. Nothing that a data set holds is run as code.

    Args:
        path: Name on the Hub such as ``uoft-cs/cifar10``; or a folder with Parquet files, or that
            ``Dataset.save_to_disk`` wrote, or that the library ``datasets`` reads in another way; or a Parquet file,
            a pattern such as ``data/*.parquet``, or a list of these. The split of a file follows from its name, such as
            ``train-00000-of-00002.parquet``, or from its folder's; a single split is the training split.
        image_column: Column of the images: of the feature Image, or the bytes of image files.
        label_column: Column of the class labels: ClassLabel, strings or integers.
        coarse_column: Column of the coarse classes that training uses; see ``coarse``. null: none.
        name: Configuration of the data set, where it has several.
        revision: Branch, tag or commit on the Hub; null: the newest.
        splits: Splits of the data set by their use, such as {train: train, val: validation, test: null}; uses are
            train, val, test, query, gallery and unknown. null: by their usual names.
        image_size: Side in pixels; images of other sizes are resized by the shorter side and centre-cropped. null:
            that of the model, or 224.
        background: Colour behind transparent pixels, a name or #rrggbb; null: that of the model, or white.
        max_value: Grey value that becomes white in grey images of more than 8 bits; null: see ``Decoder``.
        augment: As for ``PairDataModule``.
        **kwargs: Its further arguments.

    Raises:
        FileNotFoundError: If the data are not there; without network after 5 seconds, unless they are in the cache.
        ImportError: If ``datasets`` is not installed.
        ValueError: If an argument is out of range, or there is no such column or split; the message lists them.
    """

    def __init__(
        self,
        path: str | Path | list[str],
        image_column: str = "image",
        label_column: str = "label",
        coarse_column: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        splits: dict[str, str | None] | None = None,
        image_size: int | None = None,
        background: str | None = None,
        max_value: float | None = None,
        augment: Augment | Literal["auto"] | None = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, **kwargs)
        if coarse_column is not None and self.coarse is not None:
            raise ValueError(f"coarse must be None with coarse_column, got {self.coarse} and {coarse_column!r}")
        unknown = sorted(set(splits or {}) - NAMES.keys())
        if unknown:
            raise ValueError(f"splits must have keys among {', '.join(NAMES)}, got {', '.join(unknown)}")
        self.path, self.name, self.revision = path, name, revision
        self.image_column, self.label_column, self.coarse_column = image_column, label_column, coarse_column
        self.splits = splits
        self.image_size, self.background, self.max_value = image_size, background, max_value
        self._parts: dict[str, Any] | None = None  # data sets by their use, once opened
        self._train_names: list[str] | None = None
        # raises early if one of them is out of range
        Preprocessing(**{**self._preprocessing_arguments(), "mean": None, "std": None})

    def prepare_data(self) -> None:
        """Download and convert on one process, before the others read."""
        self._open()
        super().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """As in the base class."""
        self._open()
        super().setup(stage)

    def _open(self) -> dict[str, Any]:
        """The data sets of the splits by their use."""
        if self._parts is None:
            found = open_splits(self.path, self.name, self.revision)
            self._parts = _by_use(found, self.splits, self.path)
            self.extra_splits = tuple(split for split in EXTRA_SPLITS if split in self._parts)
        return self._parts

    def load(self, split: Split) -> ImageSource | None:
        """The images of one split."""
        part = self._open().get(split)
        if part is None:
            return None
        for argument in ("image_column", "label_column", "coarse_column"):
            _check_column(argument, getattr(self, argument), part)
        where = f"split {split} of {self.path}"
        labels, names = read_labels(part, self.label_column, where, required=split == "train")
        if labels is None:
            rank_zero_info(f"{where} has no labels and is left out")
            return None
        if split == "train":
            self._train_names = names
            if self.coarse_column is not None:
                self.coarse = _coarse_classes(part, self.coarse_column, labels, names, where)
        labels, names = _in_order_of(self._train_names or names, labels, names)
        counts = np.bincount(labels, minlength=len(names))
        rank_zero_info(f"{where}: {len(labels):,} images of {np.count_nonzero(counts):,} classes")
        images = part.select_columns([self.image_column]).with_format("arrow")
        _check_images(images, self.image_column)
        rows = np.arange(len(labels), dtype=np.int64)
        return HubImages(images, rows, torch.from_numpy(labels), names, self.preprocessing, where)


class SemiSupervisedHubPairDataModule(SemiSupervisedPairDataModule, HubPairDataModule):
    """A Hugging Face data set with hidden labels; arguments of both parents, by name."""


def open_splits(path: str | Path | Sequence[str], name: str | None = None, revision: str | None = None) -> Any:
    """Open a data set without reading its images.

    Args:
        path: As for :class:`HubPairDataModule`.
        name: Configuration.
        revision: Branch, tag or commit on the Hub.

    Returns:
        ``datasets.Dataset`` by the name of the split.

    Raises:
        FileNotFoundError: If it is not there.
        ImportError: If ``datasets`` is not installed.
        ValueError: If it cannot be read.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError(missing_extra(f"No module named '{error.name}'") or str(error)) from error
    patterns = [str(path)] if isinstance(path, str | Path) else [str(each) for each in path]
    local = Path(patterns[0]).expanduser()
    is_folder = len(patterns) == 1 and local.is_dir()
    if is_folder and revision is not None:
        raise ValueError(f"revision must be None for a local folder, got {revision!r}")
    if is_folder and any((local / file).is_file() for file in ("dataset_dict.json", "state.json")):
        found = _read(patterns[0], lambda: datasets.load_from_disk(str(local)))
        return dict(found) if isinstance(found, dict) else {"train": found}
    if is_folder and name is None and not (local / "README.md").is_file() and any(local.rglob("*.parquet")):
        patterns, is_folder = [str(Path(glob.escape(str(local)), "**", "*.parquet"))], False
    if is_folder:
        with _without_network(True):
            return dict(_read(patterns[0], lambda: datasets.load_dataset(str(local), name)))
    if len(patterns) > 1 or local.suffix or local.is_file() or glob.has_magic(patterns[0]):
        files = _parquet_files(patterns)
        if files or not _is_hub_name(patterns):
            _check_files(files, patterns)
            with _without_network(True):
                return {split: _read(patterns[0], partial(_parquet, names)) for split, names in files.items()}
    return _from_hub(patterns[0], name, revision)


def _parquet(files: list[str]) -> Any:
    """The files of one split. Other splits may number their classes differently, so each is opened on its own."""
    import datasets
    import pyarrow.parquet as pq

    features = {}
    for file in files:
        stored = (pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
        features[json.dumps(json.loads(stored).get("info", {}).get("features"), sort_keys=True)] = file
    if len(features) > 1:
        raise ValueError(
            f"the files of a split must have the same features, those of {name_list(features.values())} differ"
        )
    return datasets.load_dataset("parquet", data_files={"train": files}, split="train")


def _read(what: str, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # the library raises many exception types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{what!r} cannot be read as a data set: {reason}") from error


def _is_hub_name(patterns: list[str]) -> bool:
    name = patterns[0]
    return len(patterns) == 1 and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and ".parquet" not in name


def _parquet_files(patterns: list[str]) -> dict[str, list[str]]:
    """Parquet files by the split that their name, or their folder's, tells; "train" where none does."""
    expanded = [str(Path(each).expanduser()) for each in patterns]
    files = sorted({file for each in expanded for file in glob.glob(each, recursive=True) or [each]})
    files = [file for file in files if Path(file).is_file()]
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(_split_of(Path(file)) or "", []).append(file)
    if "" in found and len(found) > 1:
        raise ValueError(
            f"the split of each Parquet file must follow from its name, such as train-0.parquet, or from its folder's, "
            f"got {name_list(found[''])} beside files of {name_list(set(found) - {''})}"
        )
    return {name or "train": names for name, names in found.items()}


def _split_of(file: Path) -> str | None:
    words = [*re.split(r"[^a-z]+", file.stem.lower()), file.parent.name.lower()]
    uses = {known: use for use, names in NAMES.items() for known in names}
    return next((uses[word] for word in words if word in uses), None)


def _check_files(files: dict[str, list[str]], patterns: list[str]) -> None:
    if not files:
        raise FileNotFoundError(f"path must be a Hub name, a folder or Parquet files, no file found at {patterns}")
    for each in (file for names in files.values() for file in names):
        with open(each, "rb") as file:
            if file.read(4) != b"PAR1":
                raise ValueError(f"path must be a Hub name, a folder or Parquet files, got {each!r}")


def _from_hub(path: str, name: str | None, revision: str | None) -> dict[str, Any]:
    import datasets
    from huggingface_hub import constants

    if not _is_hub_name([path]):
        raise FileNotFoundError(f"path must be a Hub name, a folder or Parquet files, nothing found at {path!r}")
    forbidden = bool(constants.HF_HUB_OFFLINE)
    offline = forbidden or not hub_answers()
    try:
        with _without_network(offline):
            return dict(datasets.load_dataset(path, name, revision=revision))
    except Exception as error:  # the library raises many exception types
        if not offline:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(f"{path!r} cannot be loaded from the Hugging Face Hub: {reason}") from error
        why = "HF_HUB_OFFLINE is set" if forbidden else f"{constants.ENDPOINT} does not answer"
        raise FileNotFoundError(
            f"{path!r} is no folder or file here, is not in the cache {str(datasets.config.HF_DATASETS_CACHE)!r}, and "
            f"{why}: where there is network, run `hf download {path} --repo-type dataset --local-dir DIR`, then give "
            "the folder DIR as path"
        ) from error


def hub_answers(seconds: float = SECONDS_TO_ANSWER) -> bool:
    """Whether the Hugging Face Hub can be reached; the library itself tries for half a minute or more.

    Args:
        seconds: How long to wait for an answer, also of the name server.

    Returns:
        True if there was any answer.
    """
    from huggingface_hub import constants, get_session

    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))
        except Exception:  # no network, no name server, a proxy's refusal
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


@contextmanager
def _without_network(offline: bool) -> Iterator[None]:
    """Keep the libraries from trying the network, as the variable HF_HUB_OFFLINE does, which they read at import."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _by_use(found: Mapping[str, Any], splits: Mapping[str, str | None] | None, path: Any) -> dict[str, Any]:
    """The splits that were found, by their use.

    Raises:
        ValueError: If a split is not there, two have the same use, or none is for training.
    """
    if splits is not None:
        chosen = {use: name for use, name in splits.items() if name is not None}
        for use, name in chosen.items():
            if name not in found:
                raise ValueError(f"splits must name splits of {path}, which has {', '.join(found)}, got {use}: {name}")
    else:
        uses = {known: use for use, names in NAMES.items() for known in names}
        chosen = {}
        for name in found:
            likely = "train" if len(found) == 1 else uses.get(name.lower())
            if likely in chosen:
                raise ValueError(
                    f"splits must be given, since {chosen[likely]!r} and {name!r} of {path} are both {likely}"
                )
            if likely is not None:
                chosen[likely] = name
    if "train" not in chosen:
        raise ValueError(f"splits must give one split of {path} as train: it has {', '.join(found)}")
    return {use: found[name] for use, name in chosen.items()}


def _check_column(argument: str, column: str | None, part: Any) -> None:
    if column is None or column in part.column_names:
        return
    near = get_close_matches(column, part.column_names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument} must be one of {', '.join(part.column_names)}, got {column!r}{hint}")


def _check_images(images: Any, column: str) -> None:
    """Raise ValueError unless a column holds bytes, or bytes and a path."""
    import pyarrow.types as kinds

    kind = images[:0].column(0).type
    names = {kind.field(number).name for number in range(kind.num_fields)} if kinds.is_struct(kind) else set()
    if not (kinds.is_binary(kind) or kinds.is_large_binary(kind) or "bytes" in names):
        raise ValueError(f"image_column {column!r} must hold images or the bytes of image files, got {kind}")


def read_labels(
    part: Any, column: str, where: str, required: bool = True
) -> tuple[np.ndarray, list[str]] | tuple[None, list[str]]:
    """Class labels of a split.

    Args:
        part: ``datasets.Dataset``.
        column: ClassLabel, strings or integers.
        where: Name of the split, for messages.
        required: Whether a split without any label is an error.

    Returns:
        Class index of each row, int64 ``(N,)``, or None if there is no label at all; and the names of the classes that
        occur: those of a ClassLabel in its order, strings sorted, integers in their order.

    Raises:
        ValueError: If the column holds something else, or some rows have no label.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = part.select_columns([column]).with_format("arrow")[:].column(0)
    if isinstance(values.type, pa.DictionaryType):
        values = pc.cast(values, values.type.value_type)
    given = getattr(part.features[column], "names", None)  # of a ClassLabel, in which -1 is no label
    missing = pc.is_null(values).to_numpy(zero_copy_only=False)
    if given is not None:
        missing |= pc.fill_null(values, -1).to_numpy() < 0
    if missing.any():
        if missing.all() and not required:
            return None, []
        row = int(missing.argmax())
        raise ValueError(
            f"label_column {column!r} must hold a label in each row of {where}, "
            f"got none in {int(missing.sum()):,} rows, the first in row {row}"
        )
    kinds = pa.types
    if not (kinds.is_integer(values.type) or kinds.is_string(values.type) or kinds.is_large_string(values.type)):
        raise ValueError(
            f"label_column {column!r} must hold class labels (ClassLabel, strings or integers), got {values.type}"
        )
    names, labels = np.unique(values.to_numpy(), return_inverse=True)
    return labels.astype(np.int64), [str(name) if given is None else given[name] for name in names]


def _in_order_of(known: list[str], labels: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels as indices into `known`, followed by the names that it lacks."""
    ordered = known + [name for name in names if name not in set(known)]
    index = {name: number for number, name in enumerate(ordered)}
    return np.array([index[name] for name in names], dtype=np.int64)[labels], ordered


def _coarse_classes(
    part: Any, column: str, labels: np.ndarray, names: list[str], where: str
) -> dict[str, list[str]]:  # fmt: skip
    """Classes of each coarse class. Raises ValueError if a class is in two of them."""
    numbers, coarse = read_labels(part, column, where)
    assert numbers is not None
    pairs = np.unique(np.stack([labels, numbers], axis=1), axis=0)
    if len(pairs) > len(names):
        label = int(pairs[:, 0][1:][np.diff(pairs[:, 0]) == 0][0])
        both = [coarse[number] for number in pairs[pairs[:, 0] == label, 1]]
        raise ValueError(
            f"coarse_column {column!r} must hold one coarse class for each class, got {name_list(both)} for "
            f"{names[label]!r}"
        )
    return {name: [names[label] for label in pairs[pairs[:, 1] == number, 0]] for number, name in enumerate(coarse)}
