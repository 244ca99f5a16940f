"""Training with hidden labels: batches, epochs, ranks, resume, the loss on such a batch."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from simo_lightning import SimOLoss, SimOModule
from simo_lightning.data import (
    BatchAugment,
    ClassBalancedSampler,
    LabelledImages,
    SemiBalancedSampler,
    SemiSupervisedDigitsPairDataModule,
    SemiSupervisedTensorPairDataModule,
)
from simo_lightning.semi_supervised import SemiSupervisedLoss
from simo_lightning.testing import check_resume
from tests import reference
from tests.rank_processes import start_ranks

P, K, U = 3, 2, 5


def few_labels(count: int = 200, every: int = 8) -> tuple[Tensor, Tensor]:
    """Labels of three classes, and which are known: unequal classes, so that their images do not come out even."""
    return torch.arange(count) % 7 % 3, torch.arange(count) % every == 0


def steps_of(labels: Tensor, labelled: Tensor, world: int, epoch: int, u: int = U) -> list[list[list[int]]]:
    """Indices by step and rank."""
    shares = []
    for rank in range(world):
        sampler = SemiBalancedSampler(labels, labelled, P, K, u, 3, rank, world)
        sampler.set_epoch(epoch)
        own = torch.tensor(list(sampler))
        assert len(own) == len(sampler)
        shares.append(own.view(-1, sampler.batch_size).tolist())
    assert len({len(share) for share in shares}) == 1
    return [list(step) for step in zip(*shares, strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("every", [2, 8])
def test_batches_are_balanced_and_no_image_comes_twice_in_a_step(world: int, every: int) -> None:
    labels, labelled = few_labels(every=every)
    for epoch in range(3):
        for step in steps_of(labels, labelled, world, epoch):
            for block in step:
                known = [index for index in block if labelled[index]]
                assert known == block[: P * K]
                assert labels[known].bincount().tolist() == [K] * P
                assert len(block) - len(known) == U
            together = [index for block in step for index in block]
            assert len(set(together)) == len(together)


def test_an_epoch_visits_the_larger_part_once_and_the_smaller_again_and_again() -> None:
    labels, labelled = few_labels()  # 25 labelled, 175 unlabelled: 35 blocks of 5
    blocks = SemiBalancedSampler(labels, labelled, P, K, U).epoch_blocks(0)
    assert len(blocks) == 35
    assert sorted(blocks[:, P * K :].ravel().tolist()) == (~labelled).nonzero().flatten().tolist()
    once = len(ClassBalancedSampler(labels[labelled], P, K).epoch_blocks(0))
    for visit in range(35 // once):
        part = blocks[visit * once : (visit + 1) * once, : P * K].ravel().tolist()
        assert len(set(part)) == len(part)
    visits = [blocks[visit * once : (visit + 1) * once, : P * K].tolist() for visit in range(2)]
    assert visits[0] != visits[1]

    labels, labelled = few_labels(every=1)
    labelled[::10] = False  # 180 labelled, 20 unlabelled: the unlabelled ones come again
    blocks = SemiBalancedSampler(labels, labelled, P, K, U).epoch_blocks(0)
    known = blocks[:, : P * K].ravel().tolist()
    assert len(set(known)) == len(known)
    assert len(blocks) > 4
    for visit in range(len(blocks) // 4):
        assert sorted(blocks[4 * visit : 4 * visit + 4, P * K :].ravel().tolist()) == list(range(0, 200, 10))


def test_ranks_share_the_blocks_of_one_process() -> None:
    labels, labelled = few_labels()
    whole = SemiBalancedSampler(labels, labelled, P, K, U, 3, 0, 2).epoch_blocks(1).tolist()
    dealt = [block for step in steps_of(labels, labelled, 2, 1) for block in step]
    assert dealt == whole


def test_the_order_depends_on_seed_and_epoch() -> None:
    labels, labelled = few_labels()
    make = partial(SemiBalancedSampler, labels, labelled, P, K, U)
    assert make(1).epoch_blocks(2).tolist() == make(1).epoch_blocks(2).tolist()
    assert make(1).epoch_blocks(2).tolist() != make(2).epoch_blocks(2).tolist()
    assert make(1).epoch_blocks(2).tolist() != make(1).epoch_blocks(3).tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unlabelled_per_batch": 0}, "unlabelled_per_batch must be at least 1.*175 unlabelled images, got 0 on 1"),
        ({"unlabelled_per_batch": 90, "world_size": 2}, "at most the 175 unlabelled images, got 90 on 2 ranks"),
        ({"labelled": torch.ones(200)}, r"labelled must be bool \(200,\) to match labels, got torch.float32"),
        ({"world_size": 9}, "9 ranks for .* batches"),
    ],
)
def test_errors_of_the_sampler(change: dict[str, Any], message: str) -> None:
    labels, labelled = few_labels()
    given = {"labels": labels, "labelled": labelled, "classes_per_batch": P, "samples_per_class": K}
    with pytest.raises(ValueError, match=message):
        SemiBalancedSampler(**{**given, "unlabelled_per_batch": U, **change})


# ---- the data module


def semi(**arguments: Any) -> SemiSupervisedDigitsPairDataModule:
    given = {"samples_per_class": 2, "views": 2, "label_fraction": 0.1, "unlabelled_per_batch": 60}
    return SemiSupervisedDigitsPairDataModule(**{**given, **arguments})


def test_a_batch_holds_views_of_labelled_and_of_unlabelled_images() -> None:
    data = semi(views=3, augment=BatchAugment(crop_padding=1, flip=0.0))
    data.setup("fit")
    loader = data.train_dataloader()
    images, labels = data.prepare(next(iter(loader)), augment=True)
    assert images.shape == (3 * (20 + 60), 1, 8, 8)
    assert (labels.view(-1, 3) == labels.view(-1, 3)[:, :1]).all()
    known = labels[labels < 10]
    assert known.bincount().tolist() == [6] * 10
    assert labels[labels >= 10].unique(return_counts=True)[1].tolist() == [3] * 60
    assert len(loader) == (1295 - 130) // 60
    bank = torch.cat([labels for _, labels in data.bank_dataloader()])
    assert torch.equal(bank.bincount(), data._need("train").labels.bincount().mul(0.1).round().long())
    assert data.num_classes == len(data.train_class_names) == 10


def test_the_labelled_part_alone() -> None:
    data = semi(unlabelled_per_batch=0, views=1)
    data.setup("fit")
    with_hidden = semi()
    with_hidden.setup("fit")
    assert data.mean == with_hidden.mean  # of all training images
    batches = list(data.train_dataloader())
    assert all(labels.bincount().tolist() == [2] * 10 for _, labels, _ in batches)
    banks = [torch.cat([images for images, _ in each.bank_dataloader()]) for each in (data, with_hidden)]
    assert torch.equal(*banks)
    known = {image.numpy().tobytes() for image in banks[0]}
    assert {image.numpy().tobytes() for images, *_ in batches for image in images} <= known


def test_unlabelled_per_batch_defaults_to_the_labelled_images() -> None:
    data = semi(unlabelled_per_batch=None)
    data.setup("fit")
    labels = next(iter(data.train_dataloader())).labels
    assert (len(labels), int((labels >= 10).sum())) == (40, 20)


def test_errors_of_arguments() -> None:
    with pytest.raises(ValueError, match=r"views must be at least 2 with unlabelled images.*got 1"):
        semi(views=1)
    with pytest.raises(ValueError, match="unlabelled_per_batch must be at least 0, got -1"):
        semi(unlabelled_per_batch=-1)


def make_module(micro_batch_size: int | None = None) -> SimOModule:
    torch.manual_seed(0)
    layers = (torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 4))
    return SimOModule(torch.nn.Sequential(*layers), optimizer=torch.optim.Adam, micro_batch_size=micro_batch_size)


def test_a_resumed_run_is_bit_identical() -> None:
    check_resume(make_module, lambda: semi(unlabelled_per_batch=200), stop_after=8)  # five steps an epoch


@pytest.mark.parametrize("level, form", [("group", "log"), ("class", "log"), ("centroid", "softmax"), ("pair", "log")])
def test_the_loss_takes_such_a_batch_at_every_level(level: Any, form: Any) -> None:
    labels = [1, 1, 0, 0, 0, 1, *(10 + place for place in (3, 3, 900, 900, 41_000, 41_000, 77, 77))]
    embeddings = torch.randn(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = SimOLoss(
        level, form, eps=0.05, normalize=False, dissimilar_weight=1.0, prototype_weight=0.0, mean_weight=0.0
    )(embeddings, torch.tensor(labels))
    expected = reference.simo(embeddings, labels, level, form, eps=0.05)
    expected.pop("mean")
    torch.testing.assert_close(loss, torch.stack(list(expected.values())).sum(), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("loss", [SimOLoss(), SemiSupervisedLoss(10)], ids=["joint", "parts"])
def test_micro_batches_give_the_gradient_of_such_a_batch(loss: torch.nn.Module) -> None:
    data = semi()
    data.setup("fit")
    images, labels = data.prepare(next(iter(data.train_dataloader())), augment=True)
    gradients = []
    for size in (None, 23):  # parts that separate the views of an image
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        module = SimOModule(net.double(), loss, micro_batch_size=size).double()
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # no trainer here
        module.training_step((images.double(), labels), 0)["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


# ---- two real processes


class Model(pl.LightningModule):
    """Remembers what its ranks saw together."""

    def __init__(self) -> None:
        super().__init__()
        self.module = make_module()
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append(labels.tolist())
        return self.module.encoder(images.float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(folder: Path) -> None:
    images = torch.zeros(120, 1, 8, 8, dtype=torch.uint8)
    data = SemiSupervisedTensorPairDataModule(
        train=LabelledImages(images, torch.arange(120) % 4, list("abcd")), classes_per_batch=4, samples_per_class=2,
        views=2, label_fraction=0.2, unlabelled_per_batch=7, val_fraction=0, mean=[0.0], std=[1.0],
    )  # fmt: skip
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(model.seen))


def test_two_processes_hide_the_same_labels_and_share_no_image(tmp_path: Path) -> None:
    assert start_ranks(2, run, tmp_path) == [0, 0]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    hidden = set()
    assert len(seen[0]) == len(seen[1]) == 2 * (96 // 14)
    for step in zip(*seen, strict=True):
        own = [[label for label in labels if label >= 4] for labels in step]
        assert all(len(labels) == 2 * 7 for labels in own)
        assert not set(own[0]) & set(own[1])
        hidden |= {*own[0], *own[1]}
    train = SemiSupervisedTensorPairDataModule(
        train=LabelledImages(torch.zeros(120, 1, 8, 8, dtype=torch.uint8), torch.arange(120) % 4, list("abcd")),
        classes_per_batch=4, samples_per_class=2, views=2, label_fraction=0.2, val_fraction=0, mean=[0.0], std=[1.0],
    )  # fmt: skip
    train.setup("fit")
    assert hidden <= set(train._training.labels[~train._labelled].tolist())
    assert len(hidden) > 80
