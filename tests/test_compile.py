import shutil
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD

from simo_lightning import DigitsPairDataModule, SimOModule
from tests.bounds import UNIT, relative_error

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    # no bias before the norm, and SGD: Adam would make steps of pure rounding
    conv = nn.Conv2d(1, 8, 3, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))


def fit(compile: bool, precision: str = "32-true") -> SimOModule:
    module = SimOModule(encoder(), optimizer=partial(SGD, lr=0.1), compile=compile)
    trainer = pl.Trainer(max_steps=3, limit_val_batches=1, accelerator="cpu", precision=precision, **QUIET)
    trainer.fit(module, datamodule=DigitsPairDataModule(samples_per_class=4))
    return module


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of what it calls
def test_a_compiled_encoder_trains_to_the_weights_of_a_plain_one():
    """It errs against float64 at most four times as much as the plain one does."""
    plain, compiled, exact = fit(False), fit(True), fit(False, "64-true").state_dict()
    assert compiled.encoder._compiled_call_impl is not None
    assert plain.encoder._compiled_call_impl is None
    assert list(compiled.state_dict()) == list(exact)
    error, own = (
        max(relative_error(module.state_dict()[name], exact[name]) for name in exact) for module in (compiled, plain)
    )
    assert error <= 4 * max(own, UNIT)


def test_only_a_fit_compiles():
    module = SimOModule(encoder(), compile=True)
    for stage in ("validate", "test", "predict"):
        module.setup(stage)
    assert module.encoder._compiled_call_impl is None
