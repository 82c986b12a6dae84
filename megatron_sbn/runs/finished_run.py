"""A run read back from its folder: the resolved recipe, every metric, and what its steps cost.

tokens(step) = step * global_batch_size * seq_length
FLOPs(step)  = tokens' model FLOPs up to that step, dense-equivalent or sparse-effective (plan/flops.py)
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import InputError, RecipeError
from megatron_sbn.plan.flops import model_flops_per_token
from megatron_sbn.runs.folder import METRICS, RECIPE, TRACKING
from megatron_sbn.runs.metrics_file import Line, read_metrics
from megatron_sbn.runs.tracking_record import read_record


@dataclass(frozen=True)
class Run:
    """A run: its folder or name, its resolved recipe and its metrics; on how many ranks, if that was recorded."""

    folder: Path
    recipe: Recipe
    lines: list[Line]
    ranks: int | None = None

    @property
    def name(self) -> str:
        """The folder's name, of `.` too."""
        return self.folder.absolute().name

    @property
    def format_name(self) -> str:
        """The final weight format as figures name it: ternary, dense BF16 or dense FP32."""
        weight_format = self.recipe.linear.final.weight_format
        return weight_format if weight_format == "ternary" else f"dense {'BF16' if self.recipe.model.bf16 else 'FP32'}"

    @property
    def sparsity(self) -> tuple[int, int]:
        """N and M at the end."""
        return self.recipe.linear.final.sparsity

    @property
    def schedule(self) -> str:
        """Its phases in words; empty where there are none."""
        return self.recipe.linear.schedule

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every measurement, in order."""
        return [(int(line["step"]), line[metric]) for line in self.lines if metric in line]

    def tokens(self, step: int) -> float:
        """Tokens trained on after `step` steps."""
        return float(step * self.recipe.training.global_batch_size * self.recipe.model.seq_length)

    def flops(self, step: int, sparse: bool) -> float:
        """Model FLOPs of the first `step` steps; phases change those of a token."""
        starts = sorted({0, step, *(phase.step for phase in self.recipe.linear.phases if phase.step < step)})
        spans = itertools.pairwise(starts)
        return sum(
            (self.tokens(end) - self.tokens(start)) * model_flops_per_token(self.recipe, start)[int(sparse)]
            for start, end in spans
        )


def read_run(folder: Path) -> Run:
    """A run folder. Raises InputError, naming the file, where recipe or metrics cannot be read."""
    try:
        recipe = load_recipe(folder / RECIPE)
    except RecipeError as error:
        raise InputError(f"{folder}: is no run folder: {error}") from None
    return Run(folder, recipe, read_metrics(folder / METRICS), _ranks(folder / TRACKING))


def _ranks(path: Path) -> int | None:
    """Of a tracked run's record."""
    tags = read_record(path).tags if path.exists() else {}
    return int(tags["ranks"]) if "ranks" in tags else None
