"""Several runs of this machine, so many at a time: `sbn sweep run FILE --all --at-most J`."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from megatron_sbn.errors import STOPPED
from megatron_sbn.launch.environment import LAUNCHED, usable_cpus
from megatron_sbn.launch.local import STOPPED_SECONDS, same_code
from megatron_sbn.launch.stop_signals import blocked

_POLL_SECONDS = 0.2
_REPEAT_SECONDS = 2.0  # the same request may arrive twice, from a launcher and from a terminal
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Command:
    """One run: its command line, and how many ranks it starts."""

    words: Sequence[str]
    ranks: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, the last line of its stderr, and whether it began at all."""

    status: int
    reason: str = ""
    begun: bool = True


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None  # where its stderr goes, if not to this console


@dataclass
class _Signals:
    """Signals that came, and those not yet passed on. The loop acts on them, so none falls between two steps."""

    seen: list[tuple[int, float]] = field(default_factory=list)  # number, time
    new: list[int] = field(default_factory=list)

    @contextmanager
    def noted(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            self.seen.append((number, time.monotonic()))
            self.new.append(number)

        previous = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run_all(
    commands: Mapping[str, Command], at_most: int, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Outcome]:
    """Runs the commands in their order, at most `at_most` at once; returns the outcome of each by name.

    One at a time they share this console; otherwise each is silent but for a line when it begins and ends (a run's log
    is in its folder). A first SIGINT, SIGTERM or SIGHUP asks all to stop (SIGTERM: they save a checkpoint) and nothing
    new begins; a second one kills them. SIGUSR1 is passed on. Nothing new begins either once `stopped` is true; what
    runs looks for that by itself. None outlives this process.
    """
    at_most = min(at_most, max(1, len(commands)))
    left = list(commands)
    running: dict[str, _Running] = {}
    outcomes: dict[str, Outcome] = {}
    signals = _Signals()
    with signals.noted():
        try:
            while left or running:
                off = bool(signals.seen) or stopped()
                while left and len(running) < at_most and not off:
                    name = left.pop(0)
                    print(f"begins: {name}", flush=True)
                    running[name] = _start(commands[name], at_most)
                if off:
                    outcomes |= dict.fromkeys(left, Outcome(STOPPED, begun=False))
                    left.clear()
                if signals.seen:
                    _pass_on(signals, running)
                for name, own in list(running.items()):
                    if own.process.poll() is not None:
                        outcomes[name] = _ended(own)
                        del running[name]
                        print(_outcome_line(name, outcomes[name]), flush=True)
                time.sleep(_POLL_SECONDS)
        finally:
            _end(running)
    return {name: outcomes[name] for name in commands}


def _start(command: Command, at_most: int) -> _Running:
    """A process in a session of its own, so that a terminal's Ctrl-C reaches it through this one alone."""
    threads = max(1, usable_cpus() // (at_most * command.ranks))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **same_code(), LAUNCHED: "1"}
    errors = tempfile.TemporaryFile() if at_most > 1 else None  # noqa: SIM115 - closed when the run has ended
    output = subprocess.DEVNULL if errors is not None else None
    with blocked():  # a stop waits until the run can pass it on to its ranks
        process = subprocess.Popen(
            list(command.words), env=environment, stdout=output, stderr=errors, start_new_session=True
        )
    return _Running(process, errors)


def _pass_on(signals: _Signals, running: Mapping[str, _Running]) -> None:
    """Every signal once; a second request to end kills."""
    new, signals.new = signals.new, []
    requests = [when for number, when in signals.seen if number != signal.SIGUSR1]
    for own in running.values():
        if own.process.poll() is not None:
            continue
        for number in dict.fromkeys(new):
            own.process.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)
        if requests and requests[-1] - requests[0] > _REPEAT_SECONDS:
            os.killpg(own.process.pid, signal.SIGKILL)


def _ended(own: _Running) -> Outcome:
    status = own.process.returncode
    reason = ""
    if own.errors is not None:
        own.errors.seek(0)
        lines = own.errors.read().decode("utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("sbn: ") if lines and status else ""
        own.errors.close()
    return Outcome(status if status >= 0 else 128 - status, reason)


def _outcome_line(name: str, outcome: Outcome) -> str:
    if not outcome.status:
        return f"done: {name}"
    return f"status {outcome.status}: {name}{': ' if outcome.reason else ''}{outcome.reason}"


def _end(running: Mapping[str, _Running]) -> None:
    """Asks what still runs to stop, then kills it: this process ends by an error or a closed console."""
    for own in running.values():
        own.process.terminate()
    deadline = time.monotonic() + STOPPED_SECONDS
    for own in running.values():
        try:
            own.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(own.process.pid, signal.SIGKILL)
            own.process.wait()
