"""The loss under PyTorch's own tools: compile, function transforms, copies, pickles, export."""

import pickle
import shutil
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from simo_lightning import SimOLoss
from simo_lightning.functional import simo
from simo_lightning.functional.simo import Classes

FORMS = [("group", "ratio"), ("group", "log"), ("class", "ratio"), ("class", "log")]
FORMS += [(level, form) for level in ("centroid", "pair") for form in ("ratio", "log", "softmax")]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("level", "form"),
    [("group", "ratio"), ("class", "log"), ("centroid", "log"), ("centroid", "softmax"), ("pair", "softmax")],
)
@pytest.mark.usefixtures("_fresh_compiler")
def test_everything_after_the_labels_is_one_graph(level: str, form: str) -> None:
    """By the backend that runs the captured graph as it is: ``compile`` asks for fullgraph, so a break is an error."""
    plain, compiled = SimOLoss(level, form, mean_weight=0.5), SimOLoss(level, form, mean_weight=0.5)
    compiled.compile(backend="aot_eager")
    for rows, classes in ((20, 3), (24, 4)):  # new sizes are dynamic, not an error
        embeddings, labels = draw(rows, 6), torch.arange(rows) % classes
        wanted, found = (value_and_gradient(loss, embeddings, labels) for loss in (plain, compiled))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("level", ["centroid", "pair"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_chunks_are_in_the_same_graph(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simo, "_CHUNK_ENTRIES", 100)
    plain, compiled = SimOLoss(level), SimOLoss(level)
    compiled.compile(backend="aot_eager")
    embeddings, labels = draw(20, 16), torch.arange(20) % 4
    wanted, found = (value_and_gradient(loss, embeddings, labels) for loss in (plain, compiled))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_gives_the_same_loss_and_still_checks_its_input() -> None:
    plain, compiled = SimOLoss(), SimOLoss()
    compiled.compile()
    embeddings, labels = draw(40, 6), torch.arange(40) % 4
    wanted, found = (value_and_gradient(loss, embeddings, labels) for loss in (plain, compiled))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    embeddings[3] = torch.nan
    with pytest.raises(ValueError, match="embeddings must be finite, got nan or inf in 1 of 40 rows, first in row 3"):
        compiled(embeddings, labels)


@pytest.mark.parametrize("copied", [deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["copy", "pickle"])
def test_copies_and_pickles_give_the_same_loss(copied) -> None:
    embeddings, labels = draw(12, 4), torch.arange(12) % 3
    for loss in (SimOLoss(), SimOLoss.paper(), SimOLoss.softmax(eps=0.3)):
        value = loss(embeddings, labels)
        assert torch.equal(copied(loss)(embeddings, labels), value)
        loss.compile()  # compiles nothing before its first call
        again = copied(loss)
        assert repr(again) == repr(loss)
        assert again._compiled is None
        assert torch.equal(again(embeddings, labels), value)


@pytest.mark.parametrize(("level", "form"), FORMS)
def test_torch_func_grad_is_the_gradient(level: str, form: str) -> None:
    loss, embeddings, labels = SimOLoss(level, form), draw(12, 4), torch.arange(12) % 3
    found = grad(lambda rows: functional_call(loss, {}, (rows, labels)))(embeddings)
    torch.testing.assert_close(found, value_and_gradient(loss, embeddings, labels)[1], rtol=1e-12, atol=1e-15)


def numbered(loss: SimOLoss, embeddings: Tensor, labels: Tensor) -> tuple[Classes, Tensor | None]:
    return loss._number_classes(embeddings, labels)


@pytest.mark.parametrize(("level", "form"), FORMS)
def test_vmap_over_batches_with_the_same_labels(level: str, form: str) -> None:
    """After the labels are numbered: the check for nan reads values, which vmap does not allow."""
    loss, batches, labels = SimOLoss(level, form), draw(3, 12, 4), torch.arange(12) % 3
    classes, prototypes = numbered(loss, batches[0], labels)
    found = vmap(lambda rows: sum(loss._terms(rows, classes, prototypes).values()))(batches)
    wanted = torch.stack([loss(rows, labels) for rows in batches])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


class Terms(nn.Module):
    """The loss of embeddings whose labels are numbered already, as a module that can be exported."""

    def __init__(self, loss: SimOLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: Tensor, numbers: Tensor, counts: Tensor, prototypes: Tensor) -> Tensor:
        terms = self.loss._terms(embeddings, Classes(numbers, counts), prototypes)
        return torch.stack(list(terms.values())).sum()


def test_export_of_the_loss_after_the_labels_are_numbered() -> None:
    loss = SimOLoss()
    embeddings, labels = draw(12, 4), torch.arange(12) % 3
    classes, prototypes = numbered(loss, embeddings, labels)
    inputs = (embeddings, classes.labels, classes.counts, prototypes)
    exported = torch.export.export(Terms(loss), inputs).module()
    torch.testing.assert_close(exported(*inputs), loss(embeddings, labels), rtol=1e-12, atol=0)
