import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import machine, memory, profile_loss, scaling, scaling_model, startup, throughput, time_to_accuracy
from benchmarks.turns import TakeTurns
from tests.recipe_parts import DIGITS, write_yaml

# Lightning's, of a run that is cut short or of words given twice.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),
]


def run(monkeypatch: pytest.MonkeyPatch, module: object, *words: str) -> dict:
    """What a benchmark writes, called with these words in this process."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *words, "--json", "out.json"])
    module.main()
    result = json.loads(Path("out.json").read_text())
    assert {"command", "hardware", "threads", "versions", "commit"} <= set(result)
    return result


def test_throughput_writes_a_ratio_for_each_way(monkeypatch):
    words = ("--images", "600", "--steps", "1", "--repeats", "2", "--workers", "0", "--trainer.precision", "32")
    result = run(monkeypatch, throughput, *words, "--model.encoder.width", "0.125")
    for name in ("ratio_to_bare_loop", "ratio_to_ordinary_way", "images_per_second", "images_per_second_bare"):
        assert result[name] > 0
    assert len(result["ratios"]) == 2
    assert result["batch_size"] == 120


def test_a_ratio_compares_a_block_with_its_two_neighbours():
    turns = TakeTurns(steps=1, repeats=2)
    turns.bare = [torch.tensor([wall, wall / 2]) for wall in (1.0, 3.0, 5.0)]
    turns.fit = [torch.tensor([4.0, 2.0]), torch.tensor([2.0, 4.0])]
    torch.testing.assert_close(turns.ratios, torch.tensor([[0.5, 0.5], [2.0, 0.5]]))


def test_a_fit_leaves_after_its_first_step(tmp_path):
    code, words = startup.commands(None, str(tmp_path / "run"))["digits, first step"]
    wall, cpu = startup.run(code, words)
    assert wall > 0
    assert cpu > 0
    assert not (tmp_path / "run" / "checkpoints").exists()  # which the first epoch would have written


def test_a_command_that_fails_is_no_time():
    with pytest.raises(RuntimeError, match="ended with 3: why"):
        startup.run("import sys; print('why', file=sys.stderr); sys.exit(3)", [])


@pytest.mark.slow
def test_memory_follows_the_epochs():
    result = memory.growth(4)
    assert len(result["mib"]) == len(result["tensors"]) == 4


@pytest.mark.slow
def test_only_knn_keeps_the_validation_split():
    kept = memory.kept(24_000)
    assert kept["rows_with_knn"] >= 12_000
    assert kept["rows_without"] <= 2 * 4096 + 2000 + 512  # two sums over classes, the plot's points, a batch


def test_a_slope_is_that_of_the_second_half():
    assert memory.slope([100.0, 50.0, 10.0, 12.0, 14.0, 16.0][1:]) == pytest.approx(2.0)


def test_gather_and_loss_run_in_real_processes():
    cases = scaling.start(2, ["--part", "gather", "2", "1"])
    assert [(case["world"], case["rows"], case["dim"]) for case in cases] == [(2, 240, 16), (2, 240, 128)]
    assert all(case["step_ms"] > 0 for case in cases)


def test_the_model_counts_each_byte_and_operation():
    case = scaling_model.Case(rows=3, dim=5, classes=2)
    # of 4 ranks each sends 3 of the 4 parts of the embeddings, of the labels, and of the gradient twice
    sent = sum(3 * (5 * 4 + 8) + 2 * 3 * 5 * 4 for _ in range(3))
    products = 3 + 6  # of (N, 5) with (5, 2): forward and backward; a multiplication and an addition each
    assert scaling_model.gather_cost(4, case) == (sent, products * 2 * 12 * 5 * 2)
    assert scaling_model.moments_cost(4, case) == (0.75 * 4 * (4 * 2 * 5 + 2 * 2), products * 2 * 3 * 5 * 2)


def test_the_page_holds_the_table_of_the_command():
    assert scaling_model.markdown() in (machine.ROOT / "docs" / "scaling.md").read_text()


def test_time_to_accuracy_gives_seconds_or_none(monkeypatch, tmp_path):
    base = write_yaml(tmp_path / "base.yaml", DIGITS)
    words = ("--base", str(base), "--runs", "simo_centroid_softmax:2:4e-3", "--marks", "0.05", "1.1")
    (course,) = run(monkeypatch, time_to_accuracy, *words)["runs"]
    first, last = course["course"]
    assert course["seconds_to"] == {"0.05": first[0], "1.10": None}
    assert 0 < first[0] < last[0]
    assert 0.05 < course["test_knn20"] <= 1


def test_a_run_is_told_by_three_words():
    assert time_to_accuracy.Run.of("my/own.yaml:3:1e-2") == ("my/own.yaml", 3, 0.01)


def test_a_profile_names_the_operations_of_a_loss():
    text = profile_loss.measure("centroid", rows=60, dim=4, classes=3)
    assert text.startswith("centroid, N = 60, D = 4, C = 3: median ")
    assert "_CentroidsBackward" in text
