"""Several processes, nodes and starts of one job give what one process and one start give."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from simo_lightning.callbacks.shutdown import in_slurm_job
from simo_lightning.cli import main
from simo_lightning.run_folder import make_writable
from tests.bounds import assert_float32_error
from tests.digits_run import copy_of
from tests.rank_processes import start_ranks

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "configs" / "slurm").glob("*"))
BIN = Path(sys.executable).parent
DDP = ["--trainer.strategy", "ddp", "--trainer.devices"]
SMALL = f"""
    --config {ROOT / "configs" / "digits.yaml"} --model.encoder.width 0.125 --trainer.accelerator cpu
    --trainer.enable_progress_bar false --trainer.enable_model_summary false --plots.every_n_epochs 1000
""".split()
FRACTION, IMAGES = 0.11, 159  # of validation: an odd number, so that the shares of two processes differ
# Writes the weights of every process, where a checkpoint has those of the first.
EACH = """
from pathlib import Path
import torch
from lightning.pytorch.callbacks import Callback

class Each(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), Path(trainer.default_root_dir, f"{trainer.global_rank}.pt"))
"""
# Keeps the first start of a SLURM job busy until its time limit, however fast the machine is.
SLOW = """
import os
import time
from lightning.pytorch.callbacks import Callback

class Slow(Callback):
    def on_train_batch_end(self, *_):
        if "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(0.5)
"""


def simo(*words: str, **arguments: Any) -> str:
    done = subprocess.run([BIN / "simo", *words], capture_output=True, text=True, check=False, **arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def state(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint.get("state_dict", checkpoint)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def table(text: str) -> dict[str, float]:
    """Metrics of Lightning's table."""
    return {name: float(value) for name, value in re.findall(r"(val/\w+)\W+?([\d.]+(?:e-?\d+)?)\s", text)}


def validate(outputs: dict[Path, list[str]]) -> None:
    """The command in this process, with the words of each output; the first process of several prints the table."""
    warnings.simplefilter("ignore")
    sys.argv = ["simo"]  # LightningCLI warns of two sources of words
    for output, words in outputs.items():
        with (output.with_suffix(f".{os.environ.get('RANK', '0')}")).open("w") as file, redirect_stdout(file):
            main(["validate", *words])


