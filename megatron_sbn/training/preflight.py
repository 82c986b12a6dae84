"""What can be known of a start before an engine is imported: said in the first second, once, by whoever starts ranks.

Imports no torch, and nothing that does.
"""

import tempfile
from contextlib import suppress
from pathlib import Path

from megatron_sbn.atomic_files import exclusive
from megatron_sbn.checkpoint.directory import holds_any, resolve, saved_step
from megatron_sbn.checkpoint.manifest import read_manifest, read_state
from megatron_sbn.config import Recipe
from megatron_sbn.errors import STOPPED, CheckpointError, InputError, RecipeError
from megatron_sbn.runs.folder import CHECKPOINTS, RECIPE
from megatron_sbn.runs.recipe_changes import check_changes, check_steps, earlier_recipe
from megatron_sbn.runs.status import read_status, write_status
from megatron_sbn.tracking.destination import destination


def check_start(recipe: Recipe) -> None:
    """Raises an SbnError of one line for a start that cannot succeed.

    RecipeError: a tracking URI that is none, or a change that the run in run_dir does not take. InputError: run_dir
    cannot be written. CheckpointError: nothing is at start_from.
    """
    run = Path(recipe.run_dir) if recipe.run_dir else None
    if recipe.tracking.enabled:
        destination(recipe, run or Path("runs") / recipe.name)
    _check_writable(run or Path("runs"))
    continues = run is not None and holds_any(run / CHECKPOINTS)
    if run is not None and continues:
        was, done = earlier_recipe(run / RECIPE), saved_step(run)
        if was is not None:
            check_changes(was, recipe, done, run)
        check_steps(recipe, done, run)
    elif recipe.start_from is not None:
        _check_source(recipe, recipe.start_from)


def finished_already(recipe: Recipe) -> str | None:
    """A line about a run that has nothing left to do; None for any other."""
    if recipe.run_dir is None or recipe.checkpoint.resume == "never":
        return None
    run = Path(recipe.run_dir)
    status = read_status(run)
    if saved_step(run) not in (0, recipe.training.steps):  # `latest` was set back, to go on from there
        return None
    if status is None or status.state != "FINISHED" or status.step != recipe.training.steps:
        return None
    return f"{recipe.run_dir}: finished already, {status.step} steps; raise training.steps, or name another run_dir"


def record_stop(recipe: Recipe, reason: str) -> None:
    """STOPPED in status.json of a run that was asked to stop before its folder was opened; not where another trains."""
    if recipe.run_dir is None:
        return
    run = Path(recipe.run_dir)
    with suppress(InputError), exclusive(run / "run"):
        write_status(run, "STOPPED", STOPPED, saved_step(run), reason)


def record_death(recipe: Recipe, status: int) -> None:
    """FAILED in status.json of a run whose ranks are gone and could not say so, such as one that was killed."""
    if recipe.run_dir is None or status in (0, STOPPED):
        return
    run = Path(recipe.run_dir)
    known = read_status(run)
    if known is None or known.state != "RUNNING":
        return
    with suppress(InputError), exclusive(run / "run"):
        write_status(run, "FAILED", status, saved_step(run), f"a rank ended with status {status} and could not say why")


def _check_source(recipe: Recipe, source: str) -> None:
    """Raises CheckpointError where nothing is there to begin with, RecipeError where nothing would be left to do."""
    path = resolve(source)
    if recipe.start_with == "weights":
        return
    if not any(name.startswith("optimizer.") for name in read_manifest(path).tensors):
        raise CheckpointError(f"{path}: has weights and no optimizer state; set start_with=weights")
    step = read_state(path).step
    if step >= recipe.training.steps:
        raise RecipeError(
            f"training.steps = {recipe.training.steps}: {path} is of step {step}, so nothing is left to do; set more, "
            "or start_with=weights to begin at step 0"
        )


def _check_writable(folder: Path) -> None:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()  # permission bits do not tell of root, quotas and read-only mounts
    except OSError as error:
        problem = error.strerror or error
        raise InputError(f"run_dir = {folder}: {there} cannot be written ({problem}); name another folder") from None
