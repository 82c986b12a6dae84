"""The run folder: everything that one run leaves behind, in one place.

    recipe.yaml           the resolved recipe, passwords masked
    environment.txt       installed packages, of a tracked run
    metrics.jsonl         one object a line (docs/metrics.md)
    system_metrics.jsonl  samples of rank 0's machine, of a tracked run
    checkpoints/          step-N folders and `latest`
    logs/rank-0.log       what was printed
    status.json           how the run stands (run_status.py)
    STOP                  made by a person, here or beside a study's runs: the run stops at the next step, checkpointed

`run_dir` names it, and then a second start continues what is there (`checkpoint.resume: auto`); without it every start
is a new run in runs/NAME-TIME.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_sbn.checkpoint.folder import clean, holds_any
from megatron_sbn.config import Recipe
from megatron_sbn.errors import CheckpointError, InputError, SbnError
from megatron_sbn.masking import mask_secrets
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.run_status import State, read_status, saved_step, write_status
from megatron_sbn.staging import exclusive, write_whole

RUNS = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; `continues` says whether it has checkpoints, from one of which it goes on."""

    path: Path
    continues: bool

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Installed packages, at the last start."""
        return self.path / "environment.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """What rank 0 printed."""
        return self.path / "logs" / "rank-0.log"

    def tell(self, parallel: ParallelState, state: State, exit_status: int | None, step: int, reason: str = "") -> None:
        """Writes status.json, on rank 0."""
        if parallel.rank == 0:
            write_status(self.path, state, exit_status, step, reason)


@contextmanager
def recorded(folder: RunFolder, parallel: ParallelState) -> Iterator[None]:
    """RUNNING in status.json while the body runs, and FAILED if it raises; other ends are the body's to tell."""
    folder.tell(parallel, "RUNNING", None, saved_step(folder.path))
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
        told = read_status(folder.path) if parallel.rank == 0 else None
        if told is not None and told.state == "RUNNING":
            folder.tell(parallel, "FAILED", status, saved_step(folder.path), reason)


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
        for folder in (path / "checkpoints", path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        clean(path / "checkpoints")
        write_whole(path / "recipe.yaml", mask_secrets(recipe.to_yaml()).encode())
    except (CheckpointError, InputError) as error:
        return error
    except OSError as error:
        return InputError(f"run_dir = {path}: cannot be written: {error.strerror}; name another folder")
    return RunFolder(path, continues)


def _continues(recipe: Recipe, path: Path) -> bool:
    found = holds_any(path / "checkpoints")
    mode = recipe.checkpoint.resume
    if mode == "required" and not found:
        raise CheckpointError(
            f"{path}: checkpoint.resume = required, and there is no checkpoint; use auto to start anew"
        )
    if mode == "never" and found:
        raise CheckpointError(f"{path}: holds a run already and checkpoint.resume = never; name another run_dir")
    return found
