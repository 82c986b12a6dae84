"""Traces of the steps that a recipe names, of the ranks that it names."""

import gzip
import json
from pathlib import Path

import torch

from megatron_sbn.config.schema import Profile
from megatron_sbn.training.profiling import Profiler


def train(profiler: Profiler, steps: int) -> list[str]:
    written = []
    for done in range(steps):
        profiler.before(done)
        (torch.ones(8, 8) @ torch.ones(8, 8)).sum()
        path = profiler.after(done + 1)
        written += [path] if path else []
    last = profiler.close(steps)
    return written + ([last] if last else [])


def test_a_trace_of_the_steps_that_are_named(tmp_path: Path) -> None:
    (path,) = train(Profiler(Profile(start=2, steps=2), tmp_path / "profile", 0), 6)
    assert path == str(tmp_path / "profile" / "rank-0-steps-3-4.json.gz")
    events = json.loads(gzip.decompress(Path(path).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


def test_other_ranks_and_no_profile_write_nothing(tmp_path: Path) -> None:
    for settings, rank in ((None, 0), (Profile(start=0, ranks=(1,)), 0), (Profile(start=9), 0)):
        assert train(Profiler(settings, tmp_path / "profile", rank), 4) == []
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_before_writes_what_there_is(tmp_path: Path) -> None:
    (path,) = train(Profiler(Profile(start=3, steps=5, ranks=(0, 2)), tmp_path, 2), 5)
    assert path.endswith("rank-2-steps-4-5.json.gz")
