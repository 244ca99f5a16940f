"""Two nodes with addresses of their own, processes that are killed, and a shared folder that is lost for a moment."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simo_lightning.data.folder import FolderImages
from simo_lightning.preprocessing import Preprocessing
from simo_lightning.retry import retry_while_lost
from tests.digits_run import assert_equal_weights

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
import os, signal, subprocess
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


class Nodes:
    """Two network namespaces with addresses of their own on one bridge; each names itself as Debian does.

    ``in_node(number, command)`` is the command with that node's network, host name and ``/etc/hosts``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"simo{os.getpid()}n{number}" for number in (1, 2)]
        self.bridge = f"simobr{os.getpid() % 10**6}"
        self.addresses = ["10.99.83.1", "10.99.83.2"]

    def start(self) -> None:
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("link", "set", self.bridge, "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            outside = f"sv{os.getpid() % 10**6}n{number}"
            self._ip("netns", "add", name)
            self._ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("link", "set", outside, "master", self.bridge, "up")
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            (self.folder / f"hosts{number}").write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n")

    def in_node(self, number: int, *command: str | Path) -> list[str]:
        inside = f"mount --bind {self.folder / f'hosts{number}'} /etc/hosts; hostname node{number}; exec \"$@\""
        start = ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "--mount", "sh", "-c", inside, "node"]
        return [*start, *map(str, command)]

    def stop(self) -> None:
        for name in self.names:
            self._ip("netns", "del", name, check=False)
        self._ip("link", "del", self.bridge, check=False)

    @staticmethod
    def _ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, ip (iproute2) and unshare")
    made = Nodes(tmp_path)
    try:
        made.start()
    except subprocess.CalledProcessError as error:
        made.stop()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield made
    made.stop()


@pytest.mark.slow  # a minute: ten processes import torch
def test_two_nodes_with_own_addresses_are_stopped_and_resume_to_the_weights_of_one_machine(
    nodes: Nodes, environment: dict[str, str]
) -> None:
    environment |= {"NNODES": "2", "NPROC_PER_NODE": "1", "HEAD": f"{nodes.addresses[0]}:29571", "RUN_ID": "nodes"}
    environment |= {"GLOO_SOCKET_IFNAME": "eth0", "MAX_RESTARTS": "0"}
    words = [*WORDS, "--trainer.callbacks+=ending.Ending"]

    def start(**more: str) -> tuple[list[int], str]:
        logs = [Path(f"node{number}.log").open("w+") for number in range(2)]
        agents = [
            subprocess.Popen(
                nodes.in_node(number, "bash", TORCHRUN, *words), env=environment | more, stdout=log, stderr=log
            )
            for number, log in enumerate(logs)
        ]
        codes = [agent.wait(timeout=300) for agent in agents]
        text = ""
        for log in logs:
            log.seek(0)
            text += log.read()
            log.close()
        return codes, text

    codes, text = start(ENDS=f"1:{signal.SIGTERM.value}")  # as a scheduler ends the process of the second node
    assert 0 not in codes, text[-3000:]
    run = Path("runs/digits/job_nodes")
    step = torch.load(last(run), weights_only=True)["global_step"]
    assert step in (15, 16)  # one batch later where its metrics are logged
    codes, text = start()
    assert codes == [0, 0], text[-3000:]
    assert f"resuming from {last(run)}: epoch 2, step {step}" in text
    assert sorted(path.name for path in (run / "starts").iterdir()) == ["0.json", "1.json"]
    assert_equal_weights(last(run), last(whole_run(environment)))


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
    from PIL import Image

    folder, away = tmp_path / "images" / "a", tmp_path / "away"
    folder.mkdir(parents=True)
    Image.new("L", (4, 4), 7).save(folder / "0.png")
    files = FolderImages(
        folder.parent, _names("a/0.png"), torch.zeros(1, dtype=torch.int64), ["a"], Preprocessing(4, channels=1)
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
        files[0]
    assert time.monotonic() - start < 0.5


def _names(*names: str) -> Any:
    import numpy as np

    return np.array(names)


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
