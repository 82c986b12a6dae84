"""Which points of a metrics file MLflow does not have yet.

A point is missing when its step is above the last step that MLflow reports for its metric. So lines that are read
again, after a failure or a new start, add nothing. Steps of one metric grow from line to line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_sbn.runs.metrics_file import RESERVED, read_new


class Point(NamedTuple):
    """One value of one metric, in the order of mlflow.entities.Metric; `timestamp` in ms since 1970."""

    name: str
    value: float
    timestamp: int
    step: int


class PendingPoints:
    """Reads a metrics file once from its beginning after every connection; a file that is not there is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last_steps: dict[str, int] = {}

    def begin_after(self, last_steps: Mapping[str, int]) -> None:
        """Begins again, with the last step of every metric that MLflow has."""
        self._offset = 0
        self._last_steps = dict(last_steps)

    def take(self) -> list[Point]:
        """Points that were not taken before. Raises InputError for a broken file."""
        if not self._path.exists():
            return []
        lines, self._offset = read_new(self._path, self._offset)
        points = []
        for line in lines:
            step, timestamp = int(line["step"]), int(line["time"] * 1000)
            for name, value in line.items():
                if name not in RESERVED and step > self._last_steps.get(name, -1):
                    self._last_steps[name] = step
                    points.append(Point(name, value, timestamp, step))
        return points
