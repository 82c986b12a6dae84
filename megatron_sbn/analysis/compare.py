"""Runs side by side: what differs in their recipes, and their metrics at equal tokens and at equal FLOPs.

"At equal tokens" is at the largest number at which every run has measured a metric or gone past; runs that measured
before and after it, but not there, are read off the line between the two (marked ~). The same for FLOPs. Reads run
folders; imports no torch.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_sbn.redaction import one_line
from megatron_sbn.runs.finished_run import Run
from megatron_sbn.text_table import aligned

HEADER = ("run", "linear", "steps", "tokens", "loss", "perplexity", "zeros", "tokens/s")
METRICS = ("loss", "validation_loss", "validation_perplexity", "grad_norm", "flip_rate", "zero_fraction")
_OF_NO_INTEREST = ("name", "run_dir")


def _row(run: Run) -> tuple[str, ...]:
    """A run in one line; - for what it has not measured."""

    def last(metric: str, form: str) -> str:
        points = run.points(metric)
        return format(points[-1][1], form) if points else "-"

    steps = int(run.lines[-1]["step"]) if run.lines else 0
    speeds = [value for _, value in run.points("tokens_per_second")]
    measured = (last("loss", ".4f"), last("validation_perplexity", ".2f"), last("zero_fraction", ".1%"))
    speed = f"{median(speeds):,.0f}" if speeds else "-"
    return run.name, run.schedule or run.recipe.linear.label, f"{steps}", f"{run.tokens(steps):.4g}", *measured, speed


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value in every run) of recipe keys that are not the same in all."""
    flat = [run.recipe.flat() | {"linear.phases": run.schedule or "none"} for run in runs]
    rows = [(key, [one_line(values[key]) for values in flat]) for key in flat[0] if key not in _OF_NO_INTEREST]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


@dataclass(frozen=True)
class Reading:
    """A metric at some cost; `measured` is False where it lies between two measurements. `step` may be a fraction."""

    step: float
    value: float
    measured: bool

    def __str__(self) -> str:
        """The value, with ~ where it is interpolated, and its step."""
        return f"{'' if self.measured else '~'}{self.value:.5g} (step {self.step:.4g})"


def at_equal(runs: Sequence[Run], metric: str, cost: Callable[[Run, int], float]) -> tuple[float, list[Reading]] | None:
    """(cost, every run's reading there) at the largest cost that all have reached; None where a run has no value."""
    points = [run.points(metric) for run in runs]
    if not all(points):
        return None
    budget = min(cost(run, own[-1][0]) for run, own in zip(runs, points, strict=True))
    readings = [_read_at(run, own, cost, budget) for run, own in zip(runs, points, strict=True)]
    found = [reading for reading in readings if reading is not None]
    return (budget, found) if len(found) == len(runs) else None


def _read_at(
    run: Run, points: Sequence[tuple[int, float]], cost: Callable[[Run, int], float], budget: float
) -> Reading | None:
    """Linear between the measurements around `budget`; None before the first."""
    costs = [cost(run, step) for step, _ in points]
    for (step, value), spent in zip(points, costs, strict=True):
        if math.isclose(spent, budget, rel_tol=1e-12):  # costs are sums of floats
            return Reading(step, value, measured=True)
    after = bisect.bisect(costs, budget)
    if after == 0:
        return None
    (step, value), (next_step, next_value) = points[after - 1 : after + 1]
    share = (budget - costs[after - 1]) / (costs[after] - costs[after - 1])
    return Reading(step + share * (next_step - step), value + share * (next_value - value), measured=False)


def report(runs: Sequence[Run]) -> str:
    """The whole comparison as text, a row a run: results, the keys that differ, metrics at equal cost."""
    names = [run.name for run in runs]
    changed = differences(runs)
    keys = [(name, *(values[row] for _, values in changed)) for row, name in enumerate(names)]
    lines = [*aligned(HEADER, [_row(run) for run in runs]), "", "recipes differ in"]
    lines += aligned(("run", *(key for key, _ in changed)), keys)
    costs: tuple[tuple[str, Callable[[Run, int], float]], ...] = (
        ("tokens", lambda run, step: run.tokens(step)),
        ("dense-equivalent FLOPs", lambda run, step: run.flops(step, sparse=False)),
        ("sparse-effective FLOPs", lambda run, step: run.flops(step, sparse=True)),
    )
    for what, cost in costs:
        found = [(metric, at_equal(runs, metric, cost)) for metric in METRICS]
        known = [(metric, *pair) for metric, pair in found if pair is not None]
        header = ("run", *(f"{metric} at {budget:.4g}" for metric, budget, _ in known))
        rows = [(name, *(str(readings[row]) for *_, readings in known)) for row, name in enumerate(names)]
        lines += ["", f"at equal {what}", *aligned(header, rows)]
    return "\n".join(lines)
