"""`sbn cancel`: asks a run to stop, by scancel where a Slurm job has it, else by a STOP file. Imports no torch."""

import subprocess
from pathlib import Path

from megatron_sbn.atomic_files import is_held
from megatron_sbn.cluster.run_states import job_in_queue, submissions
from megatron_sbn.cluster.slurm_queue import states
from megatron_sbn.errors import InputError
from megatron_sbn.runs.folder import STOP
from megatron_sbn.runs.status import read_status

_AGAIN = "remove that file before it may go on"


def cancel(folder: Path) -> str:
    """Asks; returns a line about what happened. Raises InputError where Slurm or the folder refuses."""
    status, jobs = read_status(folder), submissions(folder)
    queue = states({job.whole for job in jobs} | ({status.job} if status is not None else set()))
    known = queue or {}
    job = job_in_queue(status, jobs, known)
    if job is not None and not job.shared:
        return f"{folder}: {_scancel(folder, job.job, known[job.job])}"
    if job is not None:
        return f"{folder}: job {job.job} runs other recipes too, and goes on with them; {_stop(folder)}"
    if status is None or status.state != "RUNNING":
        return f"{folder}: nothing to cancel, {'it never began' if status is None else f'it is {status.state}'}"
    if status.job and queue is not None:
        return f"{folder}: nothing to cancel, its job {status.job} is not in the queue"
    if not status.job and is_held(folder / "run") is False:
        return f"{folder}: nothing to cancel, no process has this run any more"
    return f"{folder}: {_stop(folder)}"


def _scancel(folder: Path, job: str, state: str) -> str:
    done = subprocess.run(["scancel", job], capture_output=True, text=True, check=False)
    if done.returncode:
        message = " ".join(done.stderr.split()) or "no message"
        raise InputError(f"{folder}: scancel {job} failed ({message}); try again, or make a file {folder / STOP}")
    if state.startswith("RUNNING"):
        return f"job {job} was told to end (SIGTERM): it saves a checkpoint and is not started again"
    return f"job {job} was {state} and is out of the queue"


def _stop(folder: Path) -> str:
    path = folder / STOP
    try:
        path.touch()
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror or error}); stop the run another way") from None
    return f"made {path}: it saves a checkpoint after its step, or does not begin; {_AGAIN}"
