"""SIGTERM and SIGUSR1 to a rank, from its first moment on: remembered, and its end where it does not get on.

    blocked by the launcher -> StopSignals entered before any import that takes time -> training/stop_request.py asks it

A handler only takes a note. Python runs it when the main thread is back in the interpreter, which a hanging collective
never is; so the signal's number is also read from the interpreter's wake-up pipe by a thread, which ends the process at
once (status 128 + signal, nothing saved) at a second signal or at a deadline.

One request often arrives several times: Slurm signals every process of a step, and srun and the launcher pass on what
they get. Signals within REPEAT_SECONDS of the first are the same request. Imports no torch.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

REPEAT_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_WAKE = b"\0"  # no signal has this number


class StopSignals:
    """Signals are noted for as long as the context lasts. To be entered in the main thread, once.

    Attributes:
        noted: which signals came.
        since: when this was made, by the monotonic clock: the start of the rank.
    """

    def __init__(self) -> None:
        self.noted: set[signal.Signals] = set()
        self.since = time.monotonic()
        self._deadline = 0.0

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher.start()
        unblock()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread
        self._watcher.join()
        os.close(self._reader)

    def allow(self, deadline: float) -> None:
        """Ends the process `deadline` seconds after the first signal, even if that was before; 0: never, as before."""
        self._deadline = deadline
        os.write(self._writer, _WAKE)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.noted.add(signal.Signals(number))

    def _watch(self) -> None:
        """Reads signal numbers until the pipe is closed; ends the process when it has waited enough."""
        first, number = 0.0, 0
        while True:
            deadline = self._deadline
            left = max(0.0, first + deadline - time.monotonic()) if first and deadline else None
            if not select.select([self._reader], [], [], left)[0]:
                os._exit(128 + number)
            received = os.read(self._reader, 1)
            if not received:
                return
            if received[0] not in SIGNALS:
                continue
            number = received[0]
            if not first:
                first = time.monotonic()
            elif time.monotonic() - first > REPEAT_SECONDS:
                os._exit(128 + number)


@contextmanager
def blocked() -> Iterator[None]:
    """Signals wait: for this process until the context is left, for one that it starts until that calls `unblock`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Takes the signals that came since this process began, and those that come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
