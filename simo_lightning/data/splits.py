"""Splits of a data set by class: whole classes held out for validation and test."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from simo_lightning.data.labels import index_by_name, present_classes
from simo_lightning.data.sources import ImageSource, join_images, name_list, stratified_split


@dataclass(frozen=True)
class UnseenSplits:
    """Splits of a data set after whole classes have been held out.

    Args:
        train: Training images of the classes that are seen.
        val: Images of unseen classes, or held-out images of the seen ones if no unseen class is for validation; None:
            there are none.
        test: The same for test.
        known_val: Held-out images of seen classes for questions of validation about known and unknown images, where
            ``val`` has unseen classes; None: there are none.
        known_test: The same for test.
        unseen: Names of all classes that training lacks.
    """

    train: ImageSource
    val: ImageSource | None
    test: ImageSource | None
    known_val: ImageSource | None
    known_test: ImageSource | None
    unseen: list[str]


def draw_unseen_classes(
    unseen: int | float | list[str] | str, class_names: Sequence[str], all_names: Collection[str], seed: int
) -> list[str]:
    """Names of the classes to hold out.

    Args:
        unseen: Their number; or their share of ``class_names``, in (0, 1), rounded down, at least one; or their names;
            or a text file with one name per line.
        class_names: Classes of training, of which a number or a share is drawn.
        all_names: Classes of all splits, which may be named.
        seed: Non-negative; the draw depends only on it and on ``class_names``.

    Returns:
        The names, each once, in an order drawn by ``seed``.

    Raises:
        ValueError: If a number or share is out of range, a name is unknown or repeated, or fewer than two classes are
            left to train on.
        FileNotFoundError: If there is no such file.

    Example:
        >>> classes = ["ant", "bee", "cat", "dog"]
        >>> sorted(draw_unseen_classes(["dog", "ant"], classes, classes, seed=0))
        ['ant', 'dog']
    """
    named = _read_names(unseen) if isinstance(unseen, str) else unseen
    if isinstance(named, list):
        wrong = {name for name in named if name not in all_names or named.count(name) > 1}
        if wrong or not named:
            raise ValueError(
                "unseen_classes must name classes of the data set, each once, got "
                + (f"unknown or repeated: {name_list(wrong)}" if wrong else "none")
            )
        names, number = sorted(named), len(named)
    else:
        names, number = sorted(class_names), _number_unseen(named, len(class_names))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    drawn = [names[place] for place in order[:number].tolist()]
    left = len(set(class_names) - set(drawn))
    if left < 2:
        raise ValueError(f"unseen_classes must leave at least 2 classes to train on, but leaves {left}")
    return drawn


def _number_unseen(unseen: int | float, classes: int) -> int:
    if isinstance(unseen, bool) or not (unseen >= 1 if isinstance(unseen, int) else 0 < unseen < 1):
        raise ValueError(f"unseen_classes must be a number of at least 1 or a share in (0, 1), got {unseen!r}")
    return unseen if isinstance(unseen, int) else max(1, int(unseen * classes + 1e-9))


def _read_names(path: str) -> list[str]:
    """The lines of a text file that are not blank; FileNotFoundError if there is no such file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"unseen_classes must be a number, a share, a list of names or a text file with one name per line, got "
            f"{path!r}, which is not a file"
        )
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"unseen_classes file {path!r} must be UTF-8 text with one name per line: {error}") from error


def hold_out_classes(
    train: ImageSource,
    val: ImageSource | None,
    test: ImageSource | None,
    drawn: Sequence[str],
    val_share: float,
    val_fraction: float,
    seed: int,
) -> UnseenSplits:
    """Hold out whole classes for validation and test, with their images of all splits.

    The first ``val_share`` of ``drawn`` (rounded down) are for validation, the others for test, where the classes that
    training lacks anyway join them. A split that gets no unseen class keeps its images of the other classes.

    Args:
        train: Training images.
        val: Validation images of the data set; None: none.
        test: Test images of the data set; None: none.
        drawn: Classes to hold out, in the order of the draw.
        val_share: Share of them for validation, in [0, 1].
        val_fraction: Share of the training images of each seen class that is held out if the data set has no validation
            images of seen classes, in [0, 1).
        seed: Of that draw.

    Returns:
        The splits. No class of ``train`` is in a split of unseen classes, and no class is in two of these.
    """
    splits = {"train": train, "val": val, "test": test}
    given = {name: source for name, source in splits.items() if source is not None}
    names = list(dict.fromkeys(name for source in given.values() for name in present_classes(source)))
    for_val = list(drawn[: int(len(drawn) * val_share + 1e-9)])
    for_test = list(drawn[len(for_val) :])
    seen = [name for name in present_classes(train) if name not in set(drawn)]
    lacking = [name for name in names if name not in {*seen, *drawn}]
    order = seen + for_val + for_test + lacking
    sources = {split: index_by_name(source, order) for split, source in given.items()}

    def images(splits: Sequence[str], classes: Collection[str]) -> ImageSource | None:
        return _of_classes([sources[split] for split in splits if split in sources], classes, order)

    kept, seen_val, seen_test = (images([split], seen) for split in ("train", "val", "test"))
    assert kept is not None
    if seen_val is None and val_fraction > 0:
        stays, held = stratified_split(kept.labels, val_fraction, seed)
        kept, seen_val = kept.subset(stays), kept.subset(held)
    everywhere = ("train", "val", "test")
    return UnseenSplits(
        train=index_by_name(kept, seen),
        val=images(everywhere, for_val) if for_val else seen_val,
        test=images(everywhere, for_test + lacking) if for_test else images(["test"], seen + lacking),
        known_val=seen_val if for_val else None,
        known_test=(seen_test or seen_val) if for_test else None,
        unseen=for_val + for_test + lacking,
    )


def _of_classes(sources: Sequence[ImageSource], names: Collection[str], order: list[str]) -> ImageSource | None:
    """The images of the classes in ``names``, joined; None if there are none. All labels index ``order``."""
    wanted = torch.tensor([name in set(names) for name in order])
    parts = []
    for source in sources:
        chosen = wanted[source.labels].nonzero().flatten()
        if len(chosen):
            parts.append(source.subset(chosen))
    return join_images(parts, order) if parts else None
