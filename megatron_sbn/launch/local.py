"""Starts this machine's ranks of a run: what `torchrun --nproc-per-node N` does, with exit statuses kept.

torchrun answers 1 whatever a rank's status was; `sbn train` passes on the first failing rank's own (errors.py), so that
a script can tell a bad recipe from a numerical failure. Imports no torch, so the ranks start at once.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from megatron_sbn.errors import STOPPED
from megatron_sbn.launch.environment import LAUNCHED, usable_cpus
from megatron_sbn.launch.stop_signals import blocked, heeded, unblock

GRACE_SECONDS = 15.0
# Of a run that stopped when asked to: rank 0 delivers to MLflow for up to 30 s more, and the last sample of its machine
# takes up to 10, when the others have left.
STOPPED_SECONDS = 45.0
_POLL_SECONDS = 0.1
_INTERRUPTED = b"\nsbn: stops after this step and saves; Ctrl-C again ends at once and saves nothing\n"


@dataclass(frozen=True)
class Machines:
    """Where this machine stands among those of the run; by default it is the only one.

    `address` and `port` are those of rank 0's machine (port 0: any that is free here).
    """

    count: int = 1
    number: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def launch(
    arguments: list[str],
    ranks: int,
    *,
    machines: Machines | None = None,
    module: str = "megatron_sbn.train",
    seconds: float | None = None,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs `PYTHON -m MODULE ARGUMENTS` on `ranks` ranks of this machine; returns the first failing rank's status.

    When one rank fails the others are asked to end (SIGTERM), then killed. `stop_signals.SIGNALS` are passed on, and
    Ctrl-Z; a terminal reaches the ranks through this process alone, for each has a process group of its own.
    75 (stopped when asked to) is the status if it is a rank's. Ranks begin with these signals blocked, so that none is
    killed before it listens: MODULE has to `stop_signals.unblock`. After `seconds`, if given, ranks that have
    not finished are ended, and TimeoutError names them. `environment` is added to that of this process.
    """
    deadline = time.monotonic() + seconds if seconds is not None else None
    machines = machines or Machines()
    machines = machines if machines.port else replace(machines, port=_free_port())
    processes: list[subprocess.Popen[bytes]] = []
    with _forward_signals(processes):
        try:
            with blocked():
                for rank in range(ranks):
                    command = [python, "-m", module, *arguments]
                    processes.append(_start(command, rank, ranks, machines, environment or {}))
            if LAUNCHED in os.environ:
                unblock()  # this process was started with signals blocked, as ranks are
            return _wait(processes, deadline)
        finally:
            _end(processes)


def _start(
    command: list[str], rank: int, ranks: int, machines: Machines, more: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    threads = str(max(1, usable_cpus() // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **same_code(), **more}
    environment |= {
        "RANK": str(machines.number * ranks + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(machines.count * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": machines.address,
        "MASTER_PORT": str(machines.port),
        LAUNCHED: "1",
    }
    return subprocess.Popen(command, env=environment, process_group=0)


def same_code() -> dict[str, str]:
    """Variables with which another process of this interpreter imports the package that this one runs.

    `python -m` looks into the working folder first, where another copy may lie.
    """
    root = Path(__file__).parents[2]
    if os.pathsep in str(root):  # PYTHONPATH has no place for it
        return {}
    safe = {"PYTHONSAFEPATH": "1"}
    if root.name in ("site-packages", "dist-packages"):
        return safe
    return safe | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def _wait(processes: "list[subprocess.Popen[bytes]]", deadline: float | None) -> int:
    while True:
        if deadline is not None and time.monotonic() > deadline:
            waiting = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
            raise TimeoutError(f"rank {', '.join(waiting)} did not finish")
        statuses = [process.poll() for process in processes]
        if STOPPED in statuses:  # all of them are about to end by themselves: the checkpoint is there
            return _await_the_rest(processes)
        failed = [status for status in statuses if status]
        if failed:
            for rank, status in enumerate(statuses):
                if status is not None and status < 0:
                    name = signal.Signals(-status).name
                    print(f"sbn: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
            # A status above 0 is a rank's own; below 0 it was killed by that signal.
            return next((status for status in failed if status > 0), 128 - failed[0])
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(_POLL_SECONDS)


def _await_the_rest(processes: "list[subprocess.Popen[bytes]]") -> int:
    deadline = time.monotonic() + STOPPED_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_SECONDS)
    return STOPPED


def _end(processes: "list[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _forward_signals(processes: "list[subprocess.Popen[bytes]]") -> Iterator[None]:
    interrupts = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        if number == signal.SIGINT:
            interrupts += 1
            if interrupts == 1:
                os.write(sys.stderr.fileno(), _INTERRUPTED)  # print may be what the signal came into
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def suspend(_number: int, frame: FrameType | None) -> None:
        forward(signal.SIGSTOP, frame)
        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell's fg or bg
        forward(signal.SIGCONT, frame)

    previous = {number: signal.signal(number, forward) for number in heeded()}
    previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
