"""Opens a run's folder (runs/folder.py), on all ranks together, and says in status.json how the run stands.

`run_dir` names the folder, and then a second start continues what is there (`checkpoint.resume: auto`); without it
every start is a new run in runs/NAME-TIME.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_sbn.atomic_files import exclusive, write_atomically
from megatron_sbn.checkpoint.directory import clean, holds_any, saved_step
from megatron_sbn.config import Recipe
from megatron_sbn.errors import CheckpointError, InputError, SbnError
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.redaction import mask_secrets
from megatron_sbn.runs.folder import CHECKPOINTS, LOGS, RECIPE, RunFolder
from megatron_sbn.runs.status import State, read_status, write_status

RUNS = Path("runs")


def tell(
    folder: RunFolder, parallel: ParallelState, state: State, exit_status: int | None, step: int, reason: str = ""
) -> None:
    """Writes status.json, on rank 0."""
    if parallel.rank == 0:
        write_status(folder.path, state, exit_status, step, reason)


@contextmanager
def recorded(folder: RunFolder, parallel: ParallelState) -> Iterator[None]:
    """RUNNING in status.json while the body runs, and FAILED if it raises; other ends are the body's to tell."""
    tell(folder, parallel, "RUNNING", None, saved_step(folder.path))
    reason, status = "ended without a word; see the logs", 1
    try:
        yield
    except SbnError as error:
        reason, status = mask_secrets(str(error)), error.status
        raise
    except KeyboardInterrupt:
        reason, status = "interrupted", 130
        raise
    finally:
        previous = read_status(folder.path) if parallel.rank == 0 else None
        if previous is not None and previous.state == "RUNNING":
            tell(folder, parallel, "FAILED", status, saved_step(folder.path), reason)


@contextmanager
def open_run_folder(recipe: Recipe, parallel: ParallelState) -> Iterator[RunFolder]:
    """The run's folder, the same on every rank; rank 0 makes it, locks it and writes the resolved recipe into it.

    Raises CheckpointError (resume: required without a checkpoint; a folder that `resume: never` would overwrite) and
    InputError where it cannot be written or another run is in it, on every rank.
    """
    with ExitStack() as stack:
        yield _agree(_decide(recipe, stack) if parallel.rank == 0 else None)


def _agree(own: RunFolder | CheckpointError | InputError | None) -> RunFolder:
    """Rank 0's decision on every rank."""
    decision: list[object] = [own]
    dist.broadcast_object_list(decision, src=0)
    (decided,) = decision
    if isinstance(decided, (CheckpointError, InputError)):
        decided.on_every_rank = True
        raise decided
    assert isinstance(decided, RunFolder)
    return decided


def _decide(recipe: Recipe, stack: ExitStack) -> RunFolder | CheckpointError | InputError:
    path = Path(recipe.run_dir) if recipe.run_dir else RUNS / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        stack.enter_context(exclusive(path / "run"))
        continues = _continues(recipe, path)
        for folder in (path / CHECKPOINTS, path / LOGS):
            folder.mkdir(parents=True, exist_ok=True)
        clean(path / CHECKPOINTS)
        write_atomically(path / RECIPE, mask_secrets(recipe.to_yaml()).encode())
    except (CheckpointError, InputError) as error:
        return error
    except OSError as error:
        return InputError(f"run_dir = {path}: cannot be written: {error.strerror}; name another folder")
    return RunFolder(path, continues)


def _continues(recipe: Recipe, path: Path) -> bool:
    found = holds_any(path / CHECKPOINTS)
    mode = recipe.checkpoint.resume
    if mode == "required" and not found:
        raise CheckpointError(
            f"{path}: checkpoint.resume = required, and there is no checkpoint; use auto to start anew"
        )
    if mode == "never" and found:
        raise CheckpointError(f"{path}: holds a run already and checkpoint.resume = never; name another run_dir")
    return found
