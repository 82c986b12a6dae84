"""metrics.jsonl: every number that a run measures, on local disk before anywhere else.

One JSON object a line: `{"step": 20, "time": 1767225600.25, "loss": 5.1, ...}`. `step` counts finished optimizer
steps, `time` is in seconds since 1970, every other key is a metric of docs/metrics.md. Several lines may share a step
(validation follows training), each metric at most once; who reads merges them. NaN and infinities, for which JSON has
no numbers, are the strings "NaN", "Infinity" and "-Infinity", so that every strict parser reads the file; here they
are read back as floats.

A line counts from its newline on, and each is handed to the operating system at once: a killed process loses at most
the end of its last line. Lines of text and no database, because anything can follow and read them while training runs.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.errors import InputError
from megatron_sbn.redaction import excerpt

Line = dict[str, float]
RESERVED = ("step", "time")
LARGEST_STEP, LATEST_TIME = 2**53, 1e11
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """Appends to one metrics.jsonl, made with its folder if need be. One writer per file.

    What a killed writer left of its last line is dropped when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(_whole_lines_end(path))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line. Raises ValueError for a metric called `step` or `time`."""
        for name in RESERVED:
            if name in values:
                raise ValueError(f"metric name {name!r} is the line's own; choose another")
        line: dict[str, float | str] = {"step": int(step), "time": round(time.time(), 3)}
        line |= {name: _json_value(float(value)) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode("ascii") + b"\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the lines of steps later than `step`, which a run resumed there writes anew.

        The file is replaced whole, so a crash leaves the old or the new one. Raises InputError for a broken line.
        """
        self._file.close()
        data = self.path.read_bytes()
        lines = _parse(data, self.path, 1)
        kept = [text for text, line in zip(data.splitlines(keepends=True), lines, strict=False) if line["step"] <= step]
        write_atomically(self.path, b"".join(kept))
        self._file = self.path.open("ab")

    def flush_to_disk(self) -> None:
        """What is written survives the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Puts the file on disk and closes it."""
        self.flush_to_disk()
        self._file.close()


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl in order, without a torn last one: {"step": int, "time": s, metric: float, ...}.

    Raises InputError, naming file and line, for a file that cannot be read or holds anything else.
    """
    return read_new(path, 0)[0]


def read_new(path: Path, offset: int) -> tuple[list[Line], int]:
    """The whole lines from byte `offset` (the start of a line) on, and the offset after them. Raises InputError."""
    try:
        with path.open("rb") as file:
            first_line = 1 + file.read(offset).count(b"\n")
            data = file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot read this metrics file: {error.strerror}") from None
    return _parse(data, path, first_line), offset + data.rfind(b"\n") + 1


def _whole_lines_end(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _json_value(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse(data: bytes, path: Path, first_line: int) -> list[Line]:
    """Every line of `data` that ends in a newline."""
    whole = data[: data.rfind(b"\n") + 1]
    return [_parse_line(text, f"{path}:{first_line + index}") for index, text in enumerate(whole.splitlines())]


def _parse_line(text: bytes, where: str) -> Line:
    try:
        line = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not a JSON object: {_excerpt(text)}; mend or remove the line") from None
    if not isinstance(line, dict):
        raise InputError(f"{where}: not a JSON object: {_excerpt(text)}; mend or remove the line")
    step, clock = line.get("step"), line.get("time")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= LARGEST_STEP:
        raise InputError(f"{where}: step is {excerpt(step)}, not a whole number from 0; mend or remove the line")
    if isinstance(clock, bool) or not isinstance(clock, (int, float)) or not 0 <= clock <= LATEST_TIME:
        raise InputError(f"{where}: time is {excerpt(clock)}, not seconds since 1970; mend or remove the line")
    values = {name: _number(value, f"{where}: {name}") for name, value in line.items() if name not in RESERVED}
    return {"step": line["step"], "time": line["time"]} | values


def _number(value: object, where: str) -> float:
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{where} is {excerpt(value)}, not a number; mend or remove the line")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _excerpt(text: bytes) -> str:
    return repr(text[:60].decode("utf-8", errors="replace"))
