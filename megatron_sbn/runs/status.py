"""status.json in the run folder: how the run stands, for scripts and for people. Imports no torch.

    {"state": "STOPPED", "exit_status": 75, "step": 40, "reason": "SIGUSR1", "job": "12", "restart": 0, "time": ...}

RUNNING until the run says otherwise: FINISHED (all steps), STOPPED (checkpointed because it was asked to) or FAILED.
Rank 0 writes it, whole or not at all. It is what a Slurm job goes by: torchrun and srun give one number for many ranks
(torchrun 1 for every failure, srun the highest, 143 for those that it killed), and none for a node that died.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.runs.folder import STATUS, STOP

State = Literal["RUNNING", "FINISHED", "STOPPED", "FAILED"]


@dataclass(frozen=True)
class RunStatus:
    """The content of status.json.

    Attributes:
        state: RUNNING, FINISHED, STOPPED or FAILED.
        exit_status: of errors.py; None while it runs, or where nobody was left to tell.
        step: steps that are done, and saved where the state is STOPPED.
        reason: why it stopped or failed.
        job, restart: Slurm's job id and restart count; "" and 0 elsewhere.
        time: seconds since 1970.
    """

    state: State
    exit_status: int | None
    step: int
    reason: str
    job: str
    restart: int
    time: float


_ADAPTER = TypeAdapter(RunStatus)


def read_status(folder: Path) -> RunStatus | None:
    """The run's status; None where there is none, or none that can be read."""
    try:
        return _ADAPTER.validate_json((folder / STATUS).read_bytes(), strict=True)
    except (OSError, ValidationError):
        return None


def write_status(folder: Path, state: State, exit_status: int | None, step: int, reason: str = "") -> None:
    """Replaces the run's status. Raises InputError where it cannot be written."""
    job, restart = slurm_attempt()
    status = RunStatus(state, exit_status, step, reason, job, restart, round(time.time(), 3))
    write_atomically(folder / STATUS, json.dumps(asdict(status)).encode() + b"\n")


def switched_off(folder: Path) -> bool:
    """Whether there is a STOP file, in the run folder or beside all runs of a study."""
    return any((place / STOP).exists() for place in (folder, folder.absolute().parent))


def slurm_attempt() -> tuple[str, int]:
    """(job id, restart count) of the Slurm job that this process belongs to; ("", 0) elsewhere."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restart) if restart.isdigit() else 0
