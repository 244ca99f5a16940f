"""OnlineKNN, RetrievalMonitor and the metric of BestCheckpoint in tiny runs, with unseen classes and two ranks."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import BestCheckpoint, OnlineKNN, RetrievalMonitor
from simo_lightning.cli import main
from simo_lightning.functional import knn_predict, nearest_class_mean_predict
from tests.bounds import UNIT
from tests.callback_parts import Encoder, Pictures, Returned, pictures, trainer
from tests.rank_processes import saved, start_ranks

SCORES = [*(f"recall_at_{k}" for k in (1, 2, 4, 8)), "r_precision", "map_at_r"]


def theirs(*data: Tensor, macro: bool = False) -> dict[str, float]:
    names = {"recall_at_1": "precision_at_1", "r_precision": "r_precision", "map_at_r": "mean_average_precision_at_r"}
    options = {"include": tuple(names.values()), "device": torch.device("cpu"), "avg_of_avgs": macro}
    found = AccuracyCalculator(**options, knn_func=CustomKNN(CosineSimilarity())).get_accuracy(*data)
    return {f"val/{name}{'_macro' if macro else ''}": found[other] for name, other in names.items()}


def lines(caplog, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{name}: ")]


class Seven(Pictures):
    """Training has classes 0 to 2, validation a few images of each and of two more; one class has one image."""

    num_classes = 5
    class_names = ("cat", "dog", "ship", "frog", "owl")
    unseen_class_names = ("frog", "owl")

    def __init__(self, only_unseen: bool = False) -> None:
        super().__init__()
        images, labels = pictures(40, 1).tensors
        others = pictures(10, 5).tensors[0]
        parts = [(255 - others[:9], torch.full((9,), 3)), (255 - others[9:], torch.full((1,), 4))]
        if not only_unseen:
            parts.append((images[::3], labels[::3]))
        self.val = TensorDataset(torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]))
        self.val.labels = self.val.tensors[1]

    def val_dataloader(self) -> DataLoader:
        loader = self.loader(self.val)
        loader.dataset.labels = self.val.labels
        return loader


def test_leave_one_out_is_that_of_the_accuracy_calculator(tmp_path, caplog):
    returned = Returned()
    run = trainer(tmp_path, RetrievalMonitor(), returned)
    logged = run.validate(Encoder(), Seven(), verbose=False)[0]
    assert logged.keys() == {f"val/{name}{suffix}" for name in SCORES for suffix in ("", "_macro")}
    rows = torch.nn.functional.normalize(torch.from_numpy(returned.rows), dim=1)
    for macro in (False, True):
        expected = theirs(rows, torch.from_numpy(returned.labels), macro=macro)
        assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    run.validate(Encoder(), Seven(), verbose=False)
    assert lines(caplog, "RetrievalMonitor") == [
        "RetrievalMonitor: val/map_at_r, val/r_precision and val/recall_at_k are over 23 images of 4 classes, each "
        "compared with all others; 1 without another image of their class do not count"
    ]


def test_a_gallery_is_that_of_a_loader_or_of_the_data_module_in_tests(tmp_path):
    class WithGallery(Pictures):
        def gallery_dataloader(self) -> DataLoader:
            return self.loader(self.val)

    returned = Returned()
    logged = trainer(tmp_path, RetrievalMonitor(), returned).test(Encoder(), WithGallery(), verbose=False)[0]
    queries = torch.from_numpy(returned.rows), torch.from_numpy(returned.labels)
    trainer(tmp_path, returned).validate(Encoder(), WithGallery(), verbose=False)
    gallery = torch.from_numpy(returned.rows), torch.from_numpy(returned.labels)
    expected = theirs(*(torch.nn.functional.normalize(each, dim=1) if each.ndim == 2 else each
                        for each in (*queries, *gallery)))  # fmt: skip
    assert {name.replace("test", "val"): value for name, value in logged.items() if name.replace("test", "val")
            in expected} == pytest.approx(expected, abs=1e-6)  # fmt: skip
    rows = [(image / 255 - 0.5, label) for image, label in Pictures.val]
    monitor = RetrievalMonitor(gallery=DataLoader(rows, batch_size=16))
    queries_loader = DataLoader([(image / 255 - 0.5, label) for image, label in Pictures.train], batch_size=16)
    plain = trainer(tmp_path, monitor).validate(Encoder(), queries_loader, verbose=False)[0]
    assert plain["val/map_at_r"] == pytest.approx(logged["test/map_at_r"], abs=1e-6)


def log(folder, world: int, limit: int | None) -> None:
    options = {"strategy": "ddp", "devices": world} if world > 1 else {}
    run = trainer(folder, RetrievalMonitor(max_queries=limit), OnlineKNN(), precision="64-true", **options)
    values = run.validate(Encoder(), Seven(), verbose=False)[0]
    torch.save(values, folder / f"logged{world}.{run.global_rank}.pt")


def test_two_processes_log_what_one_logs(tmp_path):
    log(tmp_path, 1, None)
    assert start_ranks(2, log, tmp_path, 2, None) == [0, 0]
    (one,) = saved(tmp_path, "logged1", 1)
    assert len(one) == 16
    for found in saved(tmp_path, "logged2", 2):
        assert found == pytest.approx(one, rel=UNIT)


def test_more_queries_than_the_limit_are_a_subset_that_is_stated(tmp_path, caplog):
    returned = Returned()
    monitor = RetrievalMonitor(max_queries=12)
    logged = trainer(tmp_path, monitor, returned).validate(Encoder(), Pictures(), verbose=False)[0]
    again = trainer(tmp_path, RetrievalMonitor(max_queries=12)).validate(Encoder(), Pictures(), verbose=False)[0]
    assert logged == again
    (line, _) = lines(caplog, "RetrievalMonitor")
    assert "are over 12 images of 3 classes, each compared with all others" in line
    assert "; max_queries=12 of 40 images of 3 classes are queries, the classes in proportion" in line
    everything = trainer(tmp_path, RetrievalMonitor()).validate(Encoder(), Pictures(), verbose=False)[0]
    assert logged["val/recall_at_1"] * 12 == pytest.approx(round(logged["val/recall_at_1"] * 12))
    assert everything["val/recall_at_1"] * 40 == pytest.approx(round(everything["val/recall_at_1"] * 40))


def test_a_limit_on_two_processes_chooses_as_many_queries(tmp_path):
    assert start_ranks(2, log, tmp_path, 2, 12) == [0, 0]
    first, second = saved(tmp_path, "logged2", 2)
    assert first == second
    assert first["val/recall_at_1"] * 12 == pytest.approx(round(first["val/recall_at_1"] * 12))


def test_without_a_pair_nothing_is_logged(tmp_path, caplog):
    class Alone(Pictures):
        val = TensorDataset(pictures(3, 0).tensors[0], torch.arange(3))

    assert trainer(tmp_path, RetrievalMonitor()).validate(Encoder(), Alone(), verbose=False) == [{}]
    assert "are not logged: no image has another of its class" in lines(caplog, "RetrievalMonitor")[0]


def test_knn_is_over_the_classes_of_the_bank(tmp_path, caplog):
    data, returned = Seven(), Returned()
    logged = trainer(tmp_path, OnlineKNN(), returned).validate(Encoder(), data, verbose=False)[0]
    rows, labels = torch.from_numpy(returned.rows), torch.from_numpy(returned.labels)
    with torch.no_grad():
        bank = Encoder().eval().embed(data.prepare(data.train.tensors, False)[0])
    bank_labels, known = data.train.tensors[1], labels < 3
    unit = bank / bank.norm(dim=1, keepdim=True)
    means = torch.stack([unit[bank_labels == label].mean(dim=0) for label in range(3)])
    predicted = {
        "knn": knn_predict(rows[known], bank, bank_labels),
        "nearest_class_mean": nearest_class_mean_predict(rows[known], means, "cosine"),
    }
    for name, classes in predicted.items():
        correct = (classes == labels[known]).double()
        each = [correct[labels[known] == label].mean().item() for label in range(3)]
        assert logged[f"val/{name}"] == pytest.approx(correct.mean().item(), rel=UNIT)
        assert logged[f"val/{name}_macro"] == pytest.approx(np.mean(each), rel=UNIT)
    assert lines(caplog, "OnlineKNN") == [
        "OnlineKNN: val/knn and val/nearest_class_mean are over 14 images of 3 classes, with the bank of 60 images of "
        "3 classes; 10 images of 2 classes that the bank lacks do not count"
    ]


def test_knn_is_not_logged_where_the_bank_has_none_of_the_classes(tmp_path, caplog):
    assert trainer(tmp_path, OnlineKNN()).validate(Encoder(), Seven(only_unseen=True), verbose=False) == [{}]
    assert lines(caplog, "OnlineKNN") == [
        "OnlineKNN: val/knn and val/nearest_class_mean are not logged: the bank of 60 images of 3 classes has no class "
        "of this split"
    ]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("data", "callbacks", "metric"),
    [
        (Pictures, (OnlineKNN, RetrievalMonitor), "val/knn"),
        (Seven, (OnlineKNN, RetrievalMonitor), "val/knn"),  # validation has seen classes as well
        (lambda: Seven(only_unseen=True), (OnlineKNN, RetrievalMonitor), "val/map_at_r"),
        (Pictures, (RetrievalMonitor,), "val/map_at_r"),
        (Pictures, (OnlineKNN,), "val/knn"),
    ],
)
def test_the_best_checkpoint_has_a_metric_that_is_logged(tmp_path, data, callbacks, metric):
    best = BestCheckpoint()
    parts = [best, *(each() for each in callbacks)]
    run = trainer(tmp_path, *parts, enable_checkpointing=True, max_epochs=2)
    run.fit(Encoder(), data())
    assert best.monitor == metric
    saved_as = torch.load(best.best_model_path, weights_only=True)["callbacks"]
    (state,) = [state for name, state in saved_as.items() if name.startswith("BestCheckpoint")]
    assert state["monitor"] == metric
    resumed = BestCheckpoint()
    again = trainer(tmp_path, resumed, *(each() for each in callbacks), enable_checkpointing=True, max_epochs=2)
    again.fit(Encoder(), data(), ckpt_path=best.best_model_path, weights_only=True)
    assert resumed.monitor == metric
    assert resumed.best_model_score >= best.best_model_score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": ()}, r"ks must be numbers of at least 1, got \[\]"),
        ({"ks": (0,)}, r"ks must be numbers of at least 1, got \[0\]"),
        ({"max_queries": 0}, "max_queries must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RetrievalMonitor(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--knn", "null", "--retrieval", "null"], "which --knn null and --retrieval null switch off"),
        (
            ["--retrieval", "null", "--best.monitor", "val/map_at_r"],
            "val/map_at_r, which --retrieval null switches off",
        ),
    ],
)
def test_a_metric_that_is_switched_off_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "DigitsPairDataModule", "--model", "SimOModule", "--model.encoder", "torch.nn.Flatten"]
    with pytest.raises(SystemExit):
        main(["fit", *data, *arguments])
    assert message in capsys.readouterr().err
