"""Starts the ranks of trials (rank.py), with this environment's engines or another's, and reads what they left."""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sbn.config import Recipe
from megatron_sbn.errors import SbnError
from megatron_sbn.launch import launch

if TYPE_CHECKING:
    from megatron_sbn.doctor.report import Trial

START_SECONDS, STEP_SECONDS = 300.0, 5.0
_RANK = "megatron_sbn.doctor.rank"


class TrialError(SbnError):
    """Ranks of a trial failed or did not finish."""


@dataclass(frozen=True)
class Start:
    """How the ranks are started.

    Args:
        python: the interpreter whose engines they use.
        environment: added to this process's environment.
        save: where half-way checkpoints are left; None leaves none.
        resume: where half-way checkpoints are; the second half is then trained from them too.
        label: what errors call it.
    """

    python: str = sys.executable
    environment: Mapping[str, str] | None = None
    save: Path | None = None
    resume: Path | None = None
    label: str = ""


def run_trials(recipes: Mapping[str, tuple[int, Recipe]], steps: int, start: Start | None = None) -> "dict[str, Trial]":
    """Trains every recipe on its number of ranks; one start of the ranks for all recipes of one number.

    Raises TrialError where ranks fail, do not finish, or do not agree.
    """
    start = start or Start()
    trials = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = {name: root / f"{index}.yaml" for index, name in enumerate(recipes)}
        for name, (_, recipe) in recipes.items():
            files[name].write_text(recipe.to_yaml(), encoding="utf-8")
        for ranks in sorted({ranks for ranks, _ in recipes.values()}):
            names = [name for name, (size, _) in recipes.items() if size == ranks]
            _launch(start, [files[name] for name in names], names, ranks, steps, root)
            for name in names:
                trials[name] = _read(root / files[name].stem, ranks, f"{start.label}{name}")
    return {name: trials[name] for name in recipes}


def _launch(start: Start, files: list[Path], names: list[str], ranks: int, steps: int, output: Path) -> None:
    title = f"{start.label}{'; '.join(names)}"
    print(f"starting {ranks} rank{'s' if ranks > 1 else ''}: {title}", file=sys.stderr, flush=True)
    arguments = ["--steps", str(steps), "--output", str(output)]
    for option, folder in (("--save", start.save), ("--resume", start.resume)):
        arguments += [option, str(folder)] if folder is not None else []
    seconds = START_SECONDS + STEP_SECONDS * steps * len(names)
    arguments += [str(file) for file in files]
    try:
        status = launch(
            arguments, ranks, module=_RANK, seconds=seconds, python=start.python, environment=start.environment
        )
    except TimeoutError as error:
        raise TrialError(f"{title}: {error} within {seconds:.0f} s") from None
    if status:
        raise TrialError(f"{title}: a rank ended with status {status}, see above")


def _read(folder: Path, ranks: int, name: str) -> "Trial":
    from megatron_sbn.doctor.report import read_trial

    try:
        return read_trial(folder, ranks)
    except ValueError as error:
        raise TrialError(f"{name}: {error}") from None
