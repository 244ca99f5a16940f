"""Where a run lives: a new folder for a new run, the same one for a run that goes on."""

import contextlib
import os
import re
from pathlib import Path

# Processes that Lightning starts later learn the folder that the first one chose.
_CHOSEN = "SIMO_RUN_DIR"


def choose_run_folder(root: Path, resume: bool) -> Path:
    """The folder for a training run when the user named none.

    Args:
        root: Holds the runs of one config.
        resume: Whether the newest run that has a checkpoint goes on.

    Returns:
        ``root/version_N`` with N one over the largest, or the newest with ``checkpoints/last.ckpt`` to resume; under a
        scheduler ``root/job_ID``, the same at every start of the job.

    Raises:
        ValueError: If several processes were started at once without a job to name the folder after.
    """
    if _CHOSEN in os.environ:
        return Path(os.environ[_CHOSEN])
    job = _job()
    if job is not None:
        return root / f"job_{job}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--run_dir must be given where several processes start at once without a job id to name the folder after"
        )
    versions = _versions(root)
    resumable = [number for number in versions if (root / f"version_{number}" / "checkpoints" / "last.ckpt").is_file()]
    number = max(resumable) if resume and resumable else max(versions, default=-1) + 1
    folder = root / f"version_{number}"
    os.environ[_CHOSEN] = str(folder)
    return folder


def forget_run_folder() -> None:
    """Let the next run of this process choose anew."""
    os.environ.pop(_CHOSEN, None)


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to.

    Args:
        checkpoint: File.

    Returns:
        The folder that holds ``checkpoints/``, or None if it lies elsewhere.
    """
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def make_writable(folder: Path) -> None:
    """Make a folder, or say why it cannot be.

    Args:
        folder: Of the run.

    Raises:
        PermissionError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable_{os.environ.get('SLURM_PROCID', os.environ.get('RANK', '0'))}"  # of one process
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise PermissionError(f"the run's folder {folder} cannot be written: {error.strerror or error}") from error


def remove_if_empty(folder: Path | None) -> None:
    """Take back the folder of a run that never began; one that holds anything stays.

    Args:
        folder: Of the run; None: no folder was chosen.
    """
    if folder is not None:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


def _job() -> str | None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"{job}_{task}" if task else job
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if elastic == "none" else elastic


def _versions(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    matches = (re.fullmatch(r"version_(\d+)", path.name) for path in root.iterdir())
    return [int(match.group(1)) for match in matches if match]
