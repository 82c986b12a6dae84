"""`sbn doctor RECIPE --engines PYTHON...`: do other releases of the engines compute the same bits?

Every PYTHON is the interpreter of an environment with other releases of PyTorch, Triton, Megatron-Core or DeepSpeed.
This project's code is this process's in all of them. Each environment trains a tiny model of the recipe under every
layout of up to four ranks, and goes on from the checkpoints that this environment saved half-way. What is compared,
to the bit: codes, quantized activations and hidden states of the first step; loss and gradient norm of every step.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import megatron_sbn
from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.config import Recipe
from megatron_sbn.doctor.layouts import candidates
from megatron_sbn.doctor.trials import Start, TrialError, run_trials
from megatron_sbn.errors import RecipeError
from megatron_sbn.redaction import excerpt
from megatron_sbn.text_table import aligned

if TYPE_CHECKING:
    from megatron_sbn.doctor.report import Trial

COLUMNS = ("codes", "x_q", "hidden", "loss", "grad norm", "resumed")
NAMES = ("megatron-core", "torch", "triton", "deepspeed", "python")
FAILED: Mapping[str, float] = MappingProxyType(dict.fromkeys(COLUMNS, math.inf))
_ASK_SECONDS = 120.0
_QUESTION = """
import json, platform
from megatron_sbn import engines
engines.check_installed()
print(json.dumps({"python": platform.python_version()} | engines.installed()))
"""


@dataclass(frozen=True)
class Environment:
    """An interpreter and the releases of the engines that it finds, `python`'s own included."""

    python: str
    releases: Mapping[str, str]

    @property
    def label(self) -> str:
        """megatron-core 0.19.2, torch 2.13.0, ..."""
        order = ("megatron-core", "torch", "deepspeed", "triton", "python")
        return ", ".join(f"{name} {self.releases[name]}" for name in order if name in self.releases)


