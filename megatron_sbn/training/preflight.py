"""What can be known of a start before an engine is imported: said in the first second, once, by whoever starts ranks.

Imports no torch, and nothing that does.
"""

import tempfile
from pathlib import Path

from megatron_sbn.checkpoint.directory import holds_any, resolve, saved_step
from megatron_sbn.config import Recipe
from megatron_sbn.errors import InputError
from megatron_sbn.runs.folder import CHECKPOINTS, RECIPE
from megatron_sbn.runs.recipe_changes import check_changes, earlier_recipe
from megatron_sbn.runs.status import read_status
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
        was = earlier_recipe(run / RECIPE)
        if was is not None:
            check_changes(was, recipe, saved_step(run), run)
    elif recipe.start_from is not None:
        resolve(recipe.start_from)


def finished_already(recipe: Recipe) -> str | None:
    """A line about a run that has nothing left to do; None for any other."""
    if recipe.run_dir is None or recipe.checkpoint.resume == "never":
        return None
    status = read_status(Path(recipe.run_dir))
    if status is None or status.state != "FINISHED" or status.step != recipe.training.steps:
        return None
    return f"{recipe.run_dir}: finished already, {status.step} steps; raise training.steps, or name another run_dir"


def _check_writable(folder: Path) -> None:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()  # permission bits do not tell of root, quotas and read-only mounts
    except OSError as error:
        problem = error.strerror or error
        raise InputError(f"run_dir = {folder}: {there} cannot be written ({problem}); name another folder") from None
