"""Signals that ask a rank to stop, from its first moment on: remembered, and its end where it does not get on.

    blocked by the launcher -> StopSignals entered before any import that takes time -> training/stop_request.py asks it

A handler only takes a note. Python runs it when the main thread is back in the interpreter, which a hanging collective
never is; so the signal's number is also read from the interpreter's wake-up pipe by a thread, which ends the process at
once (status 128 + signal, nothing saved) at a second signal or at a deadline.

One request often arrives several times: Slurm signals every process of a step, and srun and the launcher pass on what
they get. Signals within REPEAT_SECONDS of the first are the same request. Not so a second Ctrl-C: the launcher alone
gets it from the terminal, and a person who presses it again does not want to wait. SIGHUP counts unless it is ignored,
as under nohup. Imports no torch.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

REPEAT_SECONDS = 5.0
INTERRUPT_REPEAT_SECONDS = 0.3
LAST_SECONDS = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_WAKE = b"\0"  # no signal has this number


class StopSignals:
    """Signals are noted for as long as the context lasts. To be entered in the main thread, once.

    Attributes:
        noted: which signals came.
        since: when this was made, by the monotonic clock: the start of the rank.
        before_exit: called with the signal's number before a forced exit, in a thread of its own and not for long.
    """

    def __init__(self) -> None:
        self.noted: set[signal.Signals] = set()
        self.since = time.monotonic()
        self.before_exit: Callable[[int], None] = lambda number: None
        self._deadline = 0.0

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._handlers = {number: signal.signal(number, self._note) for number in heeded()}
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
                self._leave(number)
            received = os.read(self._reader, 1)
            if not received:
                return
            if received[0] not in SIGNALS:
                continue
            number = received[0]
            if not first:
                first = time.monotonic()
            elif time.monotonic() - first > (INTERRUPT_REPEAT_SECONDS if number == signal.SIGINT else REPEAT_SECONDS):
                self._leave(number)

    def _leave(self, number: int) -> None:
        last = threading.Thread(target=self.before_exit, args=(number,), daemon=True)
        last.start()
        last.join(LAST_SECONDS)  # a file system may hang as well
        os._exit(128 + number)


def heeded() -> tuple[signal.Signals, ...]:
    """SIGNALS without those that are ignored: whoever started this process (nohup) wants it to live on."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)


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
