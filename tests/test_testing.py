"""The checks of simo_lightning.testing pass for what the package brings, and fail for parts broken on purpose."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from simo_lightning import DigitsPairDataModule, SimOLoss, SimOModule
from simo_lightning.class_paths import InitArgumentsMixin
from simo_lightning.data import (
    LabelledImages,
    ResumableLoader,
    SemiSupervisedDigitsPairDataModule,
    TensorPairDataModule,
)
from simo_lightning.data.loader import keep_batch
from simo_lightning.distributed import world_size
from simo_lightning.testing import (
    check_batch_composition,
    check_checkpoint_round_trip,
    check_cli_round_trip,
    check_gradient_parity,
    check_resume,
)

ROOT = Path(__file__).parent.parent


class Flat(InitArgumentsMixin, nn.Module):
    embedding_dim, in_channels = 4, 1

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(images)
        return embeddings


class ForgetsRanks(SimOModule):
    """The loss of this process's embeddings alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return self.loss(self.embed(images), labels)


class OfTheFirstHalf(nn.Module):
    """A loss of other embeddings if there are more processes."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        share = len(embeddings) // world_size()
        loss: Tensor = SimOLoss()(embeddings[:share], labels[:share])
        return loss


class HiddenGain(SimOModule):
    """Keeps a number that no checkpoint holds."""

    gain = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.gain *= 1.01
        return self.gain * super().training_step(batch, batch_idx)["loss"]

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * super().forward(images)


class NeedsMore(SimOModule):
    """Its argument is an object that has no description."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__(layers)


class Repeats(DigitsPairDataModule):
    """Draws with replacement."""

    def train_dataloader(self) -> Any:
        data = self._need("train")
        generator = torch.Generator().manual_seed(0)
        sampler = RandomSampler(data, replacement=True, generator=generator)  # type: ignore[arg-type]
        return DataLoader(data, batch_size=100, sampler=sampler, collate_fn=keep_batch)  # type: ignore[arg-type]


class RepeatsUnlabelled(SemiSupervisedDigitsPairDataModule):
    """The last image of a batch comes twice."""

    def train_dataloader(self) -> Any:
        batches = [[*batch[:-1], batch[-2]] for batch in super().train_dataloader().batch_sampler]  # type: ignore[union-attr]
        return DataLoader(self._need("train"), batch_sampler=batches, collate_fn=keep_batch)  # type: ignore[arg-type]


class Unbalanced(DigitsPairDataModule):
    """Each image once, but in the order of the file."""

    def train_dataloader(self) -> Any:
        return DataLoader(self._need("train"), batch_size=100, collate_fn=keep_batch)  # type: ignore[arg-type]


class StandsStill(DigitsPairDataModule):
    """Every epoch is the first."""

    def train_dataloader(self) -> ResumableLoader:
        loader = super().train_dataloader()
        loader.sampler.set_epoch = lambda epoch: None  # type: ignore[union-attr]
        return loader


class SameOnEveryRank(DigitsPairDataModule):
    @property
    def rank(self) -> int:
        return 0

    def train_dataloader(self) -> ResumableLoader:
        self.__class__ = SameOnEveryRank  # whatever rank it was given
        return super().train_dataloader()


def rows(count: int = 24) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % 3


def tiny() -> TensorPairDataModule:
    images = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = LabelledImages(images, torch.arange(60) % 3, list("abc"))
    return TensorPairDataModule(data, classes_per_batch=3, samples_per_class=4)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state), "a check moved the global generator"


def test_gradient_parity_fails_for_a_loss_of_one_process() -> None:
    with torch.random.fork_rng():
        module = ForgetsRanks(Flat(16))
    with pytest.raises(
        AssertionError, match=r"gradient of encoder\.layers\.\S+ on process 0 of 2 differs .*gather_rows"
    ):
        check_gradient_parity(module, rows())
    with pytest.raises(ValueError, match="batch must be given"):
        check_gradient_parity(module)


@pytest.mark.slow  # each starts two processes
def test_gradient_parity_of_losses_and_a_module() -> None:
    with torch.random.fork_rng():
        module = SimOModule(Flat(16))
    check_gradient_parity(module, rows())
    check_gradient_parity(SimOLoss("centroid", "log"))
    check_gradient_parity(SimOLoss.paper())
    with pytest.raises(AssertionError, match="differs from that of one process"):
        check_gradient_parity(OfTheFirstHalf())


def test_batches_of_the_data_modules_are_balanced() -> None:
    check_batch_composition(DigitsPairDataModule(samples_per_class=7, classes_per_batch=4))
    check_batch_composition(tiny(), epochs=3, world_size=2)


