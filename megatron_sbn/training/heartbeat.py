"""Every rank says what it is doing, and somebody listens: a rank that hangs or falls silent is named.

    RUN/ranks/rank-00003.json    {"rank": 3, "host": "n2", "pid": 811, "beat": 17, "step": 41,
                                  "phase": "reading a batch", "seconds": 12.0,
                                  "where": "megatron_sbn/data/shards.py:50 read", "waits": false}

A thread of each rank replaces its file every BEAT_SECONDS (less often with over 400 ranks): the phase that the main
thread has reported, how long it has been in it, the innermost line of this project that it is at, and whether it
waits for other ranks below that. Rank 0 reads all of them, and the last rank rank 0's. A hang is no progress (another
phase, or another micro-batch) for `training.hang_warning` seconds: it is printed once, with the ranks that others
wait for. After `training.hang_timeout` seconds the process ends with status 1, so that the launcher ends the others
and starts anew. Only monotonic clocks are compared, and each only with itself.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch.distributed as dist

from megatron_sbn.errors import RankLostError

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
_SECONDS_A_RANK = 0.005  # of many ranks each speaks more seldom: at most 200 files a second in all
FOLDER = "ranks"
_PACKAGE = f"{os.sep}megatron_sbn{os.sep}"
_SHIM = os.path.join("parallel", "cuda_shim.py")  # noqa: PTH118 - the end of a path
_ASYNC = os.path.join("layers", "collectives.py")  # noqa: PTH118 - whose handles wait without a frame of torch's
_COLLECTIVES = f"torch{os.sep}distributed{os.sep}"


@dataclass(frozen=True)
class Beat:
    """What one rank said last. `seconds` are those in this phase, `beat` counts what it has said."""

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    phase: str
    seconds: float
    where: str
    waits: bool

    def describe(self) -> str:
        """For a message."""
        waits = ", waiting for others" if self.waits else ""
        who = f"rank {self.rank} on {self.host} (pid {self.pid})"
        return f"{who}: {self.phase} of step {self.step}, at {self.where}{waits}"


def beat_path(run: Path, rank: int) -> Path:
    """A rank's file."""
    return run / FOLDER / f"rank-{rank:05d}.json"


def read_beats(run: Path, ranks: Sequence[int]) -> list[Beat]:
    """What the ranks said last; those of whom there is nothing readable are left out."""
    beats = []
    for rank in ranks:
        try:
            values = json.loads(beat_path(run, rank).read_text(encoding="utf-8"))
            beats.append(Beat(**values))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def stalled_ranks(beats: Sequence[Beat], silent: Sequence[int]) -> list[Beat]:
    """Those that keep the others waiting: the silent, else those who wait for nobody, else those behind; maybe none."""
    found = [beat for beat in beats if beat.rank in silent]
    if found:
        return found
    busy = [beat for beat in beats if not beat.waits]
    if busy and len(busy) < len(beats):
        return busy
    least = min((beat.step for beat in beats), default=0)
    behind = [beat for beat in beats if beat.step == least]
    return behind if len(behind) < len(beats) else []


