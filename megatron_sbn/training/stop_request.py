"""Being asked to stop: a run ends at a step boundary, checkpointed.

By SIGTERM, SIGUSR1, Ctrl-C (SIGINT) or a hang-up (SIGHUP); by the kill-switch file `STOP` (runs/status.py); by
`training.time_limit`, seconds since its start.

    signal -> a note on this rank (stop_signals.py) -> MAX over all ranks at the next step boundary
           -> checkpoint, if a step was done since the last -> exit status 75

A signal that came while the engines were imported counts at the first boundary, or while ranks wait for others to come.
"""

import enum
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sbn.errors import StopRequestedError
from megatron_sbn.launch.stop_signals import StopSignals
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.runs.status import switched_off

FILE_SECONDS = 2.0  # how often rank 0 looks for the file


class Reason(enum.IntEnum):
    """Why a run stops before its last step; where ranks differ the greatest counts."""

    NONE = 0
    SIGHUP = 1
    SIGINT = 2
    SIGUSR1 = 3
    SIGTERM = 4
    STOP_FILE = 5
    TIME_LIMIT = 6


def check_before_first_step(signals: StopSignals) -> None:
    """Raises StopRequestedError where this rank was asked to stop."""
    for number in signals.noted:
        raise StopRequestedError(number.name)


class StopRequest:
    """What this rank was asked, and the ranks' agreement on it."""

    def __init__(self, folder: Path, parallel: ParallelState, signals: StopSignals, time_limit: float = 0) -> None:
        self._folder = folder
        self._time_limit = time_limit  # seconds; 0: none
        self._parallel = parallel
        self._signals = signals
        self._looked = 0.0
        self._switched_off = False

    def agreed(self) -> Reason:
        """The same answer on every rank: one all-reduce of 4 bytes over all of them."""
        if self._parallel.rank == 0 and time.monotonic() - self._looked > FILE_SECONDS:
            self._looked = time.monotonic()
            self._switched_off = switched_off(self._folder)
        own = max((Reason[number.name] for number in tuple(self._signals.noted)), default=Reason.NONE)
        if self._switched_off:
            own = Reason.STOP_FILE
        if self._time_limit and time.monotonic() - self._signals.since > self._time_limit:
            own = Reason.TIME_LIMIT
        flag = torch.tensor(int(own), dtype=torch.int32, device=self._parallel.device)
        if self._parallel.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return Reason(int(flag))
