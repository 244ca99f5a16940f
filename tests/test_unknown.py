"""Scores for known and unknown images against scikit-learn, and the callback in real, tiny runs."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import OnlineKNN, UnknownMonitor
from simo_lightning.functional import (
    class_mean_similarity,
    fpr_at_recall,
    neighbor_similarity,
    span_energy,
    unknown_auroc,
)
from simo_lightning.metrics import FPRAtRecall
from tests.callback_parts import Encoder, Pictures, pictures, trainer
from tests.rank_processes import saved, start_ranks


def scores(n: int, m: int, decimals: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    known, unknown = random.normal(1, 1, n), random.normal(0, 1, m)
    values = (known, unknown) if decimals is None else (known.round(decimals), unknown.round(decimals))
    return torch.from_numpy(values[0]), torch.from_numpy(values[1])


def reference(known: np.ndarray, unknown: np.ndarray, recall: float = 0.95) -> tuple[float, float]:
    target = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    values = np.r_[known, unknown]
    false, true, _ = roc_curve(target, values, drop_intermediate=False)
    return roc_auc_score(target, values), false[np.argmax(true >= recall)]


@pytest.mark.parametrize("decimals", [None, 1, 0])  # with more and more ties
@pytest.mark.parametrize(("n", "m"), [(200, 100), (60, 300), (1, 1), (20, 7)])
def test_equal_scikit_learn(n, m, decimals):
    known, unknown = scores(n, m, decimals)
    area, false_positives = reference(known.numpy(), unknown.numpy())
    assert unknown_auroc(known, unknown).item() == pytest.approx(area, abs=1e-6)
    assert fpr_at_recall(known, unknown).item() == pytest.approx(false_positives, abs=1e-6)
    for recall in (0.5, 1.0):
        expected = reference(known.numpy(), unknown.numpy(), recall)[1]
        assert fpr_at_recall(known, unknown, recall).item() == pytest.approx(expected, abs=1e-6)


def test_scores_far_apart_or_large_are_not_equal():
    known, unknown = torch.tensor([1e6 + 1, 1e6 + 2]), torch.tensor([1e6, -1e9])
    assert unknown_auroc(known, unknown) == 1
    assert unknown_auroc(unknown, known) == 0
    assert unknown_auroc(torch.ones(3), torch.ones(2)) == 0.5
    assert fpr_at_recall(torch.ones(3), torch.ones(2)) == 1


def test_without_known_or_unknown_images_nothing_is_defined():
    for pair in ((torch.zeros(0), torch.ones(2)), (torch.ones(2), torch.zeros(0))):
        assert unknown_auroc(*pair).isnan()
        assert fpr_at_recall(*pair).isnan()


def test_similarities_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    embeddings, bank = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (30, 50))
    found = NearestNeighbors(n_neighbors=7, metric="cosine").fit(bank.numpy()).kneighbors(embeddings.numpy())[0]
    np.testing.assert_allclose(neighbor_similarity(embeddings, bank, k=7).numpy(), 1 - found[:, 6], atol=1e-12)
    means = torch.cat((bank[:4], torch.full((1, 6), torch.nan)))
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(bank[:4].numpy()).kneighbors(embeddings.numpy())[0]
    np.testing.assert_allclose(class_mean_similarity(embeddings, means).numpy(), 1 - nearest[:, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fpr_at_recall(torch.ones(3), torch.ones(2), 0.0), r"recall must be in \(0, 1\], got 0.0"),
        (lambda: FPRAtRecall(1.5), r"recall must be in \(0, 1\], got 1.5"),
        (lambda: unknown_auroc(torch.ones(3, 1), torch.ones(2)), r"known must be floats of shape \(N,\), got torch.fl"),
        (lambda: unknown_auroc(torch.ones(3), torch.ones(2) / 0), "unknown must be finite, got 2 of 2 that are not"),
        (lambda: neighbor_similarity(torch.ones(3, 2), torch.ones(4, 2)), r"k must be in 1\.\.4, .* got k=5"),
        (lambda: class_mean_similarity(torch.ones(3, 2), torch.full((1, 2), torch.nan)), "must have a finite row"),
        (lambda: UnknownMonitor(k=0), "k must be at least 1, got 0"),
        (lambda: FPRAtRecall().update(torch.ones(3), torch.ones(2)), r"same shape \(N,\), got \(3,\) and \(2,\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_metric_is_the_function_of_all_batches():
    known, unknown = scores(200, 100, None)
    values, is_known = torch.cat((known, unknown)), torch.arange(300) < 200
    metric, order = FPRAtRecall(), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert metric.recall == 0.95
    for index in order.split(37):
        metric.update(values[index], is_known[index])
    assert metric.compute() == fpr_at_recall(known.float(), unknown.float())


class WithUnknown(Pictures):
    """Strange images beside those of the three classes."""

    strange = TensorDataset(255 - pictures(30, 7).tensors[0], 3 + pictures(30, 7).tensors[1])

    def unknown_dataloader(self) -> DataLoader:
        return self.loader(self.strange)


NAMES = {f"val/unknown_{value}_{score}" for value in ("auroc", "fpr95") for score in ("cosine", "span", "knn")}


def log(folder, world: int) -> None:
    options = {"strategy": "ddp", "devices": world} if world > 1 else {}
    run = trainer(folder, UnknownMonitor(k=3), precision="64-true", **options)
    values = run.validate(Encoder(), WithUnknown(), verbose=False)[0]
    torch.save(values, folder / f"logged{world}.{run.global_rank}.pt")


def test_the_callback_logs_what_scikit_learn_computes_on_one_and_two_processes(tmp_path):
    log(tmp_path, 1)
    assert start_ranks(2, log, tmp_path, 2) == [0, 0]
    (one,) = saved(tmp_path, "logged1", 1)
    assert one.keys() == NAMES
    for found in saved(tmp_path, "logged2", 2):
        assert found == pytest.approx(one, rel=1e-6)
    net, data = Encoder().double().eval().net, WithUnknown()
    with torch.no_grad():
        bank, known, unknown = (
            net((part.tensors[0].float() / 255 - 0.5).double()).float() for part in (data.train, data.val, data.strange)
        )
    labels = data.train.tensors[1]
    unit = bank / bank.norm(dim=1, keepdim=True)
    means = torch.stack([unit[labels == label].mean(dim=0) for label in range(3)])
    for name, score in {
        "cosine": lambda rows: class_mean_similarity(rows, means),
        "span": lambda rows: span_energy(rows, means),
        "knn": lambda rows: neighbor_similarity(rows, bank, 3),
    }.items():
        area, false_positives = reference(score(known).numpy(), score(unknown).numpy())
        assert one[f"val/unknown_auroc_{name}"] == pytest.approx(area, abs=1e-6)
        assert one[f"val/unknown_fpr95_{name}"] == pytest.approx(false_positives, abs=1e-6)


def test_without_unknown_images_it_is_silent(tmp_path, caplog):
    assert trainer(tmp_path, UnknownMonitor()).validate(Encoder(), Pictures(), verbose=False) == [{}]
    assert "UnknownMonitor" not in caplog.text


def test_a_span_of_all_dimensions_is_not_logged(tmp_path, caplog):
    run = trainer(tmp_path, UnknownMonitor())
    found = run.validate(Encoder(dim=3), WithUnknown(), verbose=False)[0]
    assert found.keys() == {name for name in NAMES if "span" not in name}


def test_loaders_of_a_user_and_images_without_a_known_class(tmp_path):
    data = WithUnknown()
    loaders = {name: DataLoader([(image / 255 - 0.5, label) for image, label in part], batch_size=16)
               for name, part in (("unknown", data.strange), ("bank", data.train), ("val", data.val))}  # fmt: skip
    plain = UnknownMonitor(k=3, unknown=loaders["unknown"], bank=loaders["bank"])
    found = trainer(tmp_path, plain).validate(Encoder(), loaders["val"], verbose=False)[0]
    expected = trainer(tmp_path, UnknownMonitor(k=3)).validate(Encoder(), data, verbose=False)[0]
    assert found == pytest.approx(expected, abs=1e-6)
    run = trainer(tmp_path, UnknownMonitor(unknown=loaders["val"], bank=loaders["bank"]))
    assert run.validate(Encoder(), loaders["unknown"], verbose=False) == [{}]
    with pytest.raises(ValueError, match="UnknownMonitor requires a bank of known classes"):
        trainer(tmp_path, UnknownMonitor(unknown=loaders["val"])).validate(Encoder(), loaders["val"])


class Counting(WithUnknown):
    """Counts how often the bank is read, and passes a limit on."""

    banks, limits = 0, ()

    def bank_dataloader(self, limit: int | None = None) -> DataLoader:
        self.banks += 1
        return super().bank_dataloader(limit)

    def unknown_dataloader(self, limit: int | None = None) -> DataLoader:
        self.limits = (*self.limits, limit)
        return super().unknown_dataloader()


def test_the_bank_is_embedded_once_and_unknown_images_are_limited(tmp_path, caplog):
    data = Counting()
    run = trainer(tmp_path, OnlineKNN(), UnknownMonitor(max_images=100), limit_val_batches=1)
    for count in (1, 2):
        run.validate(Encoder(), data, verbose=False)
        assert (data.banks, data.limits) == (count, (100,) * count)
    size = len(next(iter(data.unknown_dataloader()))[1])
    assert f"and {size} of no class of it" in caplog.text
