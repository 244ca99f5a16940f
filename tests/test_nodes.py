"""Two nodes with addresses of their own, processes that are killed, and a shared folder that is lost for a moment."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simo_lightning.data.folder import FolderImages
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.retry import retry_while_lost
from tests.digits_run import assert_equal_weights
from tests.local_nodes import Bridge, SlurmOfTwoNodes

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TORCHRUN = ROOT / "configs" / "slurm" / "torchrun.sh"
# 6 batches an epoch on two processes; saved every 5 steps and at the end of each epoch
WORDS = f"""
    --config {ROOT / "configs" / "digits.yaml"} --model.encoder.width 0.125 --trainer.accelerator cpu
    --trainer.enable_progress_bar false --trainer.enable_model_summary false --plots null --projector null
    --trainer.max_epochs 4 --last.every_n_train_steps 5
""".split()
# Stops the first start of a run at a step: each process by the signals of ``ENDS``, "rank:signal" separated by commas.
ENDING = """
import os, signal, time
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class Ending(Callback):
    def on_before_zero_grad(self, trainer, *_):
        for end in filter(None, os.environ.get("ENDS", "").split(",")):
            rank, number = map(int, end.split(":"))
            marker = Path(trainer.default_root_dir, f"ended_{rank}")
            if trainer.global_step == 14 and trainer.global_rank == rank and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), number)

class Slow(Callback):
    def on_train_batch_end(self, trainer, *_):
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and "SLURM_JOB_ID" in os.environ:
            time.sleep(0.3)
            if trainer.global_step == 14 and trainer.is_global_zero:
                Path("at_step_14").touch()

class Pauses(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 14 and trainer.is_global_zero:
            Path(os.environ["LOSE"]).touch()  # the folder is taken away until the test brings it back
            while Path(os.environ["LOSE"]).exists():
                pass
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "ending.py").write_text(ENDING)
    added = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added}


def last(run: str | Path) -> Path:
    return Path(run, "checkpoints", "last.ckpt")


