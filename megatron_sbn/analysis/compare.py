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

METRICS = ("loss", "validation_loss", "validation_perplexity", "grad_norm", "flip_rate", "zero_fraction")
_OF_NO_INTEREST = ("name", "run_dir")


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
            found = at_equal(runs, metric, cost)
            if found is not None:
                budget, readings = found
                rows.append((metric, f"{budget:.4g}", *map(str, readings)))
        lines += ["", f"at equal {what}", *aligned(("metric", what, *names), rows)]
    speeds = [[value for _, value in run.points("tokens_per_second")] for run in runs]
    cells = [f"{median(speed):,.0f}" if speed else "-" for speed in speeds]
    lines += ["", *aligned(("median over steps", *names), [("tokens_per_second", *cells)])]
    return "\n".join(lines)