class Heartbeat:
    """A rank's heartbeat, and its ear for the others; a context for the length of a run.

    Args:
        run: the run folder.
        rank, ranks: this one, and how many there are.
        warning, timeout: seconds without progress until a warning, and until the process ends; 0: never.
        say: takes a line for people.
        give_up: gets the reason, before the process ends; it must not need the main thread.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        ranks: int,
        warning: float,
        timeout: float,
        say: Callable[[str], None],
        give_up: Callable[[str], None],
    ) -> None:
        self.run = run
        self.rank = rank
        self.warning, self.timeout = warning, timeout
        self._say, self._give_up = say, give_up
        self._seconds = max(BEAT_SECONDS, ranks * _SECONDS_A_RANK)
        self._latest = (0, "starting", time.monotonic())
        self._progress = time.monotonic()
        self._main = threading.get_ident()
        self._beat = 0
        self._done = threading.Event()
        others = range(1, ranks) if rank == 0 else range(1) if rank == ranks - 1 else range(0)
        self._ear = _Ear(run, others)
        self._warned = False
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins a phase of a step."""
        self._latest = (step, phase, time.monotonic())
        self.tick()

    def tick(self) -> None:
        """The main thread gets on within its phase: a long validation is no hang."""
        self._progress = time.monotonic()

    def __enter__(self) -> "Heartbeat":
        beat_path(self.run, self.rank).parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def doing(self) -> str:
        """The present phase, in words."""
        step, phase, _ = self._latest
        return f"{phase} of step {step}"

    def _live(self) -> None:
        while not self._done.wait(self._seconds):
            self._write()
            for beat in self._ear.fallen_silent():
                self._say(f"not heard of for {SILENT_SECONDS:.0f} s; last: {beat.describe()}")
            self._look()

    def _look(self) -> None:
        """Tells a hang, then ends it. The rank that watches rank 0 speaks where that is silent."""
        idle = time.monotonic() - self._progress
        if idle < min(value for value in (self.warning, self.timeout, float("inf")) if value):
            self._warned = False
            return
        if self.rank and not self._ear.silent:
            return
        if self.warning and idle > self.warning and not self._warned:
            self._warned = True
            self._say(f"no progress for {idle:.0f} s: {self._culprits()}")
        if self.timeout and idle > self.timeout:
            why = f"no progress for {idle:.0f} s (training.hang_timeout): {self._culprits()}"
            self._say(why)
            self._give_up(why)
            os._exit(1)

    def _culprits(self) -> str:
        beats = [self._now(), *read_beats(self.run, self._ear.ranks)]
        found = stalled_ranks(beats, self._ear.silent)
        if found:
            return "; ".join(beat.describe() for beat in found[:4]) + ("; and others" if len(found) > 4 else "")
        return f"all ranks are there; {beats[0].describe()}"

    def _now(self) -> Beat:
        step, phase, since = self._latest
        where, waits = locate(sys._current_frames().get(self._main))
        seconds = round(time.monotonic() - since, 1)
        return Beat(self.rank, socket.gethostname(), os.getpid(), self._beat, step, phase, seconds, where, waits)

    def _write(self) -> None:
        """No flush to the disk: who reads it is here now. A full disk must not end the run."""
        self._beat += 1
        path = beat_path(self.run, self.rank)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(asdict(self._now())), encoding="utf-8")
            partial.replace(path)
        except OSError:
            return


class _Ear:
    """Which of the ranks have stopped speaking, by this process's clock."""

    def __init__(self, run: Path, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self._run = run
        self._heard: dict[int, tuple[int, float]] = {}  # beat, and when it was first seen
        self.silent: list[int] = []

    def fallen_silent(self) -> list[Beat]:
        """Ranks that are silent and were not when this was asked last."""
        now = time.monotonic()
        silent, news = [], []
        for beat in read_beats(self._run, self.ranks):
            last, since = self._heard.get(beat.rank, (-1, now))
            if last != beat.beat:
                self._heard[beat.rank] = (beat.beat, now)
            elif now - since > SILENT_SECONDS:
                silent.append(beat.rank)
                if beat.rank not in self.silent:
                    news.append(beat)
        self.silent = silent
        return news


@contextmanager
def name_lost_rank(heart: Heartbeat, ranks: int) -> Iterator[None]:
    """What the communication library raises where another rank is gone, as one line that says which, if it is known."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        beats = [beat for beat in read_beats(heart.run, range(ranks)) if beat.rank != heart.rank]
        gone = [beat.describe() for beat in beats if beat.host == socket.gethostname() and not _alive(beat.pid)]
        who = f"gone is {'; '.join(gone)}" if gone else "which one ended first, its own log says"
        raise RankLostError(
            f"lost another rank in {heart.doing}: {who}; the run goes on from its last checkpoint when it is started "
            f"again ({text[:200]})"
        ) from error


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def locate(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of this project in a stack, and whether a wait for other ranks is below it."""
    waits = False
    while frame is not None:
        path = frame.f_code.co_filename
        # A frame around torch's own functions on CPU says nothing of where in the model it is.
        if _PACKAGE in path and not path.endswith(_SHIM):
            waits = waits or (path.endswith(_ASYNC) and frame.f_code.co_name == "__call__")
            inside = path[path.rindex(_PACKAGE) + 1 :].replace(os.sep, "/")
            return f"{inside}:{frame.f_lineno} {frame.f_code.co_name}", waits
        waits = waits or _COLLECTIVES in path
        frame = frame.f_back
    return "no line of this project", waits
