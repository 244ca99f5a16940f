"""Pictures augmented one by one in the workers: draws, results of callables, data modules, resumed fits."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision.transforms import v2

from simo_lightning.data import (
    AugmentedPictures,
    BatchAugment,
    ClassBalancedSampler,
    DecodedFiles,
    DrawnIndices,
    FolderImages,
    ImageFolderPairDataModule,
    LabelledImages,
    PhotoAugment,
    Relabelled,
    ResumableLoader,
    TensorPairDataModule,
    load_image_folder,
    whole_picture,
)
from simo_lightning.data.loader import default_workers
from simo_lightning.data.pictures import check_augment, seed_all
from simo_lightning.data.sources import in_memory, join_images
from simo_lightning.preprocessing import Preprocessing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 under torch 2.15
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
SIZE = 24
MODEL = Preprocessing(SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 JPEG files of 4 classes, 60 x 40 pixels."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(40):
        (root / f"class {number % 4}").mkdir(exist_ok=True)
        colours = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((60, 40), Image.Resampling.BICUBIC)
        picture.save(root / f"class {number % 4}" / f"{number:02}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def photos(folder):
    return load_image_folder(folder, SIZE)


def gradient(count=6, size=16, channels=3):
    """Each row counts in steps of 8, from the number of the image on."""
    numbers = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = torch.arange(size, dtype=torch.uint8).mul(8).expand(count, channels, size, size) + numbers
    return LabelledImages(images, torch.arange(count) % 2, ["a", "b"])


class Draws:
    """Draws one number from each of the global generators, and shows them as the colour of a picture."""

    def __call__(self, picture):
        colour = (int(torch.randint(256, ())), np.random.randint(256), random.randrange(256))  # noqa: NPY002
        return Image.new("RGB", picture.size, colour)


def colours(images):
    return [tuple(colour) for colour in images[..., 0, 0].flatten(0, -2).tolist()]


# ---- draws


@pytest.mark.parametrize("augment", [Draws(), PhotoAugment(policy="trivial", brightness=0.5)])
def test_a_view_depends_on_draw_place_and_view_alone(photos, augment):
    pictures = AugmentedPictures(photos, augment, MODEL, views=3)
    images, labels = pictures.__getitems__(DrawnIndices([5, 5, 7, 9], draw=1))
    assert (images.shape, images.dtype) == ((4, 3, 3, SIZE, SIZE), torch.uint8)
    assert torch.equal(labels, photos.labels[torch.tensor([5, 5, 7, 9])])
    assert torch.equal(pictures.__getitems__(DrawnIndices([5, 5, 7, 9], draw=1))[0], images)
    assert torch.equal(pictures.__getitems__(DrawnIndices([5, 5, 8, 9], draw=1))[0][[0, 1, 3]], images[[0, 1, 3]])
    assert len(images[:2].flatten(0, 1).unique(dim=0)) == 6  # one picture twice, three views each
    assert not torch.equal(pictures.__getitems__(DrawnIndices([5, 5, 7, 9], draw=2))[0], images)


def test_the_seeds_are_those_of_seed_sequence():
    drawn = AugmentedPictures(gradient(), Draws(), MODEL, views=2).__getitems__(DrawnIndices([0, 1], draw=7))[0]
    expected = []
    for seed in np.random.SeedSequence(7).generate_state(4, np.uint64):
        torch.manual_seed(int(seed) // 2)
        state = np.random.RandomState(int(seed) // 2 % 2**32)
        expected.append((int(torch.randint(256, ())), state.randint(256), random.Random(int(seed) // 2).randrange(256)))
    assert colours(drawn) == expected


def test_the_global_generators_go_on_as_if_nothing_was_drawn(photos):
    draws = [Draws()(Image.new("RGB", (1, 1))).getpixel((0, 0)) for _ in range(2) if not seed_all(3)]
    seed_all(3)
    for augment in (Draws(), PhotoAugment()):
        AugmentedPictures(photos, augment, MODEL).__getitems__(DrawnIndices([0, 1], draw=4))
    assert draws == [Draws()(Image.new("RGB", (1, 1))).getpixel((0, 0))] * 2


def loader(source, workers=0, rank=0, world_size=1, augment=None, **arguments):
    sampler = ClassBalancedSampler(source.labels, 4, 2, 3, rank, world_size)
    pictures = AugmentedPictures(source, augment or Draws(), MODEL, views=2)
    return ResumableLoader(pictures, sampler, num_workers=workers, persistent_workers=workers > 0, **arguments)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [(colours(batch.images), batch.labels.tolist(), batch.draw) for batch in loader]


def test_batches_do_not_depend_on_workers_and_ranks_deal_those_of_one_process(photos):
    alone, workers = loader(photos), loader(photos, workers=2)
    for epoch in (0, 1):
        expected = epoch_of(alone, epoch)
        assert len(expected) == 5
        assert epoch_of(workers, epoch) == expected
        shares = [epoch_of(loader(photos, rank=rank, world_size=2), epoch) for rank in (0, 1)]
        assert [batch for pair in zip(*shares, strict=True) for batch in pair] == expected[:4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_draws_the_same(photos, workers):
    whole, first = epoch_of(loader(photos), 2), loader(photos, workers)
    first.sampler.set_epoch(2)
    batches = iter(first)
    for _ in range(2):
        next(batches)
    resumed = loader(photos, workers)
    resumed.load_state_dict(first.state_dict())
    assert epoch_of(resumed, 2) == whole[2:]


def test_the_indices_keep_their_draw_between_processes():
    import pickle

    again = pickle.loads(pickle.dumps(DrawnIndices([3, 1], draw=5)))
    assert (again, again.draw) == ([3, 1], 5)


def test_the_sampler_decides_the_batches(photos):
    sampler = ClassBalancedSampler(photos.labels, 4, 2)
    made = ResumableLoader(photos, sampler)
    assert made.sampler is made.batch_sampler.sampler is sampler
    assert (made.batch_sampler.batch_size, len(made)) == (8, 5)
    with pytest.raises(ValueError, match="batch_sampler option is mutually exclusive with"):
        ResumableLoader(photos, sampler, shuffle=True)


# ---- results of callables


def one(augment, preprocessing=MODEL, source=None):
    pictures = AugmentedPictures(source or gradient(), augment, preprocessing)
    return pictures.__getitems__(DrawnIndices([1], draw=0))[0][0, 0]


def test_any_result_is_brought_to_the_size_of_the_model(photos):
    picture = whole_picture(photos, 1)
    assert (picture.mode, picture.size) == ("RGB", (60, 40))
    identity = torch.from_numpy(MODEL.square(picture).copy())
    assert torch.equal(one(lambda given: given, source=photos), identity)
    assert torch.equal(one(v2.PILToTensor(), source=photos), MODEL.fit(v2.PILToTensor()(picture)[None])[0])
    assert torch.equal(one(v2.ToImage(), source=photos), MODEL.fit(v2.PILToTensor()(picture)[None])[0])
    exact = v2.Resize((SIZE, SIZE))
    for cropped in (MODEL, Preprocessing(SIZE, crop_fraction=0.5)):  # a result of the right size is not cropped again
        assert torch.equal(one(exact, cropped, photos), v2.PILToTensor()(exact(picture)))
        assert torch.equal(
            one(v2.Compose([exact, v2.PILToTensor()]), cropped, photos), v2.PILToTensor()(exact(picture))
        )
    assert one(v2.Grayscale(), source=photos).shape == (3, SIZE, SIZE)
    assert one(exact, Preprocessing(SIZE, channels=1), photos).shape == (1, SIZE, SIZE)


@pytest.mark.parametrize(
    "augment, message",
    [
        (v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
         r"augment must return a picture or a uint8 tensor \(3, h, w\), got torch.float32 \(3, 16, 16\) from Compose; "
         "leave out the conversion to float and the normalisation, which the model does itself"),
        (np.asarray, "got ndarray from asarray$"),
        (v2.Compose([v2.Grayscale(), v2.PILToTensor()]), r"got torch.uint8 \(1, 16, 16\) from Compose$"),
        (lambda picture: None, "got NoneType from <lambda>$"),
    ],
)  # fmt: skip
def test_other_results_are_refused(augment, message):
    with pytest.raises(ValueError, match=message):
        one(augment)


@pytest.mark.parametrize(
    "augment, message",
    [
        (5, "augment must be BatchAugment, PhotoAugment, a callable on one picture, 'auto' or None, got 5"),
        ("random", "got 'random'"),
        (v2.RandomHorizontalFlip, "got the class RandomHorizontalFlip, not an instance of it"),
        (lambda images, generator: images, r"got <lambda>, which takes \(images, generator\); .* from BatchAugment"),
    ],
)
def test_what_is_not_an_augmentation_is_refused(augment, message):
    with pytest.raises(ValueError, match=message):
        TensorPairDataModule(gradient(), augment=augment)


def test_what_is_an_augmentation():
    for augment in (None, "auto", BatchAugment(), PhotoAugment(), v2.Identity(), Draws(), len):
        check_augment(augment)


# ---- sources


def test_pictures_of_each_kind_of_source(folder, photos):
    assert isinstance(photos, DecodedFiles)
    listed = load_image_folder(folder, SIZE, max_memory=0)
    assert isinstance(listed, FolderImages)
    chosen = torch.tensor([7, 3, 21])
    kinds = [photos.subset(chosen), listed.subset(chosen), Relabelled(photos, photos.labels, ["x"] * 4).subset(chosen)]
    kinds.append(join_images([photos, photos], photos.class_names).subset(chosen + 40))
    for source in kinds:
        for place, index in enumerate(chosen.tolist()):
            expected = np.asarray(Image.open(folder / listed.names[index]))
            assert np.array_equal(np.asarray(whole_picture(source, place)), expected)
    assert [in_memory(source) for source in kinds] == [True, False, True, True]
    grey = whole_picture(gradient(channels=1), 2)
    assert (grey.mode, grey.size, np.asarray(grey)[0, :3].tolist()) == ("L", (16, 16), [2, 10, 18])


# ---- data modules and fits


class Record(LightningModule):
    """A model of one weight that keeps a digest of each batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, images.sum((1, 2, 3)).tolist(), labels.tolist()))
        return (self.weight * images.mean((0, 2, 3))).square().sum() + self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Callback):
    """Ends a run hard, as a job's time limit does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.step:
            raise KeyboardInterrupt


def fit(folder, workers, out, callbacks=(), checkpoint=None):
    torch.manual_seed(0)
    data = ImageFolderPairDataModule(
        folder, image_size=SIZE, augment=PhotoAugment(policy="trivial"), num_workers=workers, classes_per_batch=4,
        samples_per_class=2, views=2, val_fraction=0.2, seed=5,
    )  # fmt: skip
    model = Record()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out, callbacks=list(callbacks), enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    with suppress(SystemExit):  # Lightning's answer to KeyboardInterrupt
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=False)
    return model


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_fit_on_photographs_is_the_same_to_the_last_bit(folder, tmp_path, workers):
    whole = fit(folder, 0, tmp_path)
    assert [batch[:2] for batch in whole.seen] == [(epoch, batch) for epoch in range(2) for batch in range(4)]
    assert all(len(batch[3]) == 4 * 2 * 2 for batch in whole.seen)
    checkpoint, again = (ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3) for _ in range(2))
    assert fit(folder, workers, tmp_path, [checkpoint, Stop(7)]).seen == whole.seen[:7]
    after = fit(folder, workers, tmp_path, [again], checkpoint.last_model_path)
    assert after.seen == whole.seen[6:]
    assert torch.equal(after.weight, whole.weight)


def test_a_callable_in_memory_and_its_views(tmp_path):
    data = TensorPairDataModule(gradient(40), augment=Draws(), views=3, classes_per_batch=2, samples_per_class=2,
                                mean=[0.0] * 3, std=[1.0] * 3)  # fmt: skip
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    images, labels = data.prepare(batch, augment=True)
    assert images.shape == (12, 3, 16, 16)
    assert torch.equal(labels, batch.labels.repeat_interleave(3))
    assert torch.equal((images * 255).round().to(torch.uint8), batch.images.flatten(0, 1))
    with pytest.raises(ValueError, match=r"images must come from train_dataloader\(\), where Draws augments"):
        data.prepare((batch.images[:, 0], batch.labels, batch.draw), augment=True)


def test_evaluation_uses_the_images_in_memory(folder, photos):
    data = ImageFolderPairDataModule(folder, image_size=SIZE, augment=Draws(), val_fraction=0.2, num_workers=0,
                                     classes_per_batch=4, samples_per_class=2)  # fmt: skip
    data.setup("fit")
    loaders = (data.bank_dataloader(), data.val_dataloader())
    found = torch.cat([images for loader in loaders for images, _ in loader])
    assert {image.numpy().tobytes() for image in found} == {image.numpy().tobytes() for image in photos.images}


def test_auto_depends_on_the_size_of_the_images(folder):
    def chosen(size, **arguments):
        data = ImageFolderPairDataModule(folder, image_size=size, classes_per_batch=4, samples_per_class=2, **arguments)
        data.setup("fit")
        loader = data.train_dataloader()
        return data, loader.dataset, loader.num_workers

    data, small, workers = chosen(64)
    assert (data.augment, isinstance(small, DecodedFiles), workers) == ("auto", True, 0)
    assert data.prepare(next(iter(data.train_dataloader())), augment=True)[0].shape == (8, 3, 64, 64)
    _, large, workers = chosen(65)
    assert (large.augment, workers) == (PhotoAugment(), default_workers())
    _, none, workers = chosen(65, augment=None)
    assert (isinstance(none, DecodedFiles), workers) == (True, 0)
    data, _, workers = chosen(65, max_memory_gib=0, num_workers=None)
    assert workers == data.val_dataloader().num_workers == default_workers() >= 1
    assert chosen(65)[0].val_dataloader().num_workers == 0
    assert chosen(65, num_workers=0)[2] == 0
