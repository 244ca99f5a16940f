"""The protocol of ``python -m benchmarks``: its tasks, scores and sweeps, and the command itself on digits."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_metric_learning.losses import SupConLoss
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, normalize

from benchmarks.__main__ import main
from benchmarks.adapters import JointLoss
from benchmarks.experiments import append
from benchmarks.tasks import data, scores, tables
from benchmarks.tasks.geometry import geometry
from benchmarks.tasks.plan import Plan, Run
from benchmarks.tasks.train import composition, make_module
from simo_lightning import SimOLoss
from simo_lightning.data import LabelledImages
from simo_lightning.functional import map_at_r

ROOT = Path(__file__).resolve().parents[1]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_digits(folder: Path) -> None:
    """Fifteen training and ten test images of each of the ten digits, as class folders."""
    digits = load_digits()
    for label in range(10):
        for number, index in enumerate(np.flatnonzero(digits.target == label)[:25]):
            path = folder / ("train" if number < 15 else "test") / f"digit{label}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize((16, 16)).save(path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


ABOUT = {
    "image_size": 16,
    "val_fraction": 0.2,
    "coarse": {"low": [f"digit{i}" for i in range(5)], "high": [f"digit{i}" for i in range(5, 10)]},
}


def test_the_closed_set_holds_validation_images_out_of_training(digits: Path) -> None:
    closed = data.make("closed", digits, ABOUT, {})
    assert closed.train.labels.bincount().tolist() == [12] * 10
    assert closed.val.labels.bincount().tolist() == [3] * 10
    assert closed.test.labels.bincount().tolist() == [10] * 10
    train = {image.numpy().tobytes() for image in closed.train.images}
    assert not any(image.numpy().tobytes() in train for image in closed.val.images)


def test_a_split_of_validation_images_stays_apart(digits: Path, tmp_path: Path) -> None:
    for split, source in (("train", "train"), ("val", "test"), ("test", "test")):
        (tmp_path / split).symlink_to(digits / source)
    closed = data.make("closed", tmp_path, {**ABOUT, "val_fraction": None}, {})
    assert closed.train.labels.bincount().tolist() == [15] * 10
    assert torch.equal(closed.val.images, closed.test.images)


def test_unseen_classes_are_in_no_other_split(digits: Path) -> None:
    images = data.make("unseen", digits, ABOUT, {"classes": 0.5})
    assert images.unseen is not None
    assert len(images.train.class_names) == len(images.unseen.class_names) == 5
    assert not {*images.train.class_names} & {*images.unseen.class_names}
    assert images.train.class_names == images.val.class_names == images.test.class_names
    assert len(images.unseen) == 50


def test_coarse_labels_train_and_true_ones_judge(digits: Path) -> None:
    images = data.make("coarse", digits, ABOUT, {})
    assert images.train.labels.bincount().tolist() == [60, 60]
    assert images.bank_labels.bincount().tolist() == [12] * 10
    high, low = images.train.labels[images.bank_labels == 9], images.train.labels[images.bank_labels == 0]
    assert high.unique().tolist() != low.unique().tolist()
    with pytest.raises(ValueError, match="coarse must name every class, got none for digit5"):
        data.make("coarse", digits, {**ABOUT, "coarse": {"low": ABOUT["coarse"]["low"]}}, {})


def test_a_long_tail_falls_exponentially_by_the_factor() -> None:
    kept = data.tail(torch.arange(10).repeat(500), 50)
    counts = torch.arange(10).repeat(500)[kept].bincount().sort(descending=True).values
    wanted = [round(500 * 50 ** (-rank / 9)) for rank in range(10)]
    assert counts.tolist() == wanted
    assert wanted[0] == 50 * wanted[-1]


def test_wrong_labels_are_a_share_of_every_class() -> None:
    labels = torch.arange(10).repeat_interleave(100)
    changed = data.wrong_labels(labels, 10, 0.4)
    assert (changed != labels).view(10, 100).sum(1).tolist() == [40] * 10
    assert changed.min() == 0
    assert changed.max() == 9


def test_a_part_of_the_images_and_classes(digits: Path) -> None:
    images = data.make("closed", digits, ABOUT, {"images_per_class": 4, "number_of_classes": 3})
    assert images.train.labels.bincount().tolist() == [4, 4, 4]
    assert images.test.labels.bincount().tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("setting", "given", "classes", "each", "wanted"),
    [
        ((4, 3), {}, 6, 5, (4, 3)),
        ((4, 3), {}, 2, 5, (2, 3)),  # a smaller batch, as the other tasks have
        ((4, 3), {"number_of_classes": 2}, 2, 9, (2, 6)),
        ((4, 3), {"number_of_classes": 2}, 2, 5, (2, 5)),
        ((4, 3), {"images_per_class": 2}, 9, 2, (6, 2)),
        ((4, 3), {"images_per_class": 2}, 5, 2, (5, 2)),
        ((4, 3), {"images_per_class": 4}, 9, 4, (4, 3)),
    ],
)
def test_a_part_keeps_the_images_of_a_batch(
    setting: tuple[int, int], given: dict[str, int], classes: int, each: int, wanted: tuple[int, int]
) -> None:
    names = ("classes_per_batch", "samples_per_class")
    labels = torch.arange(classes).repeat_interleave(each)
    images = LabelledImages(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, [*map(str, range(classes))])
    about = {"classes_per_batch": 99, "samples_per_class": 99}
    assert composition(about, dict(zip(names, setting, strict=True)), given, images) == dict(
        zip(names, wanted, strict=True)
    )


def test_few_shot_accuracy_is_that_of_plain_loops() -> None:
    labels = torch.arange(6).repeat_interleave(20)
    embeddings = normalize(torch.eye(6)[labels] + 0.7 * draw(120, 6))
    found = scores.few_shot(embeddings, labels, ways=3, shots=2)
    random, hits = np.random.default_rng(0), []
    rows = embeddings.double().numpy()
    for _ in range(4000):
        classes = random.choice(6, 3, replace=False)
        drawn = [random.permutation(np.flatnonzero(labels.numpy() == each)) for each in classes]
        means = [rows[each[:2]].mean(0) for each in drawn]
        means = [each / np.linalg.norm(each) for each in means]
        own = [
            np.argmax([rows[index] @ mean for mean in means]) == place
            for place, each in enumerate(drawn)
            for index in each[2:17]
        ]
        hits.append(np.mean(own))
    half = found["few_shot_3_way_2_shot_interval"]
    error = math.hypot(half / 1.96, np.std(hits) / math.sqrt(len(hits)))
    assert abs(found["few_shot_3_way_2_shot"] - np.mean(hits)) < 4 * error
    assert half == pytest.approx(1.96 * np.std(hits) / math.sqrt(scores.EPISODES), rel=0.15)
    assert scores.few_shot(embeddings, labels, ways=7, shots=1) == {}


def test_the_temperature_has_the_smallest_cross_entropy() -> None:
    labels = torch.arange(200) % 5
    logits = torch.eye(5)[labels] + 0.6 * draw(200, 5)
    best = minimize_scalar(
        lambda x: float(cross_entropy(logits.double() * math.exp(x), labels)), bounds=(-5, 7), method="bounded"
    )
    assert scores.temperature(logits, labels) == pytest.approx(math.exp(best.x), rel=1e-3)


def test_probabilities_that_are_right_have_a_small_calibration_error() -> None:
    probability = 0.5 + 0.5 * torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(20_000, generator=torch.Generator().manual_seed(1)) > probability).long()
    pairs = torch.stack((probability, 1 - probability), dim=1)
    error, accuracy = scores.calibration_error(pairs, labels)
    assert error < 0.02  # 15 bins of which 8 are filled: sampling alone gives about 0.008
    assert accuracy == pytest.approx(0.75, abs=0.01)
    wrong, _ = scores.calibration_error(pairs.square() / pairs.square().sum(1, keepdim=True), labels)
    assert wrong > 0.05


def test_compression_keeps_what_lies_in_the_leading_directions() -> None:
    labels = torch.arange(120) % 6
    embeddings = torch.zeros(120, 40)
    embeddings[:, :6] = torch.eye(6)[labels] + 0.3 * draw(120, 6)
    rotation = torch.linalg.qr(draw(40, 40, seed=1)).Q
    found = scores.compression(embeddings @ rotation, embeddings @ rotation, labels)
    whole = float(map_at_r(embeddings, labels))
    names = ("8", "16", "32", "int8", "binary", "rotated_binary")
    assert set(found) == {f"map_at_r_{name}" for name in names}
    assert found["map_at_r_8"] == pytest.approx(whole, abs=1e-4)  # six directions have everything
    assert found["map_at_r_int8"] == pytest.approx(whole, abs=0.01)
    assert found["map_at_r_binary"] < whole
    # one axis for each class: without a rotation 34 bits of 40 are noise alone
    found = scores.compression(*(embeddings + 0.01 * draw(120, 40, seed=2),) * 2, labels)
    assert found["map_at_r_binary"] < found["map_at_r_rotated_binary"]


def test_the_geometry_of_class_means_is_that_of_loops() -> None:
    labels, test_labels = torch.arange(30) % 5, torch.arange(20) % 5
    train = torch.eye(5, 3)[labels] + 0.4 * draw(30, 3)  # five classes in three dimensions
    test = torch.eye(5, 3)[test_labels] + 0.4 * draw(20, 3, seed=1)
    found = geometry(train, labels, test, test_labels)

    def means(embeddings: torch.Tensor, of: torch.Tensor) -> list[np.ndarray]:
        rows = [np.array(row) / np.linalg.norm(row) for row in embeddings.double().tolist()]
        return [np.mean([row for row, label in zip(rows, of, strict=True) if label == c], axis=0) for c in range(5)]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for name, own in (("cosine", means(train, labels)), ("test_cosine", means(test, test_labels))):
        pairs = [cosine(own[i], own[j]) for i in range(5) for j in range(5) if i != j]
        assert found[name] == pytest.approx(math.sqrt(np.mean(np.square(pairs))), rel=1e-5)
    own = means(train, labels)
    pairs = [cosine(own[i], own[j]) for i in range(5) for j in range(5) if i != j]
    assert found["largest"] == pytest.approx(max(pairs), rel=1e-5)
    assert found["shortest"] == pytest.approx(min(np.linalg.norm(each) for each in own), rel=1e-5)
    against = [cosine(row, own[label]) < 0 for row, label in zip(train.double().numpy(), labels, strict=True)]
    assert found["opposite"] == np.mean(against)
    assert 0 < found["opposite"] < 1
    assert found["bound"] == pytest.approx(math.sqrt(2 / (3 * 4)))  # (C - D) / (D (C - 1))
    assert found["bound"] <= found["cosine"]


def test_unknown_images_are_scored_by_a_half_that_did_not_choose() -> None:
    means = torch.eye(8)
    bank_labels, known_labels = torch.arange(200) % 4, torch.arange(80) % 4
    bank, known = means[bank_labels] + 0.1 * draw(200, 8), means[known_labels] + 0.1 * draw(80, 8, seed=1)
    other_labels = torch.arange(40) % 4
    others = means[4 + other_labels] + 0.1 * draw(40, 8, seed=2)
    found = scores.unknown(bank, bank_labels, known, others, other_labels)
    assert found["auroc_best"] == found["auroc_cosine"] == 1.0  # all others are orthogonal to the known classes
    assert found["fpr95_best"] == 0.0
    mixed = others.clone()
    mixed[other_labels % 2 == 1] = known[:20]  # the half that is judged looks known, the other half does not
    assert scores.unknown(bank, bank_labels, known, mixed, other_labels)["auroc_best"] < 0.75


def test_accuracy_by_frequency_is_a_mean_over_classes() -> None:
    bank_labels = torch.repeat_interleave(torch.arange(6), torch.tensor([60, 50, 20, 10, 4, 2]))
    labels = torch.arange(6).repeat(5)
    test = torch.eye(6)[labels]
    test[labels == 5] = torch.eye(6)[0]  # the rarest is always taken for the most frequent
    found = scores.by_frequency(torch.eye(6)[bank_labels], bank_labels, test, labels)
    assert found == {
        "accuracy_balanced": pytest.approx(5 / 6),
        "accuracy_frequent": 1.0,
        "accuracy_middle": 1.0,
        "accuracy_rare": 0.5,
    }


TABLE = {
    "data": {
        "digits": {
            "title": "Digits",
            "about": "10 classes",
            "embedding_dim": 10,
            "classes_per_batch": 10,
            "samples_per_class": 3,
            "batches": [{"classes_per_batch": 5}],
            "epochs": 2,
            "augment": {"crop_padding": 1, "flip": 0.0},
            **ABOUT,
        }
    },
    "encoder": {"backbone": "resnet10", "width": 0.125, "stem": "small"},
    "rates": [0.004, 0.008],
    "sweep_batches": True,
    "projection_heads": False,
    "seeds": [0, 1],
    "losses": {
        "simo": {"title": "SimO", "loss": {"class_path": "simo_lightning.SimOLoss"}, "variants": [{"eps": 0.1}]},
        "cross_entropy": {
            "title": "cross-entropy",
            "loss": {"class_path": "simo_lightning.losses.ClassifierLoss"},
            "variants": [{"label_smoothing": 0.1}],
        },
    },
    "tasks": {"closed": {"title": "closed set"}, "unseen": {"title": "unseen classes", "classes": 0.5}},
}


def write_runs(plan: Plan, values: dict[tuple[str, float, str], float | None]) -> None:
    """Finished runs of the first seed, by loss, rate and variant: MAP@R among validation images, None: diverged."""
    rows = [
        {
            **plan.keys(Run("digits", "closed", loss, variant, rate, 0)),
            "error": None if value is not None else "diverged",
            "val_map_at_r": value,
            "seconds": 1.0,
            "course": "1.0:0.1",
        }
        for (loss, rate, variant), value in values.items()
    ]
    append(plan.out / "tasks.csv", rows)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    table = tmp_path / "table.yaml"
    table.write_text(yaml.safe_dump(TABLE))
    return Plan(tmp_path / "out", table)


def test_a_sweep_widens_until_its_best_rate_is_between_others(plan: Plan) -> None:
    stages = plan.stages(["digits"], ["closed"], ["simo"])
    runs, scored = next(stages)
    assert [(run.rate, run.seed, scored) for run in runs] == [(0.004, 0, False), (0.008, 0, False)]
    write_runs(plan, {("simo", 0.004, ""): 0.2, ("simo", 0.008, ""): 0.3})
    assert [run.rate for run in next(stages)[0]] == [0.016]
    write_runs(plan, {("simo", 0.016, ""): None})  # diverged, which ends the sweep there
    variants, scored = next(stages)
    assert [(run.rate, json.loads(run.variant), scored) for run in variants] == [(0.008, {"eps": 0.1}, False)]
    write_runs(plan, {("simo", 0.008, '{"eps": 0.1}'): 0.35})
    batches, scored = next(stages)  # with the best variant
    assert [json.loads(run.variant) for run in batches] == [{"eps": 0.1, "classes_per_batch": 5}]
    assert plan.setting(batches[0])["classes_per_batch"] == 5
    write_runs(plan, {("simo", 0.008, batches[0].variant): 0.2})
    chosen, scored = next(stages)
    assert [(run.rate, run.seed, scored) for run in chosen] == [(0.008, 0, True), (0.008, 1, True)]
    assert {run.variant for run in chosen} == {'{"eps": 0.1}'}
    assert plan.setting(variants[0])["init_args"] == {"eps": 0.1}


def test_a_sweep_whose_run_fails_ends(plan: Plan) -> None:
    stages = plan.stages(["digits"], ["closed"], ["simo"])
    next(stages)
    write_runs(plan, {("simo", 0.004, ""): 0.2, ("simo", 0.008, ""): 0.3})
    assert [run.rate for run in next(stages)[0]] == [0.016]
    assert [run.variant for run in next(stages)[0]] == ['{"eps": 0.1}']  # the run at 0.016 left no result


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "a folder of images is needed: --cifar10 DIR, --tiny_imagenet DIR, --grocery DIR"),
        (["--grocery", "nowhere"], "--grocery must hold folders train, val, test, got nowhere"),
        (["--table", "nothing.yaml"], "--table must be a file, got nothing.yaml"),
        (["--loses", "simo"], "unrecognized arguments: --loses simo"),
    ],
)
def test_wrong_arguments_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--out", "out", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(f"error: {told}")


def test_no_results_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--out", str(tmp_path), "--figure", "sizes.png"])
    with pytest.raises(SystemExit) as stop:
        tables.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"got none in {tmp_path}")


def test_a_joint_loss_is_the_sum_of_both() -> None:
    embeddings, labels = draw(12, 8), torch.arange(12) % 3
    others = {"simo": (SimOLoss, {"eps": 0.1}), "supcon": (SupConLoss, {"temperature": 0.2})}
    for name, (make, arguments) in others.items():
        other, joint = make(**arguments), JointLoss(weight=0.3, label_smoothing=0.1, other=name, **arguments)
        joint.configure(3, 8)
        classifier = joint.losses["classifier"]
        weight, bias = classifier.weight, classifier.bias
        wanted = cross_entropy(embeddings @ weight.T + bias, labels, label_smoothing=0.1) + 0.3 * other(
            embeddings, labels
        )
        torch.testing.assert_close(joint(embeddings, labels), wanted)


def test_a_projection_head_is_tried_last_at_rates_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({**TABLE, "projection_heads": True}))
    plan = Plan(tmp_path / "out", tmp_path / "table.yaml")
    stages = plan.stages(["digits"], ["closed"], ["simo"])
    next(stages)
    write_runs(plan, {("simo", 0.004, ""): 0.2, ("simo", 0.008, ""): 0.4, ("simo", 0.016, ""): 0.3})
    assert [json.loads(run.variant) for run in next(stages)[0]] == [{"eps": 0.1}]
    write_runs(plan, {("simo", 0.008, '{"eps": 0.1}'): 0.5})
    assert [json.loads(run.variant) for run in next(stages)[0]] == [{"eps": 0.1, "classes_per_batch": 5}]
    heads, scored = next(stages)
    wanted = {"eps": 0.1, "projection_head": True}
    assert [(run.rate, json.loads(run.variant)) for run in heads] == [(0.008, wanted), (0.016, wanted)]
    assert not scored
    setting = plan.setting(heads[0])
    assert setting["projection_head"]
    assert "projection_head" not in setting["init_args"]
    write_runs(plan, {("simo", 0.008, heads[0].variant): 0.36, ("simo", 0.016, heads[0].variant): 0.37})
    assert [(run.rate, json.loads(run.variant)) for run in next(stages)[0]] == [(0.032, wanted)]
    write_runs(plan, {("simo", 0.032, heads[0].variant): 0.35})
    chosen, scored = next(stages)
    assert {(run.rate, run.variant) for run in chosen} == {(0.016, heads[0].variant)}  # the best of those with a head
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(TABLE))
    without = Plan(plan.out, tmp_path / "without.yaml")
    assert without.best("digits", "simo") == ('{"eps": 0.1}', 0.008)
    assert len(without.runs()) == len(plan.runs()) - 3
    again = [runs for runs, _ in plan.stages(["digits"], ["closed"], ["simo"])]  # once all results are there
    assert [run.rate for runs in again for run in runs if run.variant == heads[0].variant][:2] == [0.008, 0.016]


def test_behind_a_projection_head_the_embeddings_are_the_features() -> None:
    about = {**ABOUT, "embedding_dim": 6, "encoder": {"backbone": "resnet10", "width": 0.125, "stem": "small"}}
    setting = {"class_path": "simo_lightning.SimOLoss", "init_args": {"eps": 0.1}}
    module = make_module(about, {**setting, "projection_head": True}, 0.01)
    images = torch.zeros(2, 3, 16, 16)
    assert torch.equal(module.encoder(images), module.encoder.features(images))
    module._configure_loss(10, 64)
    assert module.loss.head(torch.zeros(2, 64)).shape == (2, 6)
    assert module.loss.loss.eps == 0.1
    assert make_module(about, setting, 0.01).encoder(images).shape == (2, 6)


def test_runs_of_a_changed_table_do_not_count(plan: Plan, tmp_path: Path) -> None:
    write_runs(plan, {("simo", 0.004, ""): 0.2, ("cross_entropy", 0.004, ""): 0.1})
    assert len(plan.runs()) == 2
    changed = json.loads(json.dumps(TABLE))
    changed["losses"]["simo"]["loss"]["init_args"] = {"eps": 0.5}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(changed))
    assert Plan(plan.out, tmp_path / "table.yaml").runs()["loss"].tolist() == ["cross_entropy"]


def test_a_difference_within_the_spread_of_seeds_is_level(plan: Plan) -> None:
    write_runs(plan, {("simo", 0.004, ""): 0.2, ("cross_entropy", 0.004, ""): 0.1})
    values = {"simo": (0.50, 0.52), "cross_entropy": (0.49, 0.51)}

    def score(**given: tuple[float, float]) -> None:
        rows = [
            {**plan.keys(Run("digits", "closed", loss, "", 0.004, seed)), "error": None, "map_at_r": value}
            for loss, pair in given.items()
            for seed, value in enumerate(pair)
        ]
        append(plan.out / "tasks_scores.csv", rows)

    score(**values)
    assert tables.verdict(plan, "digits", "closed", "simo").startswith("level with cross-entropy, +0.01 (spread 0.02)")
    score(cross_entropy=(0.40, 0.41))  # the latest counts
    assert tables.verdict(plan, "digits", "closed", "simo").startswith("ahead of cross-entropy, +0.105")
    assert tables.preferred(plan, "digits") == "simo"
    score(simo=(math.nan, 0.6))
    assert "simo" not in tables.ranked(plan, "digits", "closed").index
    score(**values)
    score(cross_entropy=(0.40, 0.41))
    titles, _, row, *_ = tables.summary(plan)
    assert titles == "| question | Digits: SimO |"
    assert row.startswith("| Closed set | ahead of cross-entropy, +0.105")


def test_the_sizes_have_a_table_and_a_figure_with_a_line_for_each_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"images_5": {"images_per_class": 5}, "images_10": {"images_per_class": 10}, "classes_3": {}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({**TABLE, "tasks": {"closed": {}, **sizes}}, sort_keys=False))
    plan = Plan(tmp_path / "out", tmp_path / "table.yaml")
    write_runs(plan, {("simo", 0.004, ""): 0.2, ("cross_entropy", 0.004, ""): 0.1})
    rows = [
        {**plan.keys(Run("digits", task, loss, "", 0.004, seed)), "error": None, "map_at_r": value + seed / 10}
        for seed in (0, 1)
        for loss in ("simo", "cross_entropy")
        for task, value in zip(sizes, (0.2, 0.4, 0.5), strict=True)
    ]
    # the closed set, where the settings were chosen, may be all that has been run
    closed = {**plan.keys(Run("digits", "closed", "simo", "", 0.004, 0)), "error": None, "map_at_r": 0.9}
    append(plan.out / "tasks_scores.csv", [closed])
    words = ["--table", str(tmp_path / "table.yaml"), "--out", str(plan.out), "--figure", str(tmp_path / "sizes.png")]
    monkeypatch.setattr(sys, "argv", ["tables", *words])
    with pytest.raises(SystemExit):
        tables.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"got none in {plan.out}")
    append(plan.out / "tasks_scores.csv", rows)
    assert "| MAP@R | images_5 | images_10 | classes_3 |" in tables.page(plan)
    assert "| SimO | 0.250 ± 0.071 | 0.450 ± 0.071 | 0.550 ± 0.071 |" in tables.page(plan)
    left, right = tables.size_figure(plan).axes
    assert {line.get_label() for line in left.containers} == {"SimO", "cross-entropy"}
    assert left.containers[0].lines[0].get_xydata().round(9).tolist() == [[5.0, 0.25], [10.0, 0.45]]
    assert right.containers[0].lines[0].get_xydata().round(9).tolist() == [[3.0, 0.55]]


def test_seconds_to_a_score_are_interpolated() -> None:
    assert tables.seconds_to("2.0:0.2 4.0:0.4 6.0:0.8", 0.6) == pytest.approx(5.0)
    assert tables.seconds_to("2.0:0.2", 0.1) == pytest.approx(1.0)
    assert math.isnan(tables.seconds_to("2.0:0.2", 0.3))


@pytest.mark.slow
def test_the_command_trains_resumes_and_prints_its_tables(digits: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.yaml", tmp_path / "out"
    table.write_text(yaml.safe_dump(TABLE))
    words = [sys.executable, "-m", "benchmarks", "--table", str(table), "--digits", str(digits), "--out", str(out)]
    first = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    for words_of_the_page in (
        "## Digits",
        "### Closed set",
        "### Unseen classes",
        "### Unknown images",
        "### Calibration",
    ):
        assert words_of_the_page in first.stdout
    made = len(Plan(out, table).runs())
    again = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert len(Plan(out, table).runs()) == made
    assert "lr 0" not in again.stdout.split("- machine")[0]
    scored = Plan(out, table).scored()
    assert len(scored) == 2 * 2 * 2  # tasks, losses, seeds
    assert scored["map_at_r"].between(0, 1).all()
    assert scored["few_shot_5_way_1_shot"].notna().sum() == 4


def test_the_page_has_the_tables_of_the_shipped_results() -> None:
    printed = tables.page(Plan())
    assert len(Plan().runs()) > 100
    assert printed in (ROOT / "benchmarks" / "TASKS.md").read_text()
