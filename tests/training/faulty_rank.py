"""A rank of a run with a fault: `FAULT=hang:1:5` in the environment hangs rank 1 while it reads batch 5.

`kill` ends it with SIGKILL there, `freeze` stops the whole process, `slow` makes each batch from there on take 50 ms,
`tarry` makes each micro-batch take 100 ms, `clock` sets the wall clock of rank 1 back and forth by a day at every look.
Heartbeats are quicker than in earnest.
"""

import os
import signal
import sys
import time

from megatron_sbn.launch import environment
from megatron_sbn.train import main


def install() -> None:
    """Puts the fault into the loop's reading of batches."""
    from megatron_sbn.training import heartbeat, loop, step

    heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.2, 2.0
    kind, rank, at = os.environ["FAULT"].split(":")
    real_batch, real_time = loop.batch, time.time
    # torchrun counts its restarts: the fault is the first attempt's.
    if environment.rank() != int(rank) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return

    def batch(dataset, number, *rest, **more):
        if kind == "slow" and number >= int(at):
            time.sleep(0.05)
        elif number == int(at):
            fault(kind)
        return real_batch(dataset, number, *rest, **more)

    if kind == "tarry":
        real_step = step._forward_step
        step._forward_step = lambda *given: (time.sleep(0.1), real_step(*given))[1]
    looks = iter(range(10**9))
    if kind == "clock":
        time.time = lambda: real_time() + 86400 * (-1) ** next(looks)
    loop.batch = batch


def fault(kind: str) -> None:
    if kind == "hang":
        time.sleep(3600)
    elif kind in ("kill", "freeze"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


if __name__ == "__main__":
    install()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
