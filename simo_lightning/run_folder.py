"""The folder of a run: a new one for a new run, the existing one for a restart.

A run's folder holds ``starts/0.json``, ``starts/1.json`` and so on, one file for each start of the command in it. All
processes of a start compute the same :class:`Start` from their environment, and the first of them to create the file
decides for the others, without communication.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

# The first process passes the folder to processes that Lightning starts later.
_CHOSEN = "SIMO_RUN_DIR"


@dataclass(frozen=True)
class Start:
    """One start of ``simo fit``, the same on all of its processes.

    Attributes:
        job: Id of the scheduler's job or of the torchrun run; None outside of both.
        restarts: How often SLURM and torchrun have restarted it so far.
        launch: Distinguishes starts of one job: the SLURM step or the torchrun port; unique for a single process.
        config: Fingerprint of the configuration.
        elastic: Whether the job is a torchrun run, whose id the user chose.
    """

    job: str | None
    restarts: tuple[int, int]
    launch: str
    config: str
    elastic: bool

    @classmethod
    def of_this_process(cls, config: str) -> "Start":
        """The start that this process belongs to.

        Args:
            config: Fingerprint of its configuration.

        Returns:
            The start.
        """
        environment = os.environ
        step, port = environment.get("SLURM_STEP_ID"), environment.get("MASTER_PORT")
        if "TORCHELASTIC_RUN_ID" in environment:
            launch = f"torchrun {environment['TORCHELASTIC_RUN_ID']} {step or ''} {port}"
        elif step is not None and int(environment.get("SLURM_NTASKS", "1")) > 1:
            launch = f"step {step}"
        else:
            launch = uuid.uuid4().hex
        restarts = (_count("SLURM_RESTART_COUNT"), _count("TORCHELASTIC_RESTART_COUNT"))
        return cls(_job(), restarts, launch, config, elastic="SLURM_JOB_ID" not in environment)

    def is_restart_of(self, earlier: "Start") -> bool:
        """Whether this start resumes the run of an earlier one.

        Args:
            earlier: Start of a run.

        Returns:
            True for the same job and configuration with a higher restart count. A torchrun run may also be launched
            again under its id, which sets the count back to 0.
        """
        same = self.job is not None and (self.job, self.config) == (earlier.job, earlier.config)
        return same and (self.elastic or self.restarts > earlier.restarts)


def claim_run_folder(root: Path, start: Start, resume: bool) -> tuple[Path, bool]:
    """The folder for a training run when the user named none.

    Args:
        root: Holds the runs of one config.
        start: Start that this process belongs to.
        resume: Whether a run may resume in its folder.

    Returns:
        The folder, and whether this start created it: ``root/job_ID`` in a job, ``root/job_ID-2`` and so on for further
        runs of the job; else ``root/version_N`` with N one over the largest, or the newest with
        ``checkpoints/last.ckpt`` to resume.

    Raises:
        ValueError: If several processes were started at once without a job id to name the folder after.
    """
    if start.job is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--run_dir must be given where several processes start at once without a job id to name the folder after"
        )
    if start.job is None and resume:
        resumable = [folder for folder in _versions(root) if _has_checkpoint(folder, "last")]
        if resumable:
            return use_run_folder(resumable[-1]), False
    for folder in _candidates(root, start.job):
        number = _claim(folder, start, resume)
        if number is not None:
            return use_run_folder(folder), number == 0
    raise AssertionError("unreachable: there is always another candidate")


def newest_run(root: Path, checkpoint: str) -> Path:
    """The run that ``--ckpt_path best`` or ``last`` refers to if the user named none.

    Args:
        root: Holds the runs of one config.
        checkpoint: "best" or "last".

    Returns:
        The newest run of this job with such a checkpoint; else the newest version; else the folder of a first run.
    """
    job, versions = _job(), _versions(root)
    of_job = list(itertools.takewhile(Path.is_dir, _candidates(root, job))) if job else []
    of_job.sort(key=lambda folder: max(path.stat().st_mtime_ns for path in (folder, *folder.glob("starts/*.json"))))
    found = [folder for folder in versions + of_job if _has_checkpoint(folder, checkpoint)]
    if found:
        return found[-1]
    return of_job[-1] if of_job else versions[-1] if versions else root / (f"job_{job}" if job else "version_0")


def in_job() -> bool:
    """Whether this process belongs to a scheduler's job or a named torchrun run."""
    return _job() is not None


