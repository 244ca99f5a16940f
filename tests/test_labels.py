import numpy as np
import pytest
import torch

from simo_lightning.data import (
    LabelledImages,
    Relabelled,
    SemiSupervisedTensorPairDataModule,
    TensorPairDataModule,
)
from simo_lightning.data.labels import coarse_index
from simo_lightning.data.sources import stratified_labelled

NAMES = ["ant", "bee", "cat", "dog"]
COARSE = {"insect": ["bee", "ant"], "mammal": ["cat", "dog"]}


def numbered(count=80, classes=4):
    """Each image's pixels are its own number."""
    images = torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    return LabelledImages(images, torch.arange(count) % classes, NAMES[:classes])


def ready(**arguments):
    given = {"classes_per_batch": 4, "samples_per_class": 2, "augment": None, "mean": [0.0], "std": [1 / 255]}
    kind = SemiSupervisedTensorPairDataModule if "label_fraction" in arguments else TensorPairDataModule
    data = kind(train=numbered(), **given | arguments)
    data.setup("fit")
    return data


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 1.0])
def test_the_same_share_of_every_class_is_labelled(fraction):
    labels = torch.tensor([0] * 40 + [2] * 20 + [1] * 60)
    mask = stratified_labelled(labels, NAMES[:3], fraction, seed=3)
    expected = [round(count * fraction) for count in (40, 60, 20)]
    assert labels[mask].bincount().tolist() == expected
    assert torch.equal(mask, stratified_labelled(labels, NAMES[:3], fraction, seed=3))
    more = stratified_labelled(labels, NAMES[:3], min(1.0, fraction * 2), seed=3)
    assert (more | ~mask).all()  # those of a smaller share are among those of a larger
    if fraction < 1:
        assert not torch.equal(mask, stratified_labelled(labels, NAMES[:3], fraction, seed=4))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_a_label_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(ValueError, match=r"label_fraction must lie in \(0, 1\], got"):
        stratified_labelled(torch.tensor([0, 1]), NAMES[:2], fraction, seed=0)
    with pytest.raises(ValueError, match=r"label_fraction must lie in \(0, 1\], got"):
        SemiSupervisedTensorPairDataModule(train=numbered(), label_fraction=fraction, views=2)


def test_a_class_without_a_label_is_named():
    labels = torch.tensor([0] * 100 + [1] * 4)
    with pytest.raises(ValueError, match=r"at least one labelled image, got 0.1 for 'bee \(4 images\)'"):
        stratified_labelled(labels, NAMES[:2], 0.1, seed=0)
    with pytest.raises(ValueError, match=r"smallest class.*'ant' has 2 labelled images, got 3"):
        ready(label_fraction=0.1, views=2, samples_per_class=3, val_fraction=0, small_classes="error")


def test_hidden_images_have_labels_of_their_own_and_the_bank_is_labelled():
    source = numbered()
    data = ready(label_fraction=0.25, views=2, val_fraction=0, split_seed=1)
    labelled = stratified_labelled(source.labels, NAMES, 0.25, seed=1)
    seen = {}
    for images, labels, _ in data.train_dataloader():
        seen |= dict(zip(numbers(images), labels.tolist(), strict=True))
    assert sum(not labelled[number] for number in seen) == 56  # 60 hidden, 8 in each of 7 batches
    for number, label in seen.items():
        assert label == (source.labels[number] if labelled[number] else 4 + number)
    bank = [torch.cat(parts) for parts in zip(*data.bank_dataloader(), strict=True)]
    assert numbers(bank[0]) == labelled.nonzero().flatten().tolist()
    assert torch.equal(bank[1], source.labels[labelled])


def test_every_label_known_is_the_supervised_data_module():
    batches = [list(ready(**more).train_dataloader()) for more in ({}, {"label_fraction": 1.0})]
    assert all(torch.equal(ours.images, plain.images) for plain, ours in zip(*batches, strict=True))
    assert all(torch.equal(ours.labels, plain.labels) for plain, ours in zip(*batches, strict=True))


def test_coarse_classes_train_and_true_ones_judge():
    data = ready(coarse=COARSE, classes_per_batch=2, samples_per_class=8, val_fraction=0.25)
    assert (data.train_class_names, data.class_names, data.num_classes) == (["insect", "mammal"], NAMES, 4)
    seen = set()
    for images, labels, _ in data.train_dataloader():
        assert labels.bincount().tolist() == [8, 8]
        assert labels.tolist() == [number % 4 // 2 for number in numbers(images)]
        seen |= {number % 4 for number in numbers(images)}
    assert seen == {0, 1, 2, 3}
    for loader in (data.val_dataloader(), data.bank_dataloader(), data.bank_dataloader(limit=12)):
        for images, labels in loader:
            assert labels.tolist() == [number % 4 for number in numbers(images)]


def test_coarse_labels_can_be_hidden_too():
    data = ready(
        coarse=COARSE, label_fraction=0.2, views=2, classes_per_batch=2, val_fraction=0, unlabelled_per_batch=4
    )
    labels = torch.cat([batch.labels for batch in data.train_dataloader()]).unique()
    assert {0, 1} < set(labels.tolist())
    assert not {2, 3} & set(labels.tolist())  # outside of the true classes, not only of the coarse ones
    bank = torch.cat([labels for _, labels in data.bank_dataloader()])
    assert len(bank) == 16
    assert set(bank.tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    "coarse, message",
    [
        ({"a": ["ant", "bee"], "b": ["cat"]}, "got missing: 'dog'"),
        ({"a": ["ant", "bee"], "b": ["cat", "dog", "cow"]}, "got unknown: 'cow'"),
        ({"a": ["ant", "bee"], "b": ["cat", "dog", "ant"]}, "got repeated: 'ant'"),
        ({"a": NAMES, "b": []}, "got empty: 'b'"),
        ({"a": ["ant", "eel"], "b": ["cat", "cat"]}, "unknown: 'eel'; missing: 'bee', 'dog'; repeated: 'cat'"),
        ({"a": NAMES}, "at least 2 coarse classes, got 1"),
    ],
)
def test_coarse_is_a_partition(coarse, message):
    with pytest.raises(ValueError, match=message):
        coarse_index(NAMES, coarse)
    with pytest.raises(ValueError, match=message):
        ready(coarse=coarse)


def test_too_many_coarse_classes_in_a_batch():
    with pytest.raises(ValueError, match=r"classes_per_batch must lie in 1..2"):
        ready(coarse=COARSE).train_dataloader()


def test_relabelled_subset_and_errors():
    source = numbered(8)
    other = Relabelled(source, torch.arange(8) + 100, ["a", "b"]).subset(torch.tensor([6, 1]))
    images, labels = other.__getitems__(np.array([1, 0]))
    assert (numbers(images), labels.tolist(), len(other)) == ([1, 6], [101, 106], 2)
    with pytest.raises(ValueError, match=r"labels must be int64 \(8,\) to match the images, got torch.int64 \(7,\)"):
        Relabelled(source, torch.arange(7), [])
    with pytest.raises(ValueError, match="labels must be non-negative, got -1"):
        Relabelled(source, torch.arange(8) - 1, [])
