"""Opens a run's folder (runs/folder.py), on all ranks together, and says in status.json how the run stands.

`run_dir` names the folder, and then a second start continues what is there (`checkpoint.resume: auto`); without it
every start is a new run in runs/NAME-TIME.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_sbn.atomic_files import exclusive, write_atomically
from megatron_sbn.checkpoint.directory import clean, holds_any, resolve, saved_step, step_of
from megatron_sbn.config import Recipe
from megatron_sbn.errors import CheckpointError, InputError, RecipeError, SbnError
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.redaction import mask_secrets
from megatron_sbn.runs.folder import CHECKPOINTS, LOGS, RECIPE, RECIPE_CHANGES, RUNS, RunFolder, new_folder
from megatron_sbn.runs.recipe_changes import (
    check_changes,
    check_steps,
    describe,
    earlier_recipe,
    keep_changes,
    same_start,
)
from megatron_sbn.runs.status import State, read_status, write_status
from megatron_sbn.training.schedule import learning_rate


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
    finally:
        previous = read_status(folder.path) if parallel.rank == 0 else None
        if previous is not None and previous.state == "RUNNING":
            tell(folder, parallel, "FAILED", status, saved_step(folder.path), reason)


@contextmanager
def open_run_folder(recipe: Recipe, parallel: ParallelState) -> Iterator[RunFolder]:
    """The run's folder, the same on every rank; rank 0 makes it, locks it and writes the resolved recipe into it.

    Raises on every rank: CheckpointError (resume: required without a checkpoint; a folder that `resume: never` would
    overwrite), InputError where it cannot be written or another run is in it, RecipeError where the recipe changes what
    must not change in a run (recipe_changes.py).
    """
    with ExitStack() as stack:
        yield _agree(_decide(recipe, stack) if parallel.rank == 0 else None)


def _agree(own: RunFolder | SbnError | None) -> RunFolder:
    """Rank 0's decision on every rank."""
    decision: list[object] = [own]
    dist.broadcast_object_list(decision, src=0)
    (decided,) = decision
    if isinstance(decided, SbnError):
        decided.on_every_rank = True
        raise decided
    assert isinstance(decided, RunFolder)
    return decided


def _decide(recipe: Recipe, stack: ExitStack) -> RunFolder | SbnError:
    path = Path(recipe.run_dir) if recipe.run_dir else RUNS / recipe.name
    try:
        path = path if recipe.run_dir else new_folder(recipe.name)
        _lock(path, stack)
        continues = _continues(recipe, path)
        was = earlier_recipe(path / RECIPE)
        changed = _changed(was, recipe, path) if continues else ()
        start = _start_from(was, recipe, continues)
        kept = recipe.model_copy(update={"start_from": start, "start_with": _start_with(was, recipe, continues)})
        for folder in (path / CHECKPOINTS, path / LOGS):
            folder.mkdir(parents=True, exist_ok=True)
        clean(path / CHECKPOINTS)
        write_atomically(path / RECIPE, mask_secrets(kept.to_yaml()).encode())
    except (CheckpointError, InputError, RecipeError) as error:
        return error
    except OSError as error:
        return InputError(f"run_dir = {path}: cannot be written: {error.strerror}; name another folder")
    return RunFolder(path, continues, changed, None if continues else start)


def _lock(path: Path, stack: ExitStack) -> None:
    try:
        stack.enter_context(exclusive(path / "run"))
    except InputError as error:
        if "another process" not in str(error):
            raise
        raise InputError(
            f"run_dir = {path}: another process trains in it; wait for it, stop it (sbn cancel {path}), or name another"
        ) from None


def _start_from(was: Recipe | None, recipe: Recipe, continues: bool) -> str | None:
    """RUN@STEP of the checkpoint that the run begins from, fixed at its first start; None for new weights."""
    if was is not None and was.start_from is not None and (continues or same_start(was, recipe)):
        return was.start_from
    if recipe.start_from is None or continues:
        return None
    path = resolve(recipe.start_from)
    step = step_of(path)
    if step is None or path == Path(recipe.start_from) or recipe.start_from.endswith(f"@{step}"):
        return recipe.start_from
    return f"{recipe.start_from}@{step}"


def _start_with(was: Recipe | None, recipe: Recipe, continues: bool) -> str:
    return was.start_with if was is not None and continues else recipe.start_with


def _changed(was: Recipe | None, recipe: Recipe, path: Path) -> tuple[str, ...]:
    """What this start changes in a run, a line each, and keeps it. Raises RecipeError for what may not change."""
    done = saved_step(path)
    if was is None:
        check_steps(recipe, done, path)
        return (f"unknown: {path / RECIPE} is not a recipe of this version",)
    changed = check_changes(was, recipe, done, path)
    if not changed:
        return ()
    keep_changes(path / RECIPE_CHANGES, done, changed)
    return (*describe(changed), *_changed_rate(was, recipe, done))


def _changed_rate(was: Recipe, recipe: Recipe, done: int) -> list[str]:
    """The learning rate of the last step and the next, where it is not what was to follow."""
    if done == 0 or done == recipe.training.steps:
        return []
    last, expected, following = learning_rate(was, done - 1), learning_rate(was, done), learning_rate(recipe, done)
    if math.isclose(expected, following, rel_tol=1e-3):
        return []
    line = f"learning rate: {last:.3g} at step {done}, {following:.3g} at step {done + 1}"
    decay = was.optimizer.decay_steps(was.training.steps)
    if decay != recipe.optimizer.decay_steps(recipe.training.steps) and not recipe.optimizer.stages:
        line += f"; optimizer.lr_decay_steps={decay} keeps the schedule ({expected:.3g})"
    return [line]


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
