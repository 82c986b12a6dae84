"""The run folder: everything that one run leaves behind, in one place. The only place that names its files.

recipe.yaml           the resolved recipe of the last start, passwords masked
recipe_changes.jsonl  what later starts changed in it, and at which step (recipe_changes.py)
environment.txt       installed packages, of a tracked run
metrics.jsonl         one object a line (metrics_file.py, docs/metrics.md)
system_metrics.jsonl  samples of rank 0's machine, of a tracked run (system_metrics.py)
tracking.json         what MLflow is given of the run (tracking_record.py)
checkpoints/          step-N folders and `latest` (checkpoint/directory.py)
logs/rank-0.log       what was printed
profile/              traces of torch.profiler (training.profile)
status.json           how the run stands (status.py)
STOP                  made by a person, here or beside a study's runs: the run stops at the next step, checkpointed
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs")  # of runs without a run_dir
RECIPE, RECIPE_CHANGES, ENVIRONMENT = "recipe.yaml", "recipe_changes.jsonl", "environment.txt"
METRICS, SYSTEM_METRICS, TRACKING = "metrics.jsonl", "system_metrics.jsonl", "tracking.json"
CHECKPOINTS, LOGS, PROFILE = "checkpoints", "logs", "profile"
STATUS, STOP = "status.json", "STOP"


def new_folder(name: str) -> Path:
    """runs/NAME-TIME, made now; -2, -3, ... where another start has that name in the same second. Raises OSError."""
    stem = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("there is always a next number")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Attributes:
        continues: whether it has checkpoints, from one of which it goes on.
        changed: what this start changes in the recipe that it continues, a line each.
        start_from: the checkpoint that a new run begins from, RUN@STEP; None: from new weights.
    """

    path: Path
    continues: bool
    changed: tuple[str, ...] = ()
    start_from: str | None = None

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def recipe_changes(self) -> Path:
        """What later starts changed."""
        return self.path / RECIPE_CHANGES

    @property
    def environment(self) -> Path:
        """Installed packages, at the last start."""
        return self.path / ENVIRONMENT

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def log(self) -> Path:
        """What rank 0 printed."""
        return self.path / LOGS / "rank-0.log"
