import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from simo_lightning.data import (
    BatchAugment,
    DigitsPairDataModule,
    FolderImages,
    ImageFolderPairDataModule,
    LabelledImages,
    PairDataModule,
    TensorPairDataModule,
)
from tests.bounds import assert_float32_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 under torch 2.15
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def noise(count=40, classes=4, size=8, seed=0):
    images = torch.randint(
        256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return LabelledImages(images, torch.arange(count) % classes, [f"class {label}" for label in range(classes)])


def small(train=None, **arguments):
    arguments = {"classes_per_batch": 4, "samples_per_class": 2} | arguments
    return TensorPairDataModule(noise() if train is None else train, **arguments)


def ready(data, stage="fit"):
    data.setup(stage)
    return data


def trainer(**arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 1} | quiet | arguments)


class Look(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = {"training": [], "validation": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.batches["training"].append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.batches["validation"].append(batch)

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images_of(loader):
    return torch.cat([images for images, _ in loader])


def rows(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_splits_are_stratified_and_do_not_depend_on_the_seed():
    data = ready(small(val_fraction=0.2))
    train, val = data.bank_dataloader(), data.val_dataloader()
    assert torch.cat([labels for _, labels in val]).bincount().tolist() == [2] * 4
    assert rows(torch.cat([images_of(train), images_of(val)])) == rows(noise().images)
    assert torch.equal(images_of(ready(small(val_fraction=0.2, seed=9)).val_dataloader()), images_of(val))
    other = ready(small(val_fraction=0.2, split_seed=9)).val_dataloader()
    assert not torch.equal(images_of(other), images_of(val))


def test_training_batches_have_views_side_by_side():
    model, data = Look(), small(views=3, val_fraction=0.2, augment=BatchAugment(crop_padding=2))
    trainer(limit_val_batches=0).fit(model, data)
    for images, labels in model.batches["training"]:
        assert images.shape == (4 * 2 * 3, 3, 8, 8)
        assert images.dtype == torch.float32
        assert labels.bincount().tolist() == [6] * 4
        assert (labels.view(-1, 3) == labels.view(-1, 3)[:, :1]).all()
        views = images.view(8, 3, -1)
        assert (views[:, 0] != views[:, 1]).any()


def test_without_augmentation_a_batch_is_the_normalised_images():
    data = noise()
    model = Look()
    trainer().fit(model, small(data, augment=None, val_fraction=0.2, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]))
    images = torch.cat([images for images, _ in model.batches["training"]])
    scale = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1)
    back = ((images * scale[1] + scale[0]) * 255).round().to(torch.uint8)
    assert len(back) == 32
    assert set(rows(back)) < set(rows(data.images))
    assert len(set(rows(back))) == 32


def test_statistics_are_those_of_the_training_split():
    data = ready(small(val_fraction=0.2))
    images, labels = data.prepare((images_of(data.bank_dataloader()), torch.zeros(32)), augment=False)
    raw = images_of(data.bank_dataloader())
    exact, plain = (
        (raw.to(dtype) / 255 - torch.tensor(data.mean, dtype=dtype).view(-1, 1, 1))
        / torch.tensor(data.std, dtype=dtype).view(-1, 1, 1)
        for dtype in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(exact.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(exact.var((0, 2, 3), unbiased=False), torch.ones(3).double(), atol=1e-12, rtol=0)
    assert_float32_error(images, plain, exact, factor=4)
    assert images.dtype == torch.float32
    assert len(labels) == 32


def test_evaluation_only_normalises():
    test = noise(seed=5)
    model, data = Look(), small(test=test, val_fraction=0.2, views=2, eval_batch_size=16)
    runner = trainer()
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    expected = data.prepare((test.images, test.labels), augment=False)
    for part in (0, 1):
        assert torch.equal(torch.cat([batch[part] for batch in model.batches["test"]]), expected[part])
    predicted = runner.predict(model, data)
    assert torch.equal(torch.cat([images for images, _ in predicted]), expected[0])
    assert model.batches["validation"][-1][0].shape == (8, 3, 8, 8)


def test_predict_takes_validation_where_there_is_no_test():
    data = ready(small(val_fraction=0.2), "predict")
    assert torch.equal(images_of(data.predict_dataloader()), images_of(data.val_dataloader()))
    with pytest.raises(ValueError, match="TensorPairDataModule has no test split"):
        data.test_dataloader()


def test_no_validation():
    model, data = Look(), small(val_fraction=0)
    trainer().fit(model, data)
    assert len(model.batches["training"]) == 5
    assert model.batches["validation"] == []


def test_the_draws_depend_on_seed_epoch_and_batch_alone():
    runs = []
    for seed, torch_seed in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(torch_seed)
        model = Look()
        trainer(max_epochs=2, limit_val_batches=0).fit(model, small(seed=seed, views=2))
        runs.append(torch.stack([images for images, _ in model.batches["training"]]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    generators = set()
    data = ready(small(noise(80)))
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            generators.add(batch.draw)
    assert len(generators) == 3 * len(loader)


def test_bank():
    data = ready(small(noise(100), val_fraction=0, eval_batch_size=7))
    whole = images_of(data.bank_dataloader())
    assert torch.equal(whole, noise(100).images)
    part = data.bank_dataloader(limit=22)
    assert torch.equal(images_of(part), images_of(data.bank_dataloader(limit=22)))
    assert sorted(torch.cat([labels for _, labels in part]).bincount().tolist()) == [5, 5, 6, 6]
    shares = [images_of(data.bank_dataloader(22, rank, 4)) for rank in range(4)]
    assert rows(torch.cat(shares)) == rows(images_of(part))
    assert rows(images_of(data.bank_dataloader(limit=1000))) == rows(whole)


def test_setup_reads_once():
    class Counted(PairDataModule):
        read = ()

        def load(self, split):
            self.read += (split,)
            return noise() if split == "train" else None

    data = Counted(classes_per_batch=2, samples_per_class=2)
    for stage in ("fit", "validate", "test", "test", "predict", "fit"):
        data.setup(stage)
    assert data.read == ("train", "val", "test")
    assert (data.class_names, data.num_classes) == ([f"class {label}" for label in range(4)], 4)
    prepared = Counted(classes_per_batch=2, samples_per_class=2)
    prepared.prepare_data()
    prepared.setup()
    assert prepared.read == ("train", "val", "test")


def test_digits():
    data = ready(DigitsPairDataModule(samples_per_class=4), "test")
    images, labels = data.prepare(next(iter(data.train_dataloader())), augment=True)
    assert images.shape == (40, 1, 8, 8)
    assert labels.bincount().tolist() == [4] * 10
    assert len(images_of(data.test_dataloader())) == 359
    assert data.augment == BatchAugment(crop_padding=1, flip=0)


def write(root, classes, count=6, size=8):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            random = np.random.default_rng([label, number])
            Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                root / name / f"{number}.png"
            )


FOLDER = {"image_size": 8, "classes_per_batch": 2, "samples_per_class": 2}


def test_folder_with_splits(tmp_path):
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        write(tmp_path / split, ["ant", "bee"], count)
    data = ready(ImageFolderPairDataModule(str(tmp_path), **FOLDER), "test")
    loaders = (data.bank_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(images_of(loader)) for loader in loaders] == [12, 6, 8]


def test_folder_of_class_folders_left_on_disk(tmp_path):
    write(tmp_path, ["ant", "bee", "test"])  # a class may have a split's name where there is no train/
    data = ImageFolderPairDataModule(str(tmp_path), max_memory_gib=0, num_workers=2, val_fraction=0.3, **FOLDER)
    model = Look()
    trainer().fit(model, data)
    assert isinstance(data._splits["train"], FolderImages)
    assert data.class_names == ["ant", "bee", "test"]
    assert len(model.batches["training"]) == 3
    with pytest.raises(ValueError, match="no test split"):
        ready(data, "test").test_dataloader()


def labels_of(loader):
    return torch.cat([labels for _, labels in loader])


def test_splits_with_other_classes_are_matched_by_name(tmp_path):
    for split, names in (("train", ["bee", "cow"]), ("val", ["cow", "dab"]), ("test", ["ant", "bee", "eel"])):
        write(tmp_path / split, names, count=4)
    data = ready(ImageFolderPairDataModule(str(tmp_path), **FOLDER))
    assert (data.class_names, data.num_classes, data.unseen_class_names) == (["bee", "cow", "dab"], 3, ["dab"])
    assert labels_of(data.val_dataloader()).tolist() == [1] * 4 + [2] * 4
    data.setup("test")
    assert (data.class_names, data.num_classes) == (["bee", "cow", "dab", "ant", "eel"], 5)
    assert (data.train_class_names, data.num_train_classes) == (["bee", "cow"], 2)
    assert data.unseen_class_names == ["dab", "ant", "eel"]
    assert labels_of(data.test_dataloader()).tolist() == [3] * 4 + [0] * 4 + [4] * 4
    assert labels_of(data.bank_dataloader()).tolist() == [0] * 4 + [1] * 4


def test_the_smallest_class_is_named():
    data = noise().subset(torch.tensor([*range(0, 40, 2), 1, 5, 9, 3, 7, 11, 15]))
    with pytest.raises(ValueError, match=r"smallest class of the training split: 'class 1' has 3 images, got 4"):
        small(data, samples_per_class=4, val_fraction=0, small_classes="error").setup("fit")
    with pytest.raises(ValueError, match=r"classes_per_batch must lie in 1..4"):
        ready(small(classes_per_batch=5)).train_dataloader()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be non-negative, got -1"),
        ({"mean": [0.5]}, r"both or neither, got \[0.5\] and None"),
        ({"mean": [0.5], "std": [0.0]}, r"std must be positive, got \[0.0\]"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_memory_gib": -1.0}, "max_memory_gib must be non-negative, got -1.0"),
        ({"max_memory_gib": float("nan")}, "max_memory_gib must be non-negative, got nan"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"background": "whitish"}, "background must be a colour's name or #rrggbb, got 'whitish'"),
    ],
)
def test_folder_arguments_are_checked_before_a_file_is_read(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderPairDataModule(tmp_path, **arguments)


def test_only_the_draw_in_the_batch_decides_the_augmentation():
    data = ready(small(views=2))
    first, second, *_ = data.train_dataloader()
    assert first.draw != second.draw
    once = data.prepare(first, augment=True)[0]
    assert torch.equal(data.prepare(first, augment=True)[0], once)  # whatever the loader returned since
    assert torch.equal(data.prepare(tuple(first), augment=True)[0], once)
    assert not torch.equal(data.prepare(first._replace(draw=second.draw), augment=True)[0], once)
    assert torch.equal(data.prepare(first, augment=False)[0], data.prepare(first[:2], augment=False)[0])
    with pytest.raises(ValueError, match=r"batch must be \(images, labels, draw\) to be augmented"):
        data.prepare(first[:2], augment=True)


def test_errors_of_use():
    with pytest.raises(RuntimeError, match=r"setup\(\) must run before a loader"):
        small().train_dataloader()
    with pytest.raises(NotImplementedError, match=r"PairDataModule must define load\(split\)"):
        PairDataModule().setup("fit")
    with pytest.raises(RuntimeError, match=r"setup\(\) must run before a batch is prepared"):
        small(mean=[0.5] * 3, std=[0.5] * 3).prepare((noise().images, noise().labels), augment=False)
    with pytest.raises(ValueError, match="mean must have one value for each of 3 channels"):
        ready(small(mean=[0.5], std=[0.5]))


def test_overfit_batches_is_an_error_that_names_the_alternative():
    with pytest.raises(ValueError, match="use limit_train_batches instead"):
        trainer(overfit_batches=2).fit(Look(), small())
