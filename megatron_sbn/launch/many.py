"""Several commands of this machine, so many at a time: `sbn sweep run FILE --all --at-most J`."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from megatron_sbn.errors import STOPPED

_POLL_SECONDS = 0.2
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_all(commands: Mapping[str, Sequence[str]], at_most: int) -> dict[str, int]:
    """Runs the commands in their order, at most `at_most` at once; returns the exit status of each by name.

    One at a time they share this console; otherwise each is silent but for a line when it begins and ends (a run's log
    is in its folder). SIGINT, SIGTERM and SIGUSR1 are passed on, and then nothing new begins: what never began has the
    status 75. Threads (OMP_NUM_THREADS) are shared out unless they are set.
    """
    left = list(commands)
    running: dict[str, subprocess.Popen[bytes]] = {}
    statuses: dict[str, int] = {}
    quiet = at_most > 1
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_most))} if quiet else {}

    def stop(number: int, _frame: FrameType | None) -> None:
        statuses.update(dict.fromkeys(left, STOPPED))
        left.clear()
        for process in running.values():
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, stop) for number in _FORWARDED}
    try:
        while left or running:
            while left and len(running) < at_most:
                name = left.pop(0)
                print(f"begins: {name}", flush=True)
                output = subprocess.DEVNULL if quiet else None
                environment = {**threads, **os.environ}
                running[name] = subprocess.Popen(
                    list(commands[name]), env=environment, stdout=output, stderr=output, start_new_session=True
                )
            for name, process in list(running.items()):
                status = process.poll()
                if status is not None:
                    statuses[name] = status if status >= 0 else 128 - status
                    del running[name]
                    print(f"{'done' if not status else f'status {statuses[name]}'}: {name}", flush=True)
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return {name: statuses[name] for name in commands}