def whole_run(environment: dict[str, str], processes: int = 2) -> Path:
    """The same run on one machine, without an interruption."""
    words = ["fit", *WORDS, "--run_dir", "whole"]
    if processes > 1:
        words += ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)]
    done = subprocess.run([BIN / "simo", *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path("whole")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Bridge]:
    """Two, each of which resolves its own name to 127.0.1.1, as Debian has it, and not the other's."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("ip", "nsenter", "unshare")):
        pytest.skip("network namespaces need root, ip (iproute2), nsenter and unshare")
    names = ("simo1", "simo2")
    made = Bridge(tmp_path, names, tuple(f"127.0.0.1 localhost\n127.0.1.1 {name}\n" for name in names), "10.99.83")
    try:
        made.start()
    except subprocess.CalledProcessError as error:
        made.stop()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield made
    made.stop()


@pytest.mark.slow  # a minute: ten processes import torch
def test_two_nodes_with_own_addresses_are_stopped_and_resume_to_the_weights_of_one_machine(
    nodes: Bridge, environment: dict[str, str]
) -> None:
    environment |= {"NNODES": "2", "NPROC_PER_NODE": "1", "HEAD": f"{nodes.addresses[0]}:29571", "RUN_ID": "nodes"}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "MAX_RESTARTS": "0"}
    words = [*WORDS, "--trainer.callbacks+=ending.Ending"]

    def start(**more: str) -> tuple[list[int], str]:
        logs = [Path(f"node{number}.log") for number in range(2)]
        agents = []
        for number, log in enumerate(logs):
            command = nodes.in_node(number, "bash", TORCHRUN, *words)
            with log.open("w") as target:
                agents.append(subprocess.Popen(command, env=environment | more, stdout=target, stderr=target))
        codes = [agent.wait(timeout=300) for agent in agents]
        text = "".join(log.read_text() for log in logs)
        return codes, text

    codes, text = start(ENDS=f"1:{signal.SIGTERM.value}")  # as a scheduler ends the process of the second node
    assert sorted(codes) == [0, 1], text[-3000:]  # the first process of a run alone ends with a status
    run = Path("runs/digits/job_nodes")
    step = torch.load(last(run), weights_only=True)["global_step"]
    assert step in (15, 16)  # one batch later where its metrics are logged
    codes, text = start()
    assert codes == [0, 0], text[-3000:]
    assert f"resuming from {last(run)}: epoch 2, step {step}" in text
    assert sorted(path.name for path in (run / "starts").iterdir()) == ["0.json", "1.json"]
    assert_equal_weights(last(run), last(whole_run(environment)))


@pytest.mark.slow  # two minutes
def test_a_slurm_job_on_two_nodes_is_requeued_by_a_signal_and_resumes(
    environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    with SlurmOfTwoNodes(folder) as slurm:
        environment = {**slurm.environment, **environment}

        def ask(*words: str) -> str:
            return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.strip()

        sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
        script = str(ROOT / "configs" / "slurm" / "many_nodes.sbatch")
        job = ask("sbatch", "--parsable", *sizes, script, *WORDS, "--trainer.callbacks+=ending.Slow")
        log = Path(f"simo-{job}.log")
        wait_for(Path("at_step_14").exists, log)
        ask("scancel", "--signal=USR1", job)  # as SLURM sends it before the time limit
        wait_for(lambda: "Restarts=1" in ask("scontrol", "show", "job", job), log)
        wait_for(lambda: "JobState=PENDING" in ask("scontrol", "show", "job", job), log)
        ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # else SLURM waits two minutes
        wait_for(lambda: "JobState=COMPLETED" in ask("scontrol", "show", "job", job), log)
        shown, text = ask("scontrol", "show", "job", job), log.read_text()
    assert "NodeList=simonode[1-2]" in shown
    stops = re.findall(rf"job {job} stopped at step (\d+), .* is requeued", text)
    assert len(stops) == 1, text[-3000:]
    assert stops == re.findall(rf"job {job} resumes after step (\d+) ", text)
    assert int(stops[0]) % 6
    assert_equal_weights(last(f"runs/digits/job_{job}"), last(whole_run(environment)))


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-3000:] if log.exists() else "the job did not start"
        time.sleep(0.5)


@pytest.mark.slow  # half a minute
def test_torchrun_restarts_the_processes_of_a_run_of_which_one_was_killed(environment: dict[str, str]) -> None:
    environment |= {"NPROC_PER_NODE": "2", "HEAD": "localhost:29572", "RUN_ID": "killed", "MAX_RESTARTS": "2"}
    script = ["bash", str(TORCHRUN), *WORDS, "--trainer.callbacks+=ending.Ending"]
    killed = environment | {"ENDS": f"1:{signal.SIGKILL.value}"}
    done = subprocess.run(script, env=killed, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path("runs/digits/job_killed")
    assert [path.name for path in run.parent.iterdir()] == ["job_killed"]
    assert sorted(path.name for path in (run / "starts").iterdir()) == ["0.json", "1.json"]
    assert "starting from the beginning" in done.stdout
    resumed = re.search(rf"resuming from {last(run)}: epoch \d, step (\d+)", done.stdout)
    assert resumed is not None
    assert int(resumed[1]) in (12, 14, 15)  # the last save; or the other process's, had it the time to save
    assert_equal_weights(last(run), last(whole_run(environment)))


@pytest.mark.slow  # half a minute, of which the folder is away for ten seconds
def test_a_run_whose_folder_is_lost_for_ten_seconds_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    """An empty read-only file system is mounted over the folder, as where a share is gone."""
    folder, lose = tmp_path / "share", tmp_path / "lose"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system can be mounted by root alone")
    subprocess.run(["umount", str(folder)], check=True)
    words = ["fit", *WORDS, "--run_dir", str(folder / "run"), "--trainer.callbacks+=ending.Pauses"]
    process = subprocess.Popen(
        [BIN / "simo", *words], env=environment | {"LOSE": str(lose)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not lose.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    subprocess.run(mount, check=True)
    try:
        lose.unlink()
        time.sleep(10)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text[-3000:]
    told = [line for line in text.splitlines() if "trying again for 60 s" in line]
    assert any(line.startswith(f"checkpoint {last(folder / 'run')} cannot be written: ") for line in told), text[-3000:]
    assert any("can be used again after" in line for line in text.splitlines())
    assert_equal_weights(last(folder / "run"), last(whole_run(environment, processes=1)))


def test_reading_images_waits_for_a_folder_that_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, away = tmp_path / "images" / "a", tmp_path / "away"
    folder.mkdir(parents=True)
    Image.new("L", (4, 4), 7).save(folder / "0.png")
    files = FolderImages(
        folder.parent, np.array(["a/0.png"]), torch.zeros(1, dtype=torch.int64), ["a"], Preprocessing(4, channels=1)
    )
    folder.parent.rename(away)
    threading.Timer(0.5, away.rename, [folder.parent]).start()
    assert files[0][0].unique().tolist() == [7]
    first, then = (record.getMessage() for record in caplog.records)
    assert first == f"{folder / '0.png'}: No such file or directory: trying again for 60 s"
    assert then.startswith(f"{folder / '0.png'} can be used again after ")
    (folder / "0.png").unlink()  # a file that is missing alone is an error at once
    start = time.monotonic()
    with pytest.raises(FileNotFoundError):
        _ = files[0]
    assert time.monotonic() - start < 0.5


def test_a_folder_that_does_not_come_back_is_an_error_in_time(tmp_path: Path) -> None:
    path, calls = tmp_path / "gone" / "file", []

    def read() -> bytes:
        calls.append(path)
        return path.read_bytes()

    start = time.monotonic()
    with pytest.raises(FileNotFoundError):
        retry_while_lost(read, path, seconds=1.2)
    assert 1 <= time.monotonic() - start < 2
    assert len(calls) == 2
