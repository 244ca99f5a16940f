"""Images of a task: a data set, and what the task changes about its training images."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simo_lightning.data import LabelledImages, load_image_folder
from simo_lightning.data.sources import stratified_split

SPLIT_SEED = 0  # of validation images, unseen classes, wrong labels and the long tail: the same in every run


class TaskImages(NamedTuple):
    """Images of one size.

    Attributes:
        train: Training images with the labels that the loss sees, numbered 0..C-1.
        bank_labels: Labels of the training images for the judgement, in the numbering of ``val`` and ``test``.
        val: Validation images, for the choice of settings alone.
        test: Test images.
        unseen: Test images of classes without training images; None where there are none.
    """

    train: LabelledImages
    bank_labels: Tensor
    val: LabelledImages
    test: LabelledImages
    unseen: LabelledImages | None = None


def load(folder: Path, about: dict[str, Any]) -> TaskImages:
    """The closed set of a data set in class folders ``train`` and ``test``, and ``val`` where there is no
    ``val_fraction``.
    """
    names = load_image_folder(folder / "train", about["image_size"], workers=1).class_names
    splits = {}
    share = about["val_fraction"]
    for name in ("train", "val", "test") if share is None else ("train", "test"):
        found = load_image_folder(folder / name, about["image_size"], workers=1)
        assert isinstance(found, LabelledImages)  # of less than 4 GiB
        number = torch.tensor([names.index(each) for each in found.class_names])  # a split may lack a class
        splits[name] = LabelledImages(found.images, number[found.labels], names)
    train = splits["train"]
    if share is None:
        return TaskImages(train, train.labels, splits["val"], splits["test"])
    stay, held = stratified_split(train.labels, share, SPLIT_SEED)
    train, val = train.subset(stay), train.subset(held)
    return TaskImages(train, train.labels, val, splits["test"])


def make(task: str, folder: Path, about: dict[str, Any], given: dict[str, Any]) -> TaskImages:
    """The images of a task of ``tasks.yaml``.

    Args:
        task: Its name.
        folder: Of the data set.
        about: The data set's entry.
        given: The task's entry.
    """
    closed = load(folder, about)
    if task == "unseen":
        return _unseen(closed, given["classes"])
    if task == "coarse":
        return _relabelled(closed, coarse_labels(closed.train.class_names, about["coarse"], folder))
    if task == "tail":
        return _chosen(closed, tail(closed.train.labels, given["factor"]))
    if task.startswith("wrong"):
        labels = wrong_labels(closed.train.labels, len(closed.train.class_names), given["wrong"])
        train = LabelledImages(closed.train.images, labels, closed.train.class_names)
        return closed._replace(train=train, bank_labels=labels)
    limit = given.get("images_per_class")
    if limit is not None:
        closed = _chosen(closed, _first(closed.train.labels, limit))
    if given.get("number_of_classes") is not None:
        order = torch.randperm(len(closed.train.class_names), generator=_generator())
        closed = _of_classes(closed, order[: given["number_of_classes"]].sort().values)
    return closed


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SPLIT_SEED)


def _first(labels: Tensor, limit: int) -> Tensor:
    """Indices of at most ``limit`` images of each class, at random."""
    order = torch.randperm(len(labels), generator=_generator())
    rank = torch.nn.functional.one_hot(labels[order]).cumsum(0).gather(1, labels[order, None])[:, 0]  # 1, 2, ...
    return order[rank <= limit].sort().values


def _chosen(images: TaskImages, index: Tensor) -> TaskImages:
    """With these training images alone."""
    return images._replace(train=images.train.subset(index), bank_labels=images.bank_labels[index])


def _only(images: LabelledImages, classes: Tensor) -> LabelledImages:
    """Images of these classes, renumbered in their order."""
    number = torch.full((len(images.class_names),), -1).scatter(0, classes, torch.arange(len(classes)))
    index = (number[images.labels] >= 0).nonzero().flatten()
    names = [images.class_names[each] for each in classes.tolist()]
    return LabelledImages(images.images[index], number[images.labels[index]], names)


def _of_classes(images: TaskImages, classes: Tensor) -> TaskImages:
    train = _only(images.train, classes)
    return TaskImages(train, train.labels, _only(images.val, classes), _only(images.test, classes))


def _unseen(closed: TaskImages, share: float) -> TaskImages:
    """Training, validation and test images of a part of the classes, and test images of the others."""
    count = len(closed.train.class_names)
    order = torch.randperm(count, generator=_generator())
    held, seen = order[: int(share * count)].sort().values, order[int(share * count) :].sort().values
    return _of_classes(closed, seen)._replace(unseen=_only(closed.test, held))


def coarse_labels(names: list[str], coarse: dict[str, list[str]] | str, folder: Path) -> Tensor:
    """Number of the coarse class of each class; a class is named in full, or by its name up to the first underscore."""
    if isinstance(coarse, str):
        with (folder / coarse).open(newline="") as file:
            of = {row[0]: row[1] for row in csv.reader(file)}
    else:
        of = {name: group for group, members in coarse.items() for name in members}
    groups = [of.get(name, of.get(name.split("_")[0])) for name in names]
    missing = [name for name, group in zip(names, groups, strict=True) if group is None]
    if missing:
        raise ValueError(f"coarse must name every class, got none for {', '.join(missing[:5])}")
    number = {group: index for index, group in enumerate(sorted(map(str, set(groups))))}
    return torch.tensor([number[str(group)] for group in groups])


def _relabelled(closed: TaskImages, coarse: Tensor) -> TaskImages:
    """Trained on coarse classes, judged on the true ones."""
    names = [str(number) for number in range(int(coarse.max()) + 1)]
    return closed._replace(train=LabelledImages(closed.train.images, coarse[closed.train.labels], names))


def tail(labels: Tensor, factor: float) -> Tensor:
    """Indices of a part in which the sizes of the classes fall exponentially, in random order, to 1 / factor."""
    counts = torch.bincount(labels)
    rank = torch.randperm(len(counts), generator=_generator())  # 0 is the largest class
    share = factor ** (-rank / (len(counts) - 1))
    limit = (counts * share).round().long().clamp(min=2)
    order = torch.randperm(len(labels), generator=_generator())
    place = torch.nn.functional.one_hot(labels[order]).cumsum(0).gather(1, labels[order, None])[:, 0]
    return order[place <= limit[labels[order]]].sort().values


def wrong_labels(labels: Tensor, num_classes: int, share: float) -> Tensor:
    """Labels of which this share of every class is another class, each equally likely."""
    _, chosen = stratified_split(labels, share, SPLIT_SEED)
    other = torch.randint(1, num_classes, (len(chosen),), generator=_generator())
    changed = labels.clone()
    changed[chosen] = (labels[chosen] + other) % num_classes
    return changed
