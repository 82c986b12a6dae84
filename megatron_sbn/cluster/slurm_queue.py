"""Which jobs Slurm still has: waiting, running or ending. Imports no torch."""

import subprocess
from collections.abc import Collection
from shutil import which

from megatron_sbn.errors import InputError

SECONDS = 20.0  # that squeue may take
GONE = "Invalid job id"  # said of one job alone that is long gone


def queued(jobs: Collection[str]) -> set[str]:
    """Those of `jobs` (ids of jobs or of whole arrays) that are in the queue; none where there is no squeue.

    Raises InputError where Slurm does not answer.
    """
    known = [job for job in jobs if job.isdigit()]
    if not known or which("squeue") is None:
        return set()
    # %F is the array's id, %A the task's own.
    command = ["squeue", "--noheader", "--format=%F %A", f"--jobs={','.join(sorted(known))}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and GONE not in done.stderr:
        message = " ".join(done.stderr.split())
        raise InputError(f"squeue failed ({message}), so what is in the queue is not known; try again")
    return set(known) & set(done.stdout.split())


def states(jobs: Collection[str]) -> dict[str, str] | None:
    """What squeue says of those of `jobs` that are in the queue: `RUNNING`, `PENDING (Resources)`.

    By the job's own id, by that of its whole array, and as ARRAY_TASK. None where Slurm does not answer.
    """
    known = sorted({job for job in jobs if job.isdigit()})
    if not known:
        return {}
    if which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--array", "--format=%F|%A|%K|%T|%r", f"--jobs={','.join(known)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode and GONE not in done.stderr:
        return None
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        if line.count("|") < 4:
            continue
        array, own, task, state, reason = line.split("|", 4)
        text = f"{state} ({reason})" if state == "PENDING" else state
        found |= {f"{array}_{task}": text, own: text}
        found.setdefault(array, text)
    return found
