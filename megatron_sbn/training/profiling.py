"""`training.profile`: a trace of a few steps of chosen ranks, for chrome://tracing or Perfetto, and their GPU memory.

    RUN/profile/rank-R-steps-A-B.json.gz     torch.profiler: operators, kernels, shapes, allocations
    RUN/profile/rank-R-steps-A-B.pickle      CUDA: every allocation with its stack, for pytorch.org/memory_viz

The profiled steps are slower than others; their numbers are the same.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_sbn.config.schema import Profile

MEMORY_EVENTS = 200_000  # of the snapshot, the newest; each holds a stack


class Profiler:
    """Starts and stops torch's profiler around the steps that `settings` names; does nothing on other ranks.

    Args:
        settings: None profiles nothing. folder: of the files. rank: this one.
    """

    def __init__(self, settings: Profile | None, folder: Path, rank: int) -> None:
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._folder = folder
        self._rank = rank
        self._running: profile | None = None
        self._first = 0

    def before(self, done: int) -> None:
        """A step follows `done` steps."""
        if self._settings is None or self._running is not None or done != self._settings.start:
            return
        cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._first = done + 1
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    def after(self, done: int) -> str | None:
        """`done` steps are done now; returns the trace's path when it was written."""
        if self._settings is None or self._running is None or done < self._settings.start + self._settings.steps:
            return None
        return self._write(done)

    def close(self, done: int) -> str | None:
        """The run ends: what was profiled until then is written."""
        return self._write(done) if self._running is not None and done >= self._first else None

    def _write(self, done: int) -> str:
        assert self._running is not None
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank}-steps-{self._first}-{done}"
        path = self._folder / f"{name}.json.gz"
        running.export_chrome_trace(str(path))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return str(path)
