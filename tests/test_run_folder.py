"""Which folder a run gets: real processes that start at the same time, and real runs of the command."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from simo_lightning.run_folder import Start, claim_run_folder, newest_run
from tests.digits_run import FEW_PLOTS, QUIET, SIMO, SMALL, fit, weights
from tests.rank_processes import CONTEXT

BRIEF = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--plots", "null", "--best", "null"]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def claim(environment: dict[str, str], config: str, resume: bool, answer: Path) -> None:
    os.environ |= environment
    os.environ.pop("SIMO_RUN_DIR", None)
    answer.write_text(str(claim_run_folder(Path("runs"), Start.of_this_process(config), resume)[0]))


def start(*starts: tuple[dict[str, str], str], resume: bool = True) -> list[str]:
    """Processes that all start at once. Returns the folder that each chose."""
    answers = [Path(f"answer_{place}") for place in range(len(starts))]
    processes = [
        CONTEXT.Process(target=_claim_in, args=(Path.cwd(), *each, resume, answer.absolute()))
        for each, answer in zip(starts, answers, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [Path(answer.read_text()).name for answer in answers]


def _claim_in(folder: Path, environment: dict[str, str], config: str, resume: bool, answer: Path) -> None:
    os.chdir(folder)
    claim(environment, config, resume, answer)


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
    assert sorted(path.name for path in Path("runs/digits").iterdir()) == ["job_99", "job_99-2"]
    for run in Path("runs/digits").iterdir():
        assert [path.name for path in (run / "starts").iterdir()] == ["0.json"]
        assert (run / "checkpoints" / "last.ckpt").is_file()
