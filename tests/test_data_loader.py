from contextlib import suppress

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import SequentialSampler

from simo_lightning.data import (
    BatchAugment,
    ClassBalancedSampler,
    LabelledImages,
    ResumableLoader,
    TensorPairDataModule,
)

IMAGES = 48
pytestmark = [  # Lightning's advice, not faults of these runs
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 under torch 2.15
]


def numbered_images():
    """Each image's two pixels are its own number and its class."""
    labels = torch.arange(IMAGES) % 3
    images = torch.stack([torch.arange(IMAGES), labels], 1).to(torch.uint8).view(IMAGES, 1, 1, 2)
    return LabelledImages(images, labels, ["a", "b", "c"])


def make_loader(workers=0, persistent=False, seed=0, rank=0, world_size=1, processed=None):
    data = numbered_images()
    sampler = ClassBalancedSampler(data.labels, 3, 2, seed, rank, world_size)
    return ResumableLoader(data, sampler, processed, num_workers=workers, persistent_workers=persistent)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [images[:, 0, 0, 0].tolist() for images, *_ in loader]


WORKERS = pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])


@WORKERS
def test_resume_within_an_epoch(workers, persistent):
    expected = [epoch_of(make_loader(), epoch) for epoch in range(4)]
    loader = make_loader(workers, persistent)
    assert epoch_of(loader, 1) == expected[1]
    loader.sampler.set_epoch(2)
    batches = iter(loader)
    taken = [next(batches)[0][:, 0, 0, 0].tolist() for _ in range(3)]
    state = loader.state_dict()
    assert state == {"epoch": 2, "batches_yielded": 3, "batches_per_epoch": 8, "world_size": 1}
    resumed = make_loader(workers, persistent)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # saved again before a batch was asked for
    early = iter(resumed)  # as Lightning does: before the epoch is set
    resumed.sampler.set_epoch(2)
    assert len(resumed) == 8
    assert taken + [images[:, 0, 0, 0].tolist() for images, *_ in early] == expected[2]
    assert resumed.batches_yielded == 8
    assert epoch_of(resumed, 3) == expected[3]


@WORKERS
def test_iter_before_set_epoch_gives_the_epoch_that_is_set(workers, persistent):
    loader = make_loader(workers, persistent)
    batches = iter(loader)
    loader.sampler.set_epoch(5)
    assert [images[:, 0, 0, 0].tolist() for images, *_ in batches] == epoch_of(make_loader(), 5)


def test_an_abandoned_epoch_leaves_nothing_behind():
    loader = make_loader()
    loader.load_state_dict({"epoch": 1, "batches_yielded": 5, "batches_per_epoch": 8, "world_size": 1})
    batches = iter(loader)
    next(batches)
    batches.close()
    assert epoch_of(loader, 1) == epoch_of(make_loader(), 1)


def test_state_at_the_ends_of_an_epoch():
    loader = make_loader()
    assert loader.state_dict()["batches_yielded"] == 0
    epoch_of(loader, 2)
    state = loader.state_dict()
    assert (state["epoch"], state["batches_yielded"]) == (2, 8)
    resumed = make_loader()
    resumed.load_state_dict(state)
    assert [images[:, 0, 0, 0].tolist() for images, *_ in resumed] == epoch_of(make_loader(), 3)
    loader.sampler.set_epoch(3)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches_yielded"]) == (3, 0)


def test_a_batch_that_was_not_processed_is_repeated():
    done = [2]
    loader = make_loader(processed=lambda: done[0])
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    assert loader.state_dict()["batches_yielded"] == 2
    done[0] = 3
    assert loader.state_dict()["batches_yielded"] == 3


def test_a_state_of_another_world_is_an_error_only_within_an_epoch():
    state = {"epoch": 1, "batches_yielded": 3, "batches_per_epoch": 8, "world_size": 1}
    with pytest.raises(ValueError, match=r"saved after batch 3 with .*'world_size': 1.*'world_size': 2"):
        make_loader(world_size=2).load_state_dict(state)
    make_loader(world_size=2).load_state_dict({**state, "batches_yielded": 8})
    make_loader(world_size=2).load_state_dict({**state, "batches_yielded": 0})