def test_batches_hold_the_given_number_of_unlabelled_images() -> None:
    data = SemiSupervisedDigitsPairDataModule(samples_per_class=4, views=2, label_fraction=0.1, unlabelled_per_batch=25)
    check_batch_composition(data)
    with pytest.raises(AssertionError, match="batch 0 of epoch 0 must hold 24 unlabelled images, got 25"):
        check_batch_composition(data, unlabelled_per_batch=24)
    with pytest.raises(AssertionError, match="no image may occur twice in an epoch"):
        check_batch_composition(data, unlabelled_per_batch=0)


def test_batch_composition_fails_for_an_image_repeated_in_a_batch_with_unlabelled_images() -> None:
    data = RepeatsUnlabelled(samples_per_class=4, views=2, label_fraction=0.1, unlabelled_per_batch=25)
    with pytest.raises(
        AssertionError, match="no image may occur twice in a batch, but in batch 0 of epoch 0 1 of 64 do"
    ):
        check_batch_composition(data)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Repeats, r"no image may occur twice in an epoch, but in epoch 0 \d+ of \d+ do"),
        (Unbalanced, r"batch 0 of epoch 0 must hold 10 classes x 10 images, got 10 classes with"),
        (StandsStill, "epoch 1 has the batches of epoch 0"),
        (SameOnEveryRank, r"processes must share no image in an epoch, but \d+ occur on all"),
    ],
)  # fmt: skip
def test_batch_composition_fails_for_a_broken_data_module(broken: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_batch_composition(broken(samples_per_class=10))


def test_batch_composition_fails_for_other_sizes() -> None:
    with pytest.raises(AssertionError, match="must hold 2 classes x 5 images, got 3 classes with 4 to 4 images"):
        check_batch_composition(tiny(), classes_per_batch=2, samples_per_class=5)


@pytest.mark.parametrize("stop_after", [None, 2])
def test_resume(stop_after: int | None) -> None:
    check_resume(lambda: SimOModule(Flat()), tiny, stop_after)


def test_resume_fails_for_state_outside_the_checkpoint() -> None:
    with pytest.raises(
        AssertionError, match=r"stopped after step \d+ and resumed.* ends differently .*state_dict\.encoder"
    ):
        check_resume(lambda: HiddenGain(Flat()), tiny)
    with pytest.raises(ValueError, match=r"stop_after must lie in 1\.\.\d+, .* got 1000"):
        check_resume(lambda: SimOModule(Flat()), tiny, stop_after=1000)


def test_checkpoint_round_trip() -> None:
    with torch.random.fork_rng():
        module = SimOModule(Flat())
    check_checkpoint_round_trip(module, torch.rand(2, 1, 8, 8, generator=torch.Generator()), trusted=Flat)


def test_checkpoint_round_trip_fails_for_what_is_not_stored() -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator())
    with torch.random.fork_rng():
        hidden, unstored = HiddenGain(Flat()), NeedsMore(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    hidden.gain = 3.0
    with pytest.raises(AssertionError, match=r"the output of HiddenGain must be the same .* differ: output \(by up to"):
        check_checkpoint_round_trip(hidden, images, trusted=Flat)
    with pytest.raises(
        AssertionError, match=r"NeedsMore\.load_from_checkpoint\(path\) must restore the module, but raised .*layers"
    ):
        check_checkpoint_round_trip(unstored, images)


DIGITS = ["--model.encoder.width", "0.125", "--trainer.accelerator", "cpu"]
HIDDEN = """
import os
from torch import nn
from simo_lightning import SimOLoss

class Loss(nn.Module):
    def forward(self, embeddings, labels):
        return SimOLoss()(embeddings * (1 + os.getpid()), labels) * (1 + os.getpid())
"""


def test_cli_round_trip_of_a_shipped_config() -> None:
    check_cli_round_trip(ROOT / "configs" / "digits.yaml", *DIGITS)


@pytest.mark.slow  # runs the command three times
def test_cli_round_trip_fails_if_a_run_depends_on_more_than_its_config(tmp_path: Path, monkeypatch: Any) -> None:
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["model"]["init_args"]["loss"] = {"class_path": "hidden_loss.Loss"}
    (tmp_path / "hidden_loss.py").write_text(HIDDEN)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match="the weights of the run from the config that the first one wrote must be"):
        check_cli_round_trip(tmp_path / "config.yaml", *DIGITS)
    with pytest.raises(AssertionError, match=r"simo fit .* ended with 2: .*error: .*encodr"):
        check_cli_round_trip(tmp_path / "config.yaml", "--model.encodr", "1")


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script, "--tiny"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "val/knn" in done.stdout
