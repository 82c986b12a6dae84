"""In a rank: what it is doing at any moment, and an ambush at a chosen one. Nothing here knows a checkpoint's format.

Everything is seen from outside the product's own code: Python's audit hook tells of every file that is opened, renamed
or removed, `os.fsync` and `Trainer.step` are wrapped. What is seen is marked in a file that is mapped into memory and
outlives the rank: the marks of a killed rank say where it was.

    a save   writing a file -> between files -> before the rename to step-N -> before `latest` is replaced -> removing

An ambush at the k-th event of a kind tells the parent, who kills, and holds the rank there until then.
"""

import enum
import mmap
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LAYOUT = struct.Struct("<4q")


class Phase(enum.IntEnum):
    """What the main thread is about."""

    START = 0
    STEP = 1
    BETWEEN_STEPS = 2
    LEAVING = 3


class Stage(enum.IntEnum):
    """How far a save is."""

    NONE = 0
    WRITING = 1
    BETWEEN_FILES = 2
    BEFORE_RENAME = 3
    BEFORE_LATEST = 4
    REMOVING = 5


@dataclass(frozen=True)
class Ambush:
    """At the `count`-th event of a kind the parent is notified; with `hold` the rank waits there for its answer.

    Kinds: "start" (any file event in the run folder before the first step), "step" (a step begins), "save" (any event
    of a save), "rename" (of a step folder), "latest" (its replacement), "remove" (of an old file).
    """

    kind: str
    count: int
    hold: bool


@dataclass
class Marks:
    """Where a rank is: the first step of this attempt (-1: none yet), steps done, phase, stage of a save."""

    first: int = -1
    done: int = 0
    phase: Phase = Phase.START
    stage: Stage = Stage.NONE


def make_marks(path: Path) -> None:
    """The file, for the parent to make before the rank starts."""
    path.write_bytes(_LAYOUT.pack(-1, 0, Phase.START, Stage.NONE))


def read_marks(path: Path) -> Marks:
    """What the rank has marked last."""
    first, done, phase, stage = _LAYOUT.unpack(path.read_bytes())
    return Marks(first, done, Phase(phase), Stage(stage))


class Watch:
    """Follows this process from `install` on; `run_dir` is absolute."""

    def __init__(self, run_dir: Path, marks: Path, ambush: Ambush | None, parent: Connection) -> None:
        self._run = f"{run_dir}{os.sep}"
        self._checkpoints = f"{run_dir / 'checkpoints'}{os.sep}"
        with marks.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._marks = Marks()
        self._ambush = ambush
        self._parent = parent
        self._seen = 0
        self._latest_replaced = False

    def install(self) -> None:
        """For the rest of the process's life."""
        from megatron_sbn.training.step import Trainer

        sys.addaudithook(self._audit)
        fsync, step = os.fsync, Trainer.step

        def watched_fsync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self._event("sync", path)
            fsync(file)
            self._event("synced", path)

        def watched_step(trainer: Trainer, number: int, samples: np.ndarray) -> Any:
            self._begin_step(number)
            result = step(trainer, number, samples)
            self._mark(done=number + 1, phase=Phase.BETWEEN_STEPS)
            return result

        os.fsync = watched_fsync
        Trainer.step = watched_step  # type: ignore[method-assign]

    def leave(self) -> None:
        """The entry point has returned."""
        self._mark(phase=Phase.LEAVING)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        translate = _EVENTS.get(event)
        if translate is not None:
            kind, path = translate(arguments)
            if isinstance(path, str):
                self._event(kind, path)

    def _event(self, kind: str, path: str) -> None:
        """A file event of the run folder, reported before it happens ("synced": after)."""
        if not path.startswith(self._run):
            return
        if self._marks.phase == Phase.START:
            self._reached("start")
        elif path.startswith(self._checkpoints) and kind != "read":
            self._save_event(kind, path)

    def _save_event(self, kind: str, path: str) -> None:
        name, stage = path.removeprefix(self._checkpoints), self._marks.stage
        if kind == "rename" and name == "latest":
            self._mark(stage=Stage.BEFORE_LATEST)
            self._reached("latest")
            self._latest_replaced = True
        elif kind == "rename" and name.startswith("step-") and os.sep not in name:
            self._mark(stage=Stage.BEFORE_RENAME)
            self._reached("rename")
        elif self._latest_replaced:
            self._mark(stage=Stage.REMOVING)
        elif stage in (Stage.BEFORE_RENAME, Stage.BEFORE_LATEST):
            self._mark(stage=Stage.BEFORE_LATEST)
        else:
            self._mark(stage=Stage.BETWEEN_FILES if kind == "synced" else Stage.WRITING)
        if kind == "remove" and self._marks.stage == Stage.REMOVING:
            self._reached("remove")
        self._reached("save")

    def _begin_step(self, number: int) -> None:
        # A save that goes on in the background is still under way; rank 0 knows, by `latest`, the others do not.
        ended = self._latest_replaced or os.environ["RANK"] != "0"
        self._latest_replaced = self._latest_replaced and not ended
        first = number if self._marks.first < 0 else self._marks.first
        self._mark(first=first, done=number, phase=Phase.STEP, stage=Stage.NONE if ended else self._marks.stage)
        self._reached("step")

    def _mark(self, **changes: int) -> None:
        for name, value in changes.items():
            setattr(self._marks, name, value)
        marks = self._marks
        _LAYOUT.pack_into(self._map, 0, marks.first, marks.done, marks.phase, marks.stage)

    def _reached(self, kind: str) -> None:
        if self._ambush is None or self._ambush.kind != kind:
            return
        self._seen += 1
        if self._seen == self._ambush.count:
            self._parent.send_bytes(b"here")
            if self._ambush.hold:
                self._parent.recv_bytes()


def _opened(arguments: tuple[Any, ...]) -> tuple[str, object]:
    path, _, flags = arguments
    return "write" if flags & _WRITES else "read", path


_EVENTS: dict[str, Callable[[tuple[Any, ...]], tuple[str, object]]] = {
    "open": _opened,
    "os.rename": lambda arguments: ("rename", _text(arguments[1])),
    "os.mkdir": lambda arguments: ("write", _text(arguments[0])),
    "os.remove": lambda arguments: ("remove", _inside(arguments)),
    "os.rmdir": lambda arguments: ("remove", _inside(arguments)),
}


def _text(path: object) -> object:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _inside(arguments: tuple[Any, ...]) -> object:
    """The path of a removal; one that is relative to an open folder (shutil.rmtree) is put behind it."""
    path, folder = _text(arguments[0]), arguments[1]
    if isinstance(path, str) and isinstance(folder, int) and folder >= 0:
        return f"{Path(f'/proc/self/fd/{folder}').readlink()}{os.sep}{path}"
    return path