def test_another_sampler_is_an_error():
    data = numbered_images()
    with pytest.raises(ValueError, match="got SequentialSampler"):
        ResumableLoader(data, SequentialSampler(data))


class Record(LightningModule):
    """A model of one weight that keeps the numbers of the images of each batch, and the augmented pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, images.flatten().tolist(), labels.tolist()))
        return self.weight * images.mean()

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


def run(folder, workers, callbacks, checkpoint=None, **arguments):
    data = TensorPairDataModule(
        numbered_images(), val_fraction=0.25, classes_per_batch=3, samples_per_class=2, seed=7, num_workers=workers
    )
    data.augment = Shift()
    model = Record()
    trainer = Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        | {"enable_model_summary": False, "default_root_dir": folder, "callbacks": callbacks}
        | {"enable_checkpointing": bool([c for c in callbacks if isinstance(c, ModelCheckpoint)])}
        | arguments
    )
    with suppress(SystemExit):  # Lightning's answer to KeyboardInterrupt
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=False)
    return model


class Shift(BatchAugment):
    """Adds to every image a number that the generator draws, so that the draws are seen in the batch."""

    def __call__(self, images, generator):
        return images + torch.randint(4, (len(images), 1, 1, 1), generator=generator).to(torch.uint8) * 50


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "save, stop",
    [
        ({"every_n_train_steps": 3}, 4),  # in on_train_batch_end, epoch 0
        ({"every_n_train_steps": 4}, 9),  # in on_train_batch_end, in epoch 1
        ({"every_n_train_steps": 6}, 7),  # in on_train_batch_end of an epoch's last batch
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 8),  # in on_validation_end
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 8),  # in on_train_epoch_end
    ],
)
def test_a_resumed_fit_gets_the_batches_of_an_uninterrupted_one(tmp_path, workers, save, stop):
    whole = run(tmp_path, workers, []).seen
    assert len(whole) == 18
    checkpoint, again = (ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, **save) for _ in range(2))
    before = run(tmp_path, workers, [checkpoint, Stop(stop)]).seen
    assert before == whole[:stop]
    step = torch.load(checkpoint.last_model_path, weights_only=False)["global_step"]
    assert 0 < step <= stop
    after = run(tmp_path, workers, [again], checkpoint.last_model_path).seen
    assert after == whole[step:]


def test_fit_resumed_after_a_validation_within_the_epoch(tmp_path):
    whole = run(tmp_path, 0, [], val_check_interval=2).seen
    checkpoint, again = (
        ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, save_on_train_epoch_end=False) for _ in range(2)
    )
    run(tmp_path, 0, [checkpoint, Stop(9)], val_check_interval=2)
    step = torch.load(checkpoint.last_model_path, weights_only=False)["global_step"]
    assert step == 8
    after = run(tmp_path, 0, [again], checkpoint.last_model_path, val_check_interval=2).seen
    assert after == whole[step:]


@pytest.mark.parametrize(
    "save",
    [  # not in on_train_epoch_end: Lightning 2.6 counts that epoch twice when it resumes by steps
        {"every_n_train_steps": 4},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    ],
)
def test_fit_resumed_with_a_number_of_steps(tmp_path, save):
    limit = {"max_epochs": -1, "max_steps": 18}
    whole = run(tmp_path, 0, [], **limit).seen
    checkpoint, again = (ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, **save) for _ in range(2))
    run(tmp_path, 0, [checkpoint, Stop(8)], **limit)
    step = torch.load(checkpoint.last_model_path, weights_only=False)["global_step"]
    after = run(tmp_path, 0, [again], checkpoint.last_model_path, **limit).seen
    assert [batch[2] for batch in after] == [batch[2] for batch in whole[step:]]
