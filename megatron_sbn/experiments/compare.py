"""Runs side by side: what differs in their recipes, and their metrics at equal tokens and at equal FLOPs.

    tokens(step) = step * global_batch_size * seq_length
    FLOPs(step)  = tokens' model FLOPs up to that step, dense-equivalent or sparse-effective (flops.py)

"At equal tokens" is at the largest number that every run has measured or passed; of each run the last value at or
before it counts, so runs that measure at other steps are compared a little early, never with more training. The same
for FLOPs. Reads run folders; imports no torch.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import InputError, RecipeError
from megatron_sbn.experiments.flops import model_flops_per_token
from megatron_sbn.experiments.metrics import Line, read_metrics
from megatron_sbn.text_table import aligned

METRICS = ("loss", "validation_loss", "validation_perplexity", "grad_norm", "flip_rate", "zero_fraction")
_OF_NO_INTEREST = ("name", "run_dir")


@dataclass(frozen=True)
class Run:
    """A run folder: its resolved recipe and its metrics."""

    folder: Path
    recipe: Recipe
    lines: list[Line]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

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
        recipe = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        raise InputError(f"{folder}: is no run folder: {error}") from None
    return Run(folder, recipe, read_metrics(folder / "metrics.jsonl"))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value in every run) of recipe keys that are not the same in all."""
    flat = [run.recipe.flat() for run in runs]
    rows = [(key, [values[key] for values in flat]) for key in flat[0] if key not in _OF_NO_INTEREST]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def at_equal(runs: Sequence[Run], metric: str, cost: Callable[[Run, int], float]) -> list[tuple[int, float]] | None:
    """(step, value) of every run at the largest cost that all have reached; None where a run lacks the metric."""
    points = [run.points(metric) for run in runs]
    if not all(points):
        return None
    budget = min(cost(run, own[-1][0]) for run, own in zip(runs, points, strict=True))
    chosen = []
    for run, own in zip(runs, points, strict=True):
        # Costs are sums of floats: one at the budget may exceed it in the last bits.
        within = [point for point in own if cost(run, point[0]) <= budget * (1 + 1e-12)]
        if not within:
            return None
        chosen.append(within[-1])
    return chosen


def report(runs: Sequence[Run]) -> str:
    """The whole comparison as text."""
    names = [run.name for run in runs]
    lines = ["recipes differ in", *aligned(("key", *names), [(key, *values) for key, values in differences(runs)])]
    costs: tuple[tuple[str, Callable[[Run, int], float]], ...] = (
        ("tokens", lambda run, step: run.tokens(step)),
        ("dense-equivalent FLOPs", lambda run, step: run.flops(step, sparse=False)),
        ("sparse-effective FLOPs", lambda run, step: run.flops(step, sparse=True)),
    )
    for what, cost in costs:
        rows = []
        for metric in METRICS:
            chosen = at_equal(runs, metric, cost)
            if chosen is not None:
                spent = min(cost(run, step) for run, (step, _) in zip(runs, chosen, strict=True))
                rows.append((metric, f"{spent:.4g}", *(f"{value:.5g} (step {step})" for step, value in chosen)))
        lines += ["", f"at equal {what}", *aligned(("metric", what, *names), rows)]
    speeds = [[value for _, value in run.points("tokens_per_second")] for run in runs]
    told = [f"{median(speed):,.0f}" if speed else "-" for speed in speeds]
    lines += ["", *aligned(("median over steps", *names), [("tokens_per_second", *told)])]
    return "\n".join(lines)
