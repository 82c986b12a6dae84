"""Slow ranks, by name: every rank times the same small product, and its own reading of batches, and all compare.

A rank that is slow holds up all others, and in their collectives all ranks look alike. So each
`training.rank_check_interval` steps every rank does a fixed piece of work by itself (a throttled or shared device shows
there) and tells the seconds that it has spent reading since the last time (a slow file system shows there). A rank that
takes more than SLOW times the lower median, twice in a row, is named.
"""

import socket
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_sbn.parallel.state import ParallelState

SLOW = 2.0
LEAST_SECONDS = 0.005  # of reading in a step: below, a difference is of no consequence
ROUNDS, REPEATS = 3, 4


class Stragglers:
    """Compares this rank with the others; `check` is called by all of them.

    Args:
        say: takes a line for people.
    """

    def __init__(self, parallel: ParallelState, say: Callable[[str], None]) -> None:
        self._parallel = parallel
        self._say = say
        self._reading: list[float] = []
        self._suspected: set[tuple[int, str]] = set()
        self._named: set[tuple[int, str]] = set()
        hosts = [""] * parallel.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        self._hosts = hosts
        width, dtype = (4096, torch.bfloat16) if parallel.device.type == "cuda" else (256, torch.float32)
        self._factor = torch.full((width, width), 1.0 / width, dtype=dtype, device=parallel.device)

    def read(self, seconds: float) -> None:
        """Takes the time that reading a batch took."""
        self._reading.append(seconds)

    def check(self) -> None:
        """Compares all ranks, and names those that were slow the last time too; once, until they are not."""
        own = [self._gemm_seconds(), statistics.fmean(self._reading or [0.0])]
        self._reading.clear()
        table = torch.zeros(self._parallel.world_size, 2, dtype=torch.float64, device=self._parallel.device)
        table[self._parallel.rank] = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(table)
        gemms, readings = (column.tolist() for column in table.T)
        found = {(rank, "a fixed GEMM"): ratio for rank, ratio in slow(gemms, 0.0)}
        found |= {(rank, "reading a batch"): ratio for rank, ratio in slow(readings, LEAST_SECONDS)}
        for key, ratio in found.items():
            if key in self._suspected and key not in self._named:
                rank, what = key
                who = f"rank {rank} on {self._hosts[rank]}"
                self._say(f"{who} is slow: {what} takes {ratio:.1f} times as long as on most ranks")
        self._named = {key for key in found if key in self._suspected}
        self._suspected = set(found)

    def _gemm_seconds(self) -> float:
        """The least time of a few rounds."""
        rounds = []
        for _ in range(ROUNDS):
            self._synchronize()
            began = time.perf_counter()
            for _ in range(REPEATS):
                self._factor @ self._factor
            self._synchronize()
            rounds.append(time.perf_counter() - began)
        return min(rounds)

    def _synchronize(self) -> None:
        if self._parallel.device.type == "cuda":
            torch.cuda.synchronize()


def slow(seconds: Sequence[float], least: float) -> list[tuple[int, float]]:
    """(rank, times the lower median) of those above SLOW times that and above `least` seconds."""
    usual = statistics.median_low(seconds)
    return [
        (rank, own / max(usual, 1e-9)) for rank, own in enumerate(seconds) if own > max(SLOW * usual, least) and own > 0
    ]