def use_run_folder(folder: Path) -> Path:
    """Pass the folder to processes that Lightning starts later.

    Args:
        folder: Of the run.

    Returns:
        The folder.
    """
    os.environ[_CHOSEN] = str(folder)
    return folder


def inherited_run_folder() -> Path | None:
    """The folder that the parent process chose; None if there is none."""
    return Path(os.environ[_CHOSEN]) if _CHOSEN in os.environ else None


def forget_run_folder() -> None:
    """Let the next run of this process choose a folder again."""
    os.environ.pop(_CHOSEN, None)


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to.

    Args:
        checkpoint: File.

    Returns:
        The folder that holds ``checkpoints/``, or None if the checkpoint is elsewhere.
    """
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def make_writable(folder: Path) -> None:
    """Create a folder and check that it is writable.

    Args:
        folder: Of the run.

    Raises:
        PermissionError: If it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = (
            folder / f".writable_{os.environ.get('SLURM_PROCID', os.environ.get('RANK', '0'))}"
        )  # one file per process
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise PermissionError(f"the run's folder {folder} cannot be written: {error.strerror or error}") from error


def missing_folders(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, innermost first.

    Args:
        folder: Path of a folder.

    Returns:
        The missing folders.
    """
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_failed_start(folder: Path, missing: list[Path]) -> None:
    """Remove the folder of a run that never began.

    Args:
        folder: Created by this start.
        missing: Folders that did not exist before; they are removed too if they are empty.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for path in missing:
        with contextlib.suppress(OSError):  # not empty, or not there
            path.rmdir()


def _claim(folder: Path, start: Start, resume: bool) -> int | None:
    """The number of this start in the folder; None if the folder belongs to another run."""
    starts = folder / "starts"
    while True:
        numbers = sorted(int(path.stem) for path in starts.glob("*.json") if path.stem.isdigit())
        if numbers:
            file = starts / f"{numbers[-1]}.json"
            earlier = _read(file)
            if earlier == start and not _has_trained_since(folder, file):
                return numbers[-1]  # another process of this start was here first
            if not (resume and start.is_restart_of(earlier)):
                return None
        elif folder.exists() and any(path.name != "starts" for path in folder.iterdir()):
            return None
        number = numbers[-1] + 1 if numbers else 0
        make_writable(starts)
        content = {**asdict(start), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        with contextlib.suppress(FileExistsError), (starts / f"{number}.json").open("x") as target:
            target.write(json.dumps(content, indent=1) + "\n")
            return number


def _read(path: Path) -> Start:
    """Read a start; another process may still be writing it."""
    for _ in range(100):
        with contextlib.suppress(json.JSONDecodeError):
            content = json.loads(path.read_text())
            content.pop("time")
            return replace(Start(**content), restarts=tuple(content["restarts"]))
        time.sleep(0.1)
    raise ValueError(f"{path} must hold a JSON object, as simo fit writes it; remove the file to begin a new run")


def _has_trained_since(folder: Path, start: Path) -> bool:
    """Whether results are newer than a start: then it is over, since no process trains before all have a folder."""
    results = (folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt", folder / "metrics.csv")
    return any(path.exists() and path.stat().st_mtime_ns > start.stat().st_mtime_ns for path in results)


def _has_checkpoint(folder: Path, name: str) -> bool:
    """Whether a run has a checkpoint, a file or a folder, which a crash may have left at ``tensor_files.former_of``."""
    checkpoints = folder / "checkpoints"
    return (checkpoints / f"{name}.ckpt").exists() or (checkpoints / f".{name}.ckpt.former").exists()


def _candidates(root: Path, job: str | None) -> Iterator[Path]:
    if job is not None:
        yield root / f"job_{job}"
        yield from (root / f"job_{job}-{number}" for number in itertools.count(2))
    versions = _versions(root)
    first = int(versions[-1].name.removeprefix("version_")) + 1 if versions else 0
    yield from (root / f"version_{number}" for number in itertools.count(first))


def _count(name: str) -> int:
    return int(os.environ.get(name) or 0)


def _job() -> str | None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"{job}_{task}" if task else job
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if elastic == "none" else elastic


def _versions(root: Path) -> list[Path]:
    """Folders ``version_N`` in the order of N."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if re.fullmatch(r"version_\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("version_")))