def check_engines(recipe: Recipe, pythons: Sequence[str], steps: int, json_file: Path | None = None) -> bool:
    """Prints the table environment x what is compared; returns whether all bits are equal.

    Raises RecipeError where a PYTHON cannot be run or lacks an engine, TrialError where its ranks fail.
    """
    layouts = candidates(recipe)
    with _code_for_others() as code, tempfile.TemporaryDirectory() as folder:
        # Where this environment's engines come through PYTHONPATH, they still do; others have their own.
        own = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        paths = [own, *[str(code)] * len(pythons)]
        variables = [{"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} for path in paths]
        asked = zip((sys.executable, *pythons), variables, strict=True)
        environments = [ask(python, given) for python, given in asked]
        saved = Path(folder)
        trials: list[dict[str, Trial]] = []
        for number, environment in enumerate(environments):
            start = Start(
                environment.python,
                variables[number],
                save=saved if number == 0 else None,
                resume=saved,
                label=f"{environment.label}: ",
            )
            trials.append(_trials(layouts, steps, start, essential=number == 0))
    return _report(recipe, environments, trials, steps, json_file)


def _trials(layouts: Mapping[str, tuple[int, Recipe]], steps: int, start: Start, essential: bool) -> "dict[str, Trial]":
    """Trials by layout; those of ranks that failed are left out and named, unless they are `essential`."""
    trials: dict[str, Trial] = {}
    for ranks in sorted({ranks for ranks, _ in layouts.values()}):
        group = {name: layout for name, layout in layouts.items() if layout[0] == ranks}
        # A start numbers its own layouts, so each number of ranks has its checkpoints in a folder of its own.
        place = f"{ranks}-ranks"
        own = replace(start, save=start.save and start.save / place, resume=start.resume and start.resume / place)
        try:
            trials |= run_trials(group, steps, own)
        except TrialError as error:
            if essential:
                raise
            print(f"failed: {error}", flush=True)
    return trials


@contextmanager
def _code_for_others() -> Iterator[Path]:
    """A folder with links to this project's two packages and nothing else, for another interpreter's path."""
    with tempfile.TemporaryDirectory() as folder:
        for package in (megatron_sbn.__name__, "sbn_kernels"):
            spec = importlib.util.find_spec(package)
            assert spec is not None, "this process runs its code"
            assert spec.origin is not None, "a package of files"
            (Path(folder) / package).symlink_to(Path(spec.origin).parent)
        yield Path(folder)


def ask(python: str, variables: Mapping[str, str]) -> Environment:
    """What an interpreter finds. Raises RecipeError, naming it, where it cannot run or the engines are not right."""
    try:
        answer = subprocess.run(
            [python, "-c", _QUESTION],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RecipeError(
            f"--engines {python}: cannot be run: {error}; give the bin/python of an environment"
        ) from None
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        reason = reason.rpartition("RecipeError: ")[2]
        raise RecipeError(f"--engines {python}: {reason}; give the bin/python of an environment with the engines")
    try:
        *_, last = answer.stdout.splitlines()  # others may be printed by what an interpreter loads at its start
        return Environment(python, dict(json.loads(last)))
    except (ValueError, TypeError):
        raise RecipeError(
            f"--engines {python}: is no Python: it answered {excerpt(answer.stdout)}; give an environment's bin/python"
        ) from None


def _report(
    recipe: Recipe,
    environments: Sequence[Environment],
    trials: "Sequence[Mapping[str, Trial]]",
    steps: int,
    json_file: Path | None,
) -> bool:
    """Prints the table and what differs; writes the JSON; returns whether nothing does."""
    first = trials[0]
    found = [
        {name: differences(trial[name], first[name], steps // 2) if name in trial else FAILED for name in first}
        for trial in trials
    ]
    rows = []
    for environment, by_layout in zip(environments, found, strict=True):
        cells = [_cell([d[column] for d in by_layout.values() if column in d]) for column in COLUMNS]
        rows.append((*(environment.releases[name] for name in NAMES), *cells))
    print(f"{recipe.name}: a tiny model under {len(first)} layouts of up to four ranks, {steps} steps")
    print("\n".join(aligned((*NAMES, *COLUMNS), rows)))
    for environment, by_layout in zip(environments, found, strict=True):
        for name, of_layout in by_layout.items():
            largest = ", ".join(f"{column} by {value:.1e}" for column, value in of_layout.items() if value)
            if largest:
                print(f"differs: {environment.label}: {name}: {largest}")
    equal = not any(value for by_layout in found for d in by_layout.values() for value in d.values())
    if equal:
        print(release_note(recipe, environments, len(first), steps))
    if json_file is not None:
        told_to_programs: dict[str, Any] = {
            "equal": equal,
            "environments": [
                {
                    "releases": dict(environment.releases),
                    "differences": {name: _for_json(of_layout) for name, of_layout in by_layout.items()},
                    "digests": digests(trial),
                }
                for environment, by_layout, trial in zip(environments, found, trials, strict=True)
            ],
        }
        write_atomically(json_file, json.dumps(told_to_programs, indent=2, allow_nan=False).encode() + b"\n")
    return equal


def release_note(recipe: Recipe, environments: Sequence[Environment], layouts: int, steps: int) -> str:
    """What may be written into a changelog: the releases, and what is the same in all of them."""
    order = ("megatron-core", "torch", "deepspeed", "triton", "python")
    names = [name for name in order if name in _common(environments)]
    releases = [f"{name} {_listed([e.releases[name] for e in environments])}" for name in names]
    return (
        f"note: the same bits with {'; '.join(releases)}: codes, quantized activations and hidden states of the first "
        f"step, loss and gradient norm of {steps} steps, and the steps after a checkpoint of the first environment; "
        f"{layouts} layouts of {recipe.name}"
    )


def _common(environments: Sequence[Environment]) -> set[str]:
    """Engines that all of them have."""
    return set.intersection(*(set(environment.releases) for environment in environments))


def _listed(releases: Sequence[str]) -> str:
    """Each release once, in the order of its first appearance: "2.13.0, 2.11.0 and 2.14.1"."""
    distinct = list(dict.fromkeys(releases))
    return " and ".join(filter(None, [", ".join(distinct[:-1]), distinct[-1]]))


def _for_json(of_layout: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no infinity."""
    return {column: value if math.isfinite(value) else str(value) for column, value in of_layout.items()}


def _cell(values: list[float]) -> str:
    """ "equal", or in how many layouts it is not and by how much at most; inf: no number tells by how much."""
    if not values:
        return "-"
    off = [value for value in values if value]
    return f"{len(off)} of {len(values)} differ, {max(off):.1e}" if off else "equal"


def differences(ours: "Trial", theirs: "Trial", half: int) -> dict[str, float]:
    """Largest relative difference by column; 0 where every bit is equal. `theirs` went on from step `half`."""
    from megatron_sbn.doctor.report import largest_difference

    found = {}
    for column in COLUMNS[:3]:
        names = {name for name in (*ours.tensors, *theirs.tensors) if name.rpartition(".")[2] == column}
        if names:
            found[column] = max(largest_difference(ours.tensors.get(n), theirs.tensors.get(n)) for n in names)
    found["loss"] = _numbers(ours.losses, theirs.losses)
    found["grad norm"] = _numbers(ours.grad_norms, theirs.grad_norms)
    found["resumed"] = max(
        _numbers(ours.resumed_losses, theirs.losses[half:]), _numbers(ours.resumed_norms, theirs.grad_norms[half:])
    )
    return found


def _numbers(ours: Sequence[float], theirs: Sequence[float]) -> float:
    if len(ours) != len(theirs):
        return math.inf
    return max((_relative(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _relative(ours: float, theirs: float) -> float:
    """0 for the same bits, else the difference over `theirs`; inf where that is no number."""
    if repr(ours) == repr(theirs):
        return 0.0
    difference = abs(ours - theirs) / abs(theirs) if theirs else math.inf
    return difference if math.isfinite(difference) else math.inf


def digests(trial: "Mapping[str, Trial]") -> dict[str, dict[str, str]]:
    """By layout and column: sha256 over the tensors of a kind, and the numbers of all steps as they are printed."""
    from megatron_sbn.doctor.report import fingerprint_of

    return {
        name: {column: fingerprint_of(layout, column) for column in COLUMNS[:3]}
        | {"loss": repr(layout.losses), "grad norm": repr(layout.grad_norms)}
        for name, layout in trial.items()
    }
