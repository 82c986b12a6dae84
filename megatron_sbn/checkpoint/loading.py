"""The checkpoint that a run continues from: the newest valid one, found and verified by all ranks together.

Each rank hashes its share of the files, so a checkpoint is read once for that, whatever the number of ranks.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_sbn.checkpoint import directory as folders
from megatron_sbn.checkpoint.collective_errors import capture_error, first_error_on_any_rank
from megatron_sbn.checkpoint.manifest import Manifest, State, read_manifest, read_state
from megatron_sbn.errors import CheckpointError
from megatron_sbn.parallel.state import ParallelState


@dataclass(frozen=True)
class Opened:
    """A valid checkpoint. `passed_over` says what is wrong with those that should have been used before it."""

    path: Path
    manifest: Manifest
    state: State
    passed_over: tuple[str, ...]


def open_newest(folder: Path, parallel: ParallelState, at_most: int | None = None) -> Opened:
    """The newest valid checkpoint of a run that has some; with `at_most`, of those with at most so many steps.

    Raises CheckpointError on every rank, naming what is wrong with each, where none is valid.
    """
    tried: list[Path] = []
    with capture_error() as listing:
        tried = folders.candidates(folder) if parallel.rank == 0 else []
        tried = [path for path in tried if at_most is None or (folders.step_of(path) or 0) <= at_most]
    problem = first_error_on_any_rank(listing.problem, parallel)
    problems = [problem] if problem else []
    shared = [tried]
    dist.broadcast_object_list(shared, src=0)
    for path in shared[0]:
        opened = None
        with capture_error() as opening:
            opened = _open(path, parallel, problems)
        problem = first_error_on_any_rank(opening.problem, parallel)
        if not problem:
            assert opened is not None, "nothing was wrong on any rank"
            return opened
        problems.append(problem)
    limit = "" if at_most is None else f" of at most {at_most} steps"
    reasons = "; ".join(problems) or (
        "there is none" if limit else f"{folder / folders.LATEST} names what is not there"
    )
    error = CheckpointError(
        f"{folder}: no checkpoint{limit} is valid: {reasons}; put one back, or name another run_dir"
    )
    error.on_every_rank = True
    raise error


def _open(path: Path, parallel: ParallelState, problems: list[str]) -> Opened:
    manifest = read_manifest(path)
    names = sorted(manifest.files)
    folders.check_files(path, manifest, names[parallel.rank :: parallel.world_size])
    state = read_state(path)
    if folders.step_of(path) != state.step:
        raise CheckpointError(f"{path}: holds step {state.step}; give it its own name back")
    return Opened(path, manifest, state, tuple(problems))
