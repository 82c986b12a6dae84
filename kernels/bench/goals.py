"""Goals, and the table that a run ends with: a line a kernel, and one for each goal.

kernel   shape   ours ms   best peer ms   ratio   share   goal   met
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness import Result
from records import Ceilings, share


@dataclass(frozen=True)
class Measured:
    """All that a run measured: what goals are judged by.

    Attributes:
        results: in the order of the run.
        ceilings: of the machine.
        device: its name.
    """

    results: Sequence[Result]
    ceilings: Ceilings
    device: str

    def of(self, kernel: str) -> tuple[Result, ...]:
        """The results of a kernel in which we ran."""
        return tuple(result for result in self.results if result.case.kernel == kernel and result.ours)


@dataclass(frozen=True)
class Goal:
    """Something to reach.

    Attributes:
        text: what, "exact over fp32 linear"; the wanted value is added to it.
        wanted: the least value that meets it.
        value: what was measured -> the value reached, None if this run cannot tell.
        percent: whether values are shares; ratios otherwise.
    """

    text: str
    wanted: float
    value: Callable[[Measured], float | None]
    percent: bool = False

    def show(self, value: float) -> str:
        """A value in the goal's unit."""
        return f"{100 * value:.0f}%" if self.percent else f"{value:.2f}x"


def total_ratio(results: Iterable[Result], ours: str, peer: str) -> float | None:
    """Sum of the peer's medians over the sum of ours; None if there is nothing, or one is missing."""
    pairs = [(result.milliseconds(peer), result.milliseconds(ours)) for result in results]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    return sum(a or 0.0 for a, _ in pairs) / sum(b or 0.0 for _, b in pairs)


def mean_ratio(results: Iterable[Result], ours: str, peer: str) -> float | None:
    """Geometric mean over results of the peer's median over ours; None as `total_ratio`."""
    return geometric_mean(total_ratio((result,), ours, peer) for result in results)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """None if there are no values, or one of them is None."""
    numbers = list(values)
    if not numbers or any(number is None for number in numbers):
        return None
    return math.exp(sum(math.log(number) for number in numbers if number is not None) / len(numbers))


def least_share(results: Iterable[Result], ours: str, ceilings: Ceilings) -> float | None:
    """The smallest share of its ceiling of a contender over results; None if it was not measured in one."""
    shares = []
    for result in results:
        time = result.milliseconds(ours)
        part = None if time is None else share(result.case, time, ceilings)
        if part is None:
            return None
        shares.append(part)
    return min(shares, default=None)


HEADINGS = ("kernel", "shape (tokens x out x in)", "ours ms", "best peer ms", "ratio", "share", "goal", "met")
"""Columns of the table."""


def _head(kernel: str, measured: Measured, reason: str) -> tuple[str, ...]:
    """The first six columns of a kernel's line: its largest case, one with a peer if there is any."""
    results = measured.of(kernel)
    if not results:
        return (kernel, f"not measured: {reason or 'see above'}", "", "", "", "")
    result = max(results, key=lambda r: (r.best_peer is not None, r.case.operations, r.case.bytes_moved))
    ours, peer = result.ours, result.best_peer
    time = result.milliseconds(ours) if ours else None
    part = None if time is None else share(result.case, time, measured.ceilings)
    against = result.milliseconds(peer) if peer else None
    return (
        *(kernel, result.case.shape, f"{time:.3f}"),
        *(("-", "-") if against is None or time is None else (f"{against:.3f} {peer}", f"{against / time:.2f}x")),
        "-" if part is None else f"{100 * part:.0f}% {result.case.ceiling}",
    )


def table(goals: Mapping[str, Sequence[Goal]], measured: Measured, reasons: Mapping[str, str]) -> Iterator[str]:
    """The lines of the table; `reasons` says why a kernel has no result."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    for kernel, wanted in goals.items():
        head = _head(kernel, measured, reasons.get(kernel, ""))
        judged = [_judge(goal, measured, kernel) for goal in wanted] or [("-", "")]
        lines.append((*head, *judged[0]))
        lines += [("", "", "", "", "", "", *verdict) for verdict in judged[1:]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _judge(goal: Goal, measured: Measured, kernel: str) -> tuple[str, str]:
    text = f"{goal.text} >= {goal.show(goal.wanted)}"
    value = goal.value(measured) if measured.of(kernel) else None
    if value is None:
        return text, "not measured"
    return text, f"{'yes' if value >= goal.wanted else 'NO'}, {goal.show(value)}"
