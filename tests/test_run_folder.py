"""Which folder a run gets: real processes that start at the same time, and real runs of the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simo_lightning.run_folder import Start, claim_run_folder, newest_run
from tests.digits_run import FEW_PLOTS, QUIET, SIMO, SMALL, fit, weights

BRIEF = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--plots", "null", "--best", "null"]
PACKAGE = Path(__file__).parent.parent / "simo_lightning"
# The module alone, without the package and what it imports, so that a process starts in a moment.
CLAIM = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from run_folder import Start, claim_run_folder
print("ready", flush=True)
sys.stdin.readline()
print(claim_run_folder(Path("runs"), Start.of_this_process(sys.argv[2]), bool(int(sys.argv[3])))[0])
"""


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def start(*starts: tuple[dict[str, str], str], resume: bool = True) -> list[str]:
    """Processes that all choose a folder at once. Returns the folder that each chose."""
    processes = []
    for environment, config in starts:
        words = [sys.executable, "-S", "-c", CLAIM, str(PACKAGE), config, str(int(resume))]
        names = {**os.environ, **environment}
        names.pop("SIMO_RUN_DIR", None)
        processes.append(subprocess.Popen(words, env=names, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    chosen = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [Path(path.strip()).name for path in chosen]


def step(number: int, restart: int = 0, job: str = "99") -> dict[str, str]:
    """What SLURM gives each process of a step with several tasks."""
    names = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": str(number), "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    return names | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})


def train(folder: str) -> None:
    """What a run leaves once it trains."""
    checkpoint = Path("runs", folder, "checkpoints", "last.ckpt")
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()


def test_all_processes_of_a_step_choose_one_folder_and_another_step_another() -> None:
    assert start(*[(step(0), "a")] * 8) == ["job_99"] * 8
    train("job_99")
    assert start(*[(step(1), "b")] * 8) == ["job_99-2"] * 8  # the next seed of a loop
    train("job_99-2")
    assert start(*[(step(1), "b")] * 4) == ["job_99-3"] * 4  # the same command again
    record = json.loads(Path("runs/job_99-2/starts/0.json").read_text())
    assert (record["job"], record["config"], record["restarts"]) == ("99", "b", [0, 0])


def test_two_steps_that_start_at_once_get_two_folders_and_find_them_again_after_a_requeue() -> None:
    chosen = start(*[(step(0), "a"), (step(1), "b")] * 4)
    first, second = chosen[0], chosen[1]
    assert {first, second} == {"job_99", "job_99-2"}
    assert chosen == [first, second] * 4
    train(first)
    train(second)
    again = [(step(0, restart=1), "b"), (step(1, restart=1), "a")] * 4  # the steps are numbered anew
    assert start(*again) == [second, first] * 4
    train(first)
    assert start(*[(step(0, restart=1), "a")] * 4) == ["job_99-3"] * 4  # not restarted since


def test_two_steps_of_one_config_keep_two_folders_after_a_requeue() -> None:
    assert set(start(*[(step(0), "a"), (step(1), "a")] * 4)) == {"job_99", "job_99-2"}
    chosen = start(*[(step(0, restart=1), "a"), (step(1, restart=1), "a")] * 4)
    assert chosen in (["job_99", "job_99-2"] * 4, ["job_99-2", "job_99"] * 4)


def test_a_restart_without_resuming_is_a_new_run() -> None:
    assert start(*[(step(0), "a")] * 2) == ["job_99"] * 2
    train("job_99")
    assert start(*[(step(0, restart=1), "a")] * 2, resume=False) == ["job_99-2"] * 2


def test_a_torchrun_run_resumes_under_its_id_with_the_same_config_alone() -> None:
    def worker(restart: int) -> dict[str, str]:
        names = {"TORCHELASTIC_RUN_ID": "mine", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "WORLD_SIZE": "4"}
        return names | {"TORCHELASTIC_RESTART_COUNT": str(restart)}

    assert start(*[(worker(0), "a")] * 4) == ["job_mine"] * 4
    train("job_mine")
    assert start(*[(worker(1), "a")] * 4) == ["job_mine"] * 4  # restarted by torchrun
    train("job_mine")
    assert start(*[(worker(0), "a")] * 4) == ["job_mine"] * 4  # launched again
    train("job_mine")
    assert start(*[(worker(0), "b")] * 4) == ["job_mine-2"] * 4


