"""A line about a job's time limit: what `sbn plan` expects, where the GPUs are known, and a limit that leaves room.

The estimate is from data sheets and was measured nowhere, so it is said and never set. Imports no torch.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_sbn.checkpoint.directory import saved_step
from megatron_sbn.cluster.batch_script import Job
from megatron_sbn.cluster.resources import Place, on_gpus
from megatron_sbn.config import Recipe
from megatron_sbn.errors import RecipeError
from megatron_sbn.plan.hardware import DEVICES, Device, Efficiency
from megatron_sbn.plan.search import Machines, candidate

ROOM, START_SECONDS = 1.5, 900  # of the estimate; for imports, validation and checkpoints
_TIME = re.compile(r"(?:^| )(?:--time[= ]|-t ?\d)")
_AGAIN = "a job starts again at its limit"


def time_note(jobs: Sequence[Job], limit: str | None, place: Place) -> str:
    """One line; of several jobs about the longest."""
    given = limit is not None or _TIME.search(place.words) is not None
    device = known_device(place)
    estimates = [(_seconds(job, device, place), job.nodes * job.per_node) for job in jobs] if device is not None else []
    expected, ranks = max(estimates, default=(0.0, 0))
    if not expected or device is None:
        return "" if given else f"time: no --time was given, so the site's default is the limit; {_AGAIN}"
    estimate = f"{_length(expected)} on {ranks} {device.name} by data sheets (sbn plan), not measured"
    if given:
        return f"time: {estimate}; {_AGAIN}"
    advised = slurm_time(ROOM * expected + START_SECONDS)
    return f"time: no --time was given, so the site's default is the limit; {estimate}: --time {advised} leaves room"


def known_device(place: Place) -> Device | None:
    """The GPUs of the site as `sbn plan` knows them, by env.sh's SBN_GPU, sbatch's options or sinfo."""
    names = [place.site.gpu, *re.findall(r"(?:gpu:|--gpus-per-node[= ])([A-Za-z][\w.-]*):", place.words)]
    names.append(place.nodes.gpu if place.nodes is not None else "")
    for name in names:
        for device in DEVICES.values():
            if device.name in name.lower():
                return device
    return None


def slurm_time(seconds: float) -> str:
    """Whole hours, as sbatch takes them: 30 h -> 1-06:00:00."""
    hours = max(1, -(-int(seconds) // 3600))
    return f"{hours // 24}-{hours % 24:02d}:00:00" if hours >= 24 else f"{hours:02d}:00:00"


def _seconds(job: Job, device: Device, place: Place) -> float:
    """Of a job: its longest run, of a series all of them; 0 where there is no estimate."""
    found = [_of_run(recipe, job, device) if on_gpus(recipe, place) else 0.0 for recipe in job.recipes.values()]
    return sum(found) if job.form == "series" else max(found)


def _of_run(recipe: Recipe, job: Job, device: Device) -> float:
    try:
        own = candidate(recipe, Machines(device, job.nodes, job.per_node, Efficiency()))
    except RecipeError:  # fewer ranks, of a series
        return 0.0
    done = saved_step(Path(str(recipe.run_dir)))
    return own.duration.step * max(0, recipe.training.steps - done)


def _length(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 3600:,.1f} hours"
