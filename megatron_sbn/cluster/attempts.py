"""attempts.jsonl in the run folder: one line for every start of a Slurm job that ended, and what follows from them.

    {"job": "12", "restart": 0, "state": "FAILED", "exit_status": 1, "checkpoint": 40, "reason": "...", "time": ...}

The failure budget counts failures in a row, of one job, without a newer checkpoint in between: a run that gets on is
not given up for one bad node a week, and one that fails at one place is not paid for again and again. Statuses that
come again whatever is tried (2 bad recipe or input, 3 numerical failure, 4 no valid checkpoint) are not retried at all.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_sbn.checkpoint.directory import saved_step
from megatron_sbn.errors import STOPPED, CheckpointError, NumericalError, RecipeError
from megatron_sbn.runs.status import RunStatus, slurm_attempt

FILE_NAME = "attempts.jsonl"
FOR_GOOD = (RecipeError.status, NumericalError.status, CheckpointError.status)


@dataclass(frozen=True)
class Attempt:
    """One start that ended; `checkpoint` is the newest step saved by then, `time` in seconds since 1970."""

    job: str
    restart: int
    state: str
    exit_status: int | None
    checkpoint: int
    reason: str
    time: float


_ADAPTER = TypeAdapter(Attempt)


@dataclass(frozen=True)
class Limits:
    """How often a job may start again: `restarts` in all (SLURM_RESTART_COUNT), `failures` in a row."""

    restarts: int
    failures: int


@dataclass(frozen=True)
class Verdict:
    """What the batch script does next: start again, or end with `exit_status`; and why."""

    again: bool
    exit_status: int
    reason: str


def read_attempts(folder: Path) -> list[Attempt]:
    """All that are recorded, oldest first; a torn last line, and what is no attempt, is left out."""
    try:
        lines = (folder / FILE_NAME).read_bytes().split(b"\n")
    except OSError:
        return []
    attempts = []
    for line in lines:
        try:
            attempts.append(_ADAPTER.validate_json(line, strict=True))
        except ValidationError:
            continue
    return attempts


def record_attempt(folder: Path, status: RunStatus) -> None:
    """Adds a line."""
    attempt = Attempt(
        status.job, status.restart, status.state, status.exit_status, saved_step(folder), status.reason,
        round(time.time(), 3),
    )  # fmt: skip
    with (folder / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


def failures_in_a_row(attempts: list[Attempt], job: str) -> int:
    """Failures of this job since it last stopped in order or came to a newer checkpoint."""
    count, checkpoint = 0, 0
    for attempt in attempts:
        if attempt.job != job:
            continue
        progress = attempt.checkpoint > checkpoint
        checkpoint = attempt.checkpoint
        count = 0 if attempt.state != "FAILED" else 1 if progress else count + 1
    return count


def decide(status: RunStatus, failures: int, limits: Limits, *, ending: bool, switched_off: bool) -> Verdict:
    """What follows from how an attempt ended.

    Args:
        status: as the run, or who saw it end, wrote it.
        failures: in a row, this one included.
        ending: whether the job itself is being ended (SIGTERM: scancel, preemption), so that it must not start again
            by its own doing.
        switched_off: whether there is a STOP file.
    """
    _, restart = slurm_attempt()
    if status.state == "FINISHED":
        return Verdict(False, 0, "all steps are done")
    exit_status = status.exit_status or 1
    saved = f"saved at step {status.step}" if status.step else "no step was saved"
    if switched_off:
        return Verdict(False, exit_status, "there is a STOP file: remove it to go on")
    if status.reason == "STOP_FILE":  # removed since
        return Verdict(False, exit_status, f"there was a STOP file; {saved}; submit it again to go on")
    if ending or status.reason == "SIGTERM":
        return Verdict(False, exit_status, f"the job was asked to end ({status.reason}); {saved}")
    if exit_status in FOR_GOOD:
        return Verdict(False, exit_status, f"status {exit_status} would come again: {status.reason}")
    if restart >= limits.restarts:
        limit = f"restarted {restart} times, which is the limit (SBN_MAX_RESTARTS)"
        return Verdict(False, exit_status, f"{limit}; {saved}; submit it again to go on")
    if exit_status == STOPPED:
        return Verdict(True, STOPPED, f"asked to stop ({status.reason}); {saved}")
    if failures >= limits.failures:
        return Verdict(
            False, exit_status, f"{failures} failures in a row (SBN_MAX_FAILURES); the last: {status.reason}"
        )
    return Verdict(True, STOPPED, f"failure {failures} of at most {limits.failures} in a row: {status.reason}")