def test_starts_outside_a_job_at_once_get_folders_of_their_own() -> None:
    assert sorted(start(*[({}, "a")] * 4)) == [f"version_{number}" for number in range(4)]


def test_several_processes_without_a_job_must_be_given_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--run_dir must be given"):
        claim_run_folder(Path("runs"), Start.of_this_process("a"), resume=True)


def test_the_newest_run_is_that_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("version_0", "version_3", "job_9", "job_9-2", "job_99", "job_99-2"):
        path = Path("runs", name, "checkpoints", "best.ckpt")
        path.parent.mkdir(parents=True)
        path.touch()
    assert newest_run(Path("runs"), "best").name == "version_3"
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    assert newest_run(Path("runs"), "best").name == "job_99-2"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert newest_run(Path("runs"), "best").name == "version_3"


def test_two_runs_in_one_job_and_a_requeue(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A loop over seeds in one job, as the shipped scripts run it; then SLURM starts the job again."""
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    root = Path("runs/digits")
    words = [*BRIEF, "--ckpt_path", "last"]
    fit(*words, "--seed_everything", "1")
    first = weights(root / "job_99/checkpoints/last.ckpt")
    fit(*words, "--seed_everything", "2")
    assert sorted(path.name for path in root.iterdir()) == ["job_99", "job_99-2"]
    assert str(root / "job_99-2/checkpoints/last.ckpt") in capfd.readouterr().out
    second = weights(root / "job_99-2/checkpoints/last.ckpt")
    assert any(not weight.equal(second[name]) for name, weight in first.items())
    assert all(weight.equal(first[name]) for name, weight in weights(root / "job_99/checkpoints/last.ckpt").items())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fit(*words, "--seed_everything", "2")
    out = capfd.readouterr().out
    assert f"resuming from {root}/job_99-2/checkpoints/last.ckpt: epoch 0, step 2" in out
    assert "nothing was trained: the run was already complete at step 2" in out
    assert sorted(path.name for path in root.iterdir()) == ["job_99", "job_99-2"]


def test_a_run_that_resumes_with_other_settings_prints_them(capfd: pytest.CaptureFixture[str]) -> None:
    fit(*BRIEF, "--run_dir", "mine")
    fit(*BRIEF, "--run_dir", "mine", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert "with settings that differ from config.yaml: trainer.max_steps 2 -> 3" in capfd.readouterr().out
    Path("mine", "config.yaml").write_text("trainer: [")
    fit(*BRIEF, "--run_dir", "mine", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert "mine/config.yaml cannot be compared with the settings of this start: " in capfd.readouterr().out


@pytest.mark.slow  # half a minute: five processes import torch
def test_two_tasks_of_a_slurm_step_share_a_run() -> None:
    """The environment of ``srun`` with two tasks, without SLURM itself."""
    words = ["fit", *SMALL, *QUIET, *FEW_PLOTS, *BRIEF, "--ckpt_path", "last"]
    words += ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    for number, seed in enumerate((1, 2)):
        tasks = []
        for rank in range(2):
            names = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}
            names |= {"SLURM_JOB_ID": "99", "SLURM_STEP_ID": str(number), "SLURM_NTASKS_PER_NODE": "2"}
            names |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "simo"}
            command = [SIMO, *words, "--seed_everything", str(seed)]
            tasks.append(subprocess.Popen(command, env=os.environ | names, stderr=subprocess.PIPE))
        for task in tasks:
            error = task.communicate(timeout=200)[1]
            assert task.returncode == 0, error.decode()[-2000:]
            assert b"sync_dist" not in error  # Lightning warns of metrics that differ between processes
    assert sorted(path.name for path in Path("runs/digits").iterdir()) == ["job_99", "job_99-2"]
    for run in Path("runs/digits").iterdir():
        assert [path.name for path in (run / "starts").iterdir()] == ["0.json"]
        assert (run / "checkpoints" / "last.ckpt").is_file()
