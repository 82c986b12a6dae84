"""Being asked to stop: SIGTERM, SIGUSR1 and the kill-switch file `STOP` end a run at a step boundary, checkpointed.

    signal -> a flag on this rank -> MAX over all ranks at the next step boundary -> checkpoint -> exit status 75

A handler only sets a flag. Python runs it when the main thread is back in the interpreter, which a hanging collective
never is; so the signal's number is also read from the interpreter's wake-up pipe by a thread, which ends the process at
once (status 128 + signal, nothing saved) at a second signal or at a deadline.

One request often arrives several times: Slurm signals every process of a step, and srun and the launcher pass on what
they get. Signals within REPEAT_SECONDS of the first are the same request.
"""

import enum
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_sbn.parallel.state import ParallelState

STOP_FILE = "STOP"
REPEAT_SECONDS = 5.0
FILE_SECONDS = 2.0  # how often rank 0 looks for the file
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Reason(enum.IntEnum):
    """Why a run stops before its last step; where ranks differ the greatest counts."""

    NONE = 0
    SIGUSR1 = 1
    SIGTERM = 2
    STOP_FILE = 3


class StopRequest:
    """What this rank was asked, and the ranks' agreement on it."""

    def __init__(self, folder: Path, parallel: ParallelState) -> None:
        self._file = folder / STOP_FILE
        self._parallel = parallel
        self._own = Reason.NONE
        self._looked = 0.0

    def notice(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self._own = max(self._own, Reason[signal.Signals(number).name])

    def agreed(self) -> Reason:
        """The same answer on every rank: one all-reduce of 4 bytes over all of them."""
        if self._parallel.rank == 0 and time.monotonic() - self._looked > FILE_SECONDS:
            self._looked = time.monotonic()
            if self._file.exists():
                self._own = Reason.STOP_FILE
        flag = torch.tensor(int(self._own), dtype=torch.int32, device=self._parallel.device)
        if self._parallel.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return Reason(int(flag))


@contextmanager
def listening(request: StopRequest, deadline: float) -> Iterator[None]:
    """Signals go to `request` for as long as the context lasts; `deadline` is in seconds from the first, 0 for none.

    To be entered in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, deadline), name="signals", daemon=True)
    handlers = {number: signal.signal(number, request.notice) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
        watcher.join()
        os.close(reader)


def _watch(reader: int, deadline: float) -> None:
    """Reads signal numbers until the pipe is closed; ends the process when it has waited enough."""
    first, number = 0.0, 0
    while True:
        left = max(0.0, first + deadline - time.monotonic()) if first and deadline else None
        if not select.select([reader], [], [], left)[0]:
            os._exit(128 + number)
        received = os.read(reader, 1)
        if not received:
            return
        if received[0] not in SIGNALS:
            continue
        number = received[0]
        if not first:
            first = time.monotonic()
        elif time.monotonic() - first > REPEAT_SECONDS:
            os._exit(128 + number)
