"""`sbn status`: how runs stand, by the files of their folders and by squeue. Imports no torch."""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sbn.atomic_files import is_held
from megatron_sbn.cluster.slurm_queue import states
from megatron_sbn.errors import InputError
from megatron_sbn.runs.folder import LOGS, METRICS, RECIPE, RUNS, STATUS
from megatron_sbn.runs.status import RunStatus, read_status
from megatron_sbn.text_table import aligned

HEADER = ("run", "state", "step", "loss", "perplexity", "last line", "job")
DEAD = "RUNNING?"  # it says so, and nobody is there
_TAIL = 1 << 16
# As recipes are written: a parser takes longer, for a hundred runs seconds.
_STEPS = re.compile(r"^training:\n(?:  .*\n)*?  steps: (\d{1,15})$", re.MULTILINE)


@dataclass(frozen=True)
class Submitted:
    """A job that a run is part of.

    Attributes:
        job: its id; of an array ARRAY_TASK. whole: the id that sbatch gave.
        shared: whether other runs are in the same job (a series), so that it cannot be ended for this one.
    """

    job: str
    whole: str
    shared: bool = False


def run_folders(named: Sequence[str]) -> list[Path]:
    """The runs that are named, or are in the folders (studies) that are; without names all below runs/.

    Raises InputError for a name that is not there, and where none of the names is a run or holds one.
    """
    if not named:
        return list(_runs_in(RUNS)) if RUNS.is_dir() else []
    found: list[Path] = []
    for name in named:
        if not is_there(Path(name)):
            raise InputError(f"{name}: is not there; name the folder of a run or of a study")
        found += _runs_in(Path(name))
    if not found:
        raise InputError(f"{', '.join(named)}: no run is there; name the folder of a run or of a study")
    return list(dict.fromkeys(found))


def is_there(path: Path) -> bool:
    """Whether the path exists; what no path can be does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def table(folders: Sequence[Path]) -> list[str]:
    """A row a run, under a header."""
    submitted = {folder: submissions(folder) for folder in folders}
    statuses = {folder: read_status(folder) for folder in folders}
    jobs = {job.whole for jobs in submitted.values() for job in jobs}
    queue = states(jobs | {status.job for status in statuses.values() if status is not None})
    rows = [_row(folder, statuses[folder], submitted[folder], queue) for folder in folders]
    return aligned(HEADER, rows)


def submissions(folder: Path) -> list[Submitted]:
    """Jobs that were submitted for a run or for its study, the newest first."""
    found = []
    for file in folder.glob("submissions/*/*.job"):
        found.append((_number(file), Submitted(_text(file), _text(file))))
    for recipe in folder.parent.glob(f"submissions/*/recipes/{folder.name}.yaml"):
        for file in recipe.parents[1].glob("*.job"):
            script = _text(file.with_suffix(".sbatch"))
            task = re.search(rf"^ *\[(\d+)\]={re.escape(folder.name)}$", script, re.MULTILINE)
            if task is not None:
                found.append((_number(file), Submitted(f"{_text(file)}_{task[1]}", _text(file))))
            elif "--array" not in script:
                found.append((_number(file), Submitted(_text(file), _text(file), shared=True)))
    return [job for _, job in sorted(found, key=lambda pair: pair[0], reverse=True)]


def job_in_queue(status: RunStatus | None, jobs: Sequence[Submitted], known: Mapping[str, str]) -> Submitted | None:
    """The job of the run that is in the queue, if any."""
    waiting = next((job for job in jobs if job.job in known), None)
    if status is None or status.state != "RUNNING" or status.job not in known:
        return waiting
    if waiting is not None and (waiting.shared or waiting.job == status.job):
        return waiting
    return Submitted(status.job, status.job)


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folder if it is a run's, else those of the runs in it and in the studies in it."""
    if _is_run(folder):
        yield folder
        return
    for child in sorted(path for path in folder.glob("*") if path.is_dir()):
        yield from [child] if _is_run(child) else (path for path in sorted(child.glob("*")) if _is_run(path))


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (STATUS, METRICS, RECIPE)) or (folder / LOGS).is_dir()


def _row(
    folder: Path, status: RunStatus | None, jobs: Sequence[Submitted], queue: Mapping[str, str] | None
) -> list[str]:
    known = queue or {}
    job = job_in_queue(status, jobs, known)
    last = _last_values(folder / METRICS)
    step = int(last.get("step", status.step if status is not None else 0))
    when = last.get("time", status.time if status is not None else None)
    return [
        str(folder),
        _state(folder, status, job, queue is not None),
        f"{step:,} / {_steps(folder)}",
        _shown(last.get("loss"), 4),
        _shown(last.get("validation_perplexity"), 2),
        "-" if when is None else f"{_age(time.time() - when)} ago",
        "-" if job is None else f"{job.job} {known[job.job]}",
    ]


def _state(folder: Path, status: RunStatus | None, job: Submitted | None, answered: bool) -> str:
    if status is None:
        return "WAITING" if job is not None else "-"
    if status.state != "RUNNING":
        reason = f" ({status.reason})" if status.state == "STOPPED" and status.reason else ""
        return f"{status.state}{reason}"
    dead = job is None and (answered if status.job else is_held(folder / "run") is False)
    return DEAD if dead else status.state


def _steps(folder: Path) -> str:
    """Of the recipe that the run had last, or that was submitted."""
    files = [folder / RECIPE, *folder.glob("submissions/*/recipes/*.yaml")]
    files += folder.parent.glob(f"submissions/*/recipes/{folder.name}.yaml")
    for file in files:
        found = _STEPS.search(_text(file))
        if found is not None:
            return f"{int(found[1]):,}"
    return "?"


def _last_values(path: Path) -> dict[str, float]:
    """The newest step, time, loss and perplexity; as much of the end of the file is read as that takes."""
    wanted = {"step", "time", "loss", "validation_perplexity"}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _TAIL
            while True:
                file.seek(max(0, size - length))
                found = _merged(file.read(), wanted, whole=length >= size)
                if length >= min(size, 64 * _TAIL) or wanted <= found.keys():
                    return found
                length *= 4
    except OSError:
        return {}


def _merged(data: bytes, wanted: set[str], *, whole: bool) -> dict[str, float]:
    """Of lines, the newest value of each of `wanted`; a torn first or last line is left out."""
    found: dict[str, float] = {}
    for text in data[: data.rfind(b"\n") + 1].splitlines()[0 if whole else 1 :]:
        try:
            line = json.loads(text)
            values = {name: float(line[name]) for name in wanted & line.keys()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
        if all(math.isfinite(values.get(name, 0.0)) for name in ("step", "time")):
            found |= values
    return found


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _number(file: Path) -> int:
    return int(file.parent.name) if file.parent.name.isdecimal() else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
