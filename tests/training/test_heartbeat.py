"""Ranks that hang, fall silent, die or are slow are named; a run outlives a clock that jumps."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_signals import recipe  # noqa: F401 - a fixture
from time_limit import LIMIT_SECONDS

from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import read_status
from megatron_sbn.training import heartbeat
from megatron_sbn.training.heartbeat import Beat, Heartbeat, locate, read_beats, stalled_ranks
from megatron_sbn.training.stragglers import slow


def said(rank: int, step: int = 5, waits: bool = True) -> Beat:
    return Beat(rank, "n1", 100 + rank, 1, step, "forward", 9.0, "megatron_sbn/x.py:1 f", waits)


def test_who_is_to_blame() -> None:
    alike = [said(0), said(1), said(2)]
    assert stalled_ranks(alike, []) == []
    assert stalled_ranks(alike, [2]) == [alike[2]]
    busy = [said(0), said(1, waits=False), said(2)]
    assert stalled_ranks(busy, []) == [busy[1]]
    assert stalled_ranks(busy, [0]) == [busy[0]]
    behind = [said(0, 6), said(1, 5), said(2, 6)]
    assert stalled_ranks(behind, []) == [behind[1]]
    assert stalled_ranks([said(0, waits=False), said(1, waits=False)], []) == []
    assert stalled_ranks([], []) == []
    assert (
        said(1).describe() == "rank 1 on n1 (pid 101): forward of step 5, at megatron_sbn/x.py:1 f, waiting for others"
    )


def test_where_a_thread_is() -> None:
    assert locate(None) == ("no line of this project", False)
    seen: list[tuple[str, bool]] = []
    release = threading.Event()
    ear = heartbeat._Ear(Path("/nonexistent"), range(2))

    def pause(*_: object) -> list[Beat]:
        release.wait(10)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat, "read_beats", pause)
        thread = threading.Thread(target=ear.fallen_silent)
        thread.start()
        time.sleep(0.2)
        seen.append(locate(sys._current_frames()[thread.ident or 0]))
        release.set()
        thread.join()
    where, waits = seen[0]
    assert where.startswith("megatron_sbn/training/heartbeat.py:")
    assert where.endswith(" fallen_silent")
    assert not waits


def test_unreadable_beats_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for rank, text in enumerate(["{", "[]", json.dumps({"rank": 2}), "\xff"]):
        heartbeat.beat_path(tmp_path, rank).write_text(text, encoding="latin-1")
    assert read_beats(tmp_path, range(6)) == []


def test_a_rank_that_falls_silent_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.0)
    messages: list[str] = []
    with Heartbeat(tmp_path, 0, 2, 0, 0, messages.append, messages.append) as first:
        with Heartbeat(tmp_path, 1, 2, 0, 0, messages.append, messages.append) as second:
            second.enter("reading a batch", 7)
            time.sleep(1.5)
            assert messages == []
        deadline = time.monotonic() + LIMIT_SECONDS
        while not messages and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # several more looks
        assert len(messages) == 1
        assert messages[0].startswith("not heard of for 1 s; last: rank 1 on ")
        assert "reading a batch of step 7" in messages[0]
        assert first.doing == "starting of step 0"


def test_slow_ranks() -> None:
    assert slow([1.0, 1.1, 2.3], 0.0) == [(2, pytest.approx(2.3 / 1.1))]
    assert slow([1.0, 3.0], 0.0) == [(1, 3.0)]
    assert slow([0.0, 0.004, 0.0], 0.005) == []
    assert [rank for rank, _ in slow([0.0, 0.006, 0.0], 0.005)] == [1]
    assert slow([1.0, 1.0, 1.0, 1.0], 0.0) == []


def faulty(recipe: Path, run: Path, fault: str, *overrides: str) -> "subprocess.CompletedProcess[str]":  # noqa: F811
    """`sbn train` with a fault in a rank."""
    program = (
        "import sys; from megatron_sbn.launch import launch; sys.exit(launch(sys.argv[1:], 2, module='faulty_rank'))"
    )
    words = [str(recipe), f"run_dir={run}", "tracking.enabled=false", "training.steps=40", *overrides]
    environment = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment,
        check=False,
    )


def test_a_rank_that_hangs_is_named_then_the_run_ends(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "hung"
    limits = ("training.hang_warning=1", "training.hang_timeout=4")
    done = faulty(recipe, run, "hang:1:5", *limits)
    assert done.returncode == 1, done.stderr
    culprit = "reading a batch of step 6, at "
    warning, *_ = [line for line in done.stderr.splitlines() if line.startswith("sbn: no progress for ")]
    assert ": rank 1 on " in warning
    assert culprit in warning
    status = read_status(run)
    assert status is not None
    assert (status.state, status.exit_status) == ("FAILED", 1)
    assert "training.hang_timeout" in status.reason
    assert ": rank 1 on " in status.reason
    assert warning.removeprefix("sbn: ") in (run / "logs" / "rank-0.log").read_text()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_long_validation_is_no_hang(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "validated"
    long = (
        f"data.validation={recipe.parent}/held-out",
        "training.validation_interval=2",
        "training.validation_samples=160",  # 80 micro-batches, 8 s
    )
    limits = ("training.steps=2", "training.hang_warning=5", "training.hang_timeout=7")
    done = faulty(recipe, run, "tarry:1:0", *long, *limits)
    assert done.returncode == 0, done.stderr
    assert "no progress" not in done.stderr
    assert "validation perplexity" in done.stdout


@pytest.mark.slow
def test_the_rank_that_watches_the_first_names_it(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "first"
    done = faulty(recipe, run, "freeze:0:5", "training.hang_warning=3", "training.hang_timeout=5")
    assert done.returncode == 1
    assert "sbn: not heard of for 2 s; last: rank 0 on " in done.stderr


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_run_goes_on(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "died"
    done = faulty(recipe, run, "kill:1:25", "checkpoint.interval=10")
    assert done.returncode != 0
    assert "sbn: rank 1 was ended by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr
    status = read_status(run)
    assert status is not None
    if status.state == "FAILED":  # unless the launcher was quicker than the collective
        assert "lost another rank in forward, backward and update of step 26: gone is rank 1 on" in status.reason
    again = faulty(recipe, run, "none:1:0", "checkpoint.interval=10")
    assert again.returncode == 0, again.stderr
    assert "continues after step 20" in again.stdout


@pytest.mark.slow
def test_a_slow_rank_is_named_and_clocks_may_jump(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "slow"
    done = faulty(recipe, run, "slow:1:10", "training.rank_check_interval=10", "training.telemetry_interval=0")
    assert done.returncode == 0, done.stderr
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.count("is slow: reading a batch takes ") == 1
    assert "rank 1 on " in log
    whole = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    jumps = recipe.parent / "jumps"
    done = faulty(recipe, jumps, "clock:0:0", "training.telemetry_interval=0", "tracking.enabled=true")
    assert done.returncode == 0, done.stderr
    assert [line["loss"] for line in read_metrics(jumps / "metrics.jsonl") if "loss" in line] == whole
    assert json.loads((jumps / "tracking.json").read_text())["status"] == "FINISHED"
    assert "MLflow lacks" not in done.stderr


def frame_in(path: str, function: str, inner: object = None) -> object:
    """A frame of a function in a file, innermost or around another."""
    code = SimpleNamespace(co_filename=path, co_name=function)
    own = SimpleNamespace(f_code=code, f_lineno=7, f_back=None)
    if inner is None:
        return own
    inner.f_back = own
    return inner


def test_the_shim_is_no_place_and_a_handle_that_is_waited_for_is_a_wait() -> None:
    shim = frame_in("/x/megatron_sbn/parallel/cuda_shim.py", "__torch_function__")
    within = frame_in("/x/megatron_sbn/layers/attention.py", "forward", shim)
    assert locate(within) == ("megatron_sbn/layers/attention.py:7 forward", False)
    assert locate(frame_in("/x/megatron_sbn/layers/collectives.py", "__call__")) == (
        "megatron_sbn/layers/collectives.py:7 __call__",
        True,
    )