def test_validation_on_two_processes_counts_every_image_once(digits_run: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--data.val_fraction", str(FRACTION), "--data.eval_batch_size", "20", "--plots", "null"]
    words += ["--ckpt_path", str(copy_of(digits_run).absolute() / "checkpoints" / "last.ckpt")]
    alone = {tmp_path / "one": words, tmp_path / "exact": [*words, "--trainer.precision", "64-true"]}
    assert start_ranks(1, validate, alone) == [0]
    assert start_ranks(2, validate, {tmp_path / "two": [*words, *DDP, "2"]}) == [0, 0]
    one, two, exact = (table((tmp_path / f"{name}.0").read_text()) for name in ("one", "two", "exact"))
    assert {"val/knn", "val/class_cosine", "val/effective_rank"} <= one.keys() == two.keys() == exact.keys()
    counts = {name for name, value in one.items() if abs(value * IMAGES - round(value * IMAGES)) < 1e-3}
    assert {name: two[name] for name in counts} == {name: one[name] for name in counts}
    names = sorted(one.keys() - counts)  # the others err as float32 does, each in units of its own value
    errors = [torch.tensor([values[name] / exact[name] for name in names]) for values in (two, one)]
    assert_float32_error(*errors, torch.ones(len(names)))
    assert one["val/knn"] * IMAGES == pytest.approx(round(one["val/knn"] * IMAGES), abs=1e-3)


@pytest.mark.slow  # half a minute: five processes import torch
def test_two_torchrun_agents_train_as_two_processes_of_one_machine(tmp_path: Path) -> None:
    (tmp_path / "each.py").write_text(EACH)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    words = ["fit", *SMALL, "--trainer.max_epochs", "2", "--trainer.callbacks+=each.Each"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment |= {"NNODES": "2", "NPROC_PER_NODE": "1", "HEAD": address, "RUN_ID": "pair"}
    agent = ["bash", ROOT / "configs" / "slurm" / "torchrun.sh", *words[1:]]
    agents = [subprocess.Popen(agent, env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in agents] == [0, 0]
    simo(*words, *DDP, "2", "--run_dir", "local", env=environment)
    run = Path("runs/digits/job_pair")
    assert [path.name for path in (run / "starts").iterdir()] == ["0.json"]
    for rank in range(2):
        assert_equal(state(run / f"{rank}.pt"), state(Path(f"local/{rank}.pt")))
    assert_equal(state(run / "0.pt"), state(run / "1.pt"))
    assert_equal(state(run / "checkpoints" / "last.ckpt"), state(Path("local/checkpoints/last.ckpt")))


def own_address() -> str:
    """This machine's address, to which its name need not resolve (Debian's default is 127.0.1.1)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@pytest.mark.slow  # a quarter of a minute: torchrun and its process import torch one after the other
def test_torchrun_starts_without_nvidias_tools_at_an_address_that_the_hosts_name_does_not_resolve_to() -> None:
    address = own_address()
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "NPROC_PER_NODE"}
    environment |= {"PATH": f"{BIN}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "RUN_ID": "alone"}
    script = ["bash", ROOT / "configs" / "slurm" / "torchrun.sh", *SMALL, "--trainer.max_steps", "2", "--best", "null"]
    done = subprocess.run(
        [*script, "--trainer.limit_val_batches", "0"], env=environment | {"HEAD": f"{address}:{port}"},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torchrun.sh: 0 GPUs here, so 1 process(es)" in done.stderr
    assert Path("runs/digits/job_alone/checkpoints/last.ckpt").is_file()


def executable(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    path.chmod(0o755)


def test_a_signal_before_python_has_imported_is_held(tmp_path: Path) -> None:
    """The shipped script with an ``srun`` that starts one task, which receives the signal before Python starts."""
    executable(tmp_path / "srun", 'exec "$@"')
    executable(tmp_path / "simo", "kill -USR1 $$", f'exec "{BIN / "simo"}" "$@"')
    executable(tmp_path / "scontrol", f'echo "$@" > "{tmp_path / "asked"}"')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NAME": "simo"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    script = ["bash", ROOT / "configs" / "slurm" / "one_node.sbatch", *SMALL, "--trainer.max_steps", "5"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "job 7 stopped at step 1, saved" in done.stdout + done.stderr
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def has_slurm() -> bool:
    if not all(shutil.which(name) for name in ("sbatch", "sinfo", "scontrol")):
        return False
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.slow  # seven minutes: time limits count minutes, and SLURM waits two before a requeued job starts
def test_a_slurm_job_that_meets_its_time_limit_resumes_to_the_same_weights(tmp_path: Path) -> None:
    if not has_slurm():
        pytest.skip("no SLURM answers here (sbatch, sinfo, scontrol)")
    (tmp_path / "slow.py").write_text(SLOW)
    words = [*SMALL, "--trainer.max_epochs", "40", "--trainer.check_val_every_n_epoch", "20"]  # 240 steps
    words += ["--trainer.callbacks+=slow.Slow"]
    limits = ["--time=2", "--signal=SIGUSR1@30", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    submit = ["sbatch", "--parsable", *limits, ROOT / "configs" / "slurm" / "one_node.sbatch", *words]
    job = subprocess.run(submit, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    for _ in range(360):
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
        if any(f"JobState={end}" in shown for end in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")):
            break
        time.sleep(5)
    log = Path(f"simo-{job}.log").read_text()
    assert "JobState=COMPLETED" in shown, log[-3000:]
    assert not re.search(r"Restarts=0\b", shown), "the run ended before its time limit"
    stops = [int(step) for step in re.findall(rf"job {job} stopped at step (\d+), .* is requeued", log)]
    assert stops, log[-3000:]
    starts = [int(step) for step in re.findall(rf"job {job} resumes after step (\d+) ", log)]
    assert stops == starts
    assert any(step % 6 for step in stops)  # in the middle of an epoch
    run = Path(f"runs/digits/job_{job}")
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    assert not list(run.glob("*.ckpt"))  # Lightning's own handler kept quiet
    simo("fit", *words, *DDP, "2", "--run_dir", "whole", env=environment)
    assert_equal(state(run / "checkpoints" / "last.ckpt"), state(Path("whole/checkpoints/last.ckpt")))


def test_outside_a_job_nobody_listens_and_in_an_interactive_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert not in_slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not in_slurm_job()  # a shell in the job, but no task of it
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert in_slurm_job()
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert not in_slurm_job()


def test_processes_of_a_job_make_the_folder_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: make_writable(tmp_path / "run"), range(500)))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_sound_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "--ckpt_path last" in text
    assert script.name in text.splitlines()[1]
