"""A run that is asked to stop: checkpointed at a step boundary, status 75, and going on with the same losses."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from cases import cases
from mlflow import MlflowClient
from time_limit import LIMIT_SECONDS
from tiny_run import at_import, write_tiny_recipe

from megatron_sbn.errors import STOPPED
from megatron_sbn.launch import launch
from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import read_status
from megatron_sbn.runs.tracking_record import read_record

STEPS = 150


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    return write_tiny_recipe(folder, STEPS, tracking=f'uri: "sqlite:///{folder}/mlflow.db"')


def start(recipe: Path, run: Path, *overrides: str, path: str = "") -> "subprocess.Popen[str]":
    words = ["train", str(recipe), f"run_dir={run}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if path else {})
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sbn.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def await_line(process: "subprocess.Popen[str]", beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"ended with {process.wait()} before {beginning!r}")


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def history(run: Path, metric: str) -> list:  # type: ignore[type-arg]
    """Points that MLflow has."""
    record = read_record(run / "tracking.json")
    return sorted(MlflowClient(record.uri).get_metric_history(record.run_id, metric), key=lambda point: point.step)


def test_a_signalled_run_goes_on_with_the_same_losses(recipe: Path) -> None:
    """SIGUSR1, then SIGTERM, then to the end; beside a run that nobody disturbed."""
    run, whole = recipe.parent / "stopped", recipe.parent / "whole"
    for number, after in ((signal.SIGUSR1, "step 20/"), (signal.SIGTERM, "step 70/")):
        with start(recipe, run) as process:
            await_line(process, after)
            process.send_signal(number)
            process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == STOPPED
        status = read_status(run)
        assert status is not None
        assert (status.state, status.exit_status, status.reason) == ("STOPPED", STOPPED, number.name)
        assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{status.step:08d}"
        assert losses(run)[-1][0] == status.step < STEPS
        assert read_record(run / "tracking.json").status == "KILLED"
    for folder in (run, whole):
        with start(recipe, folder) as process:
            printed, _ = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, printed
    assert len(losses(whole)) == STEPS
    assert losses(run) == losses(whole)
    ended = read_status(run)
    assert ended is not None
    assert (ended.state, ended.exit_status, ended.step) == ("FINISHED", 0, STEPS)
    assert read_record(run / "tracking.json").status == "FINISHED"
    samples = read_metrics(run / "system_metrics.jsonl")
    assert [line["step"] for line in samples] == list(range(len(samples)))
    assert len(samples) >= 3  # one a start at least
    assert [point.step for point in history(run, "system/cpu_utilization_percentage")] == list(range(len(samples)))


def on_terminal(command: list[str]) -> tuple["subprocess.Popen[bytes]", int]:
    """A command in a session of its own, whose terminal is this side's file descriptor."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_until(terminal: int, text: str, shown: str = "") -> str:
    """What the terminal shows until there is `text`, or until it is left."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while text not in shown:
        assert time.monotonic() < deadline, shown
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # how Linux says that nobody has the other side open
            assert text == "the end", shown
            return shown
    return shown


def test_ctrl_c_on_a_terminal_saves_and_a_hang_up_too(recipe: Path, tmp_path: Path) -> None:
    """Two ranks: the terminal signals its whole foreground group, and then is gone for good."""
    run = tmp_path / "run"
    words = ["train", str(recipe), f"run_dir={run}", "--nproc-per-node", "2", "tracking.enabled=false"]
    command = [sys.executable, "-m", "megatron_sbn.cli", *words, "training.steps=100000"]
    process, terminal = on_terminal(command)
    shown = read_until(terminal, "loss ")
    os.write(terminal, b"\x03")
    shown = read_until(terminal, "the end", shown)
    assert process.wait(LIMIT_SECONDS) == STOPPED, shown
    os.close(terminal)
    assert shown.count("Ctrl-C again ends at once") == 1
    assert "Traceback" not in shown
    status = read_status(run)
    assert status is not None
    assert (status.state, status.reason) == ("STOPPED", "SIGINT")
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{status.step:08d}"

    process, terminal = on_terminal(command)
    read_until(terminal, "loss ")
    os.close(terminal)  # hang-up: SIGHUP, and whatever is printed from now on has nowhere to go
    assert process.wait(LIMIT_SECONDS) == STOPPED
    again = read_status(run)
    assert again is not None
    assert (again.state, again.reason) == ("STOPPED", "SIGHUP")
    assert again.step > status.step


def test_a_second_ctrl_c_ends_at_once_and_the_status_says_so(tmp_path: Path) -> None:
    """Of a rank that never comes to a step boundary; the first is no repetition of the second."""
    script = tmp_path / "frozen.py"
    script.write_text(
        FROZEN.replace(
            "signals.allow", "signals.before_exit = lambda n: print('left', n, flush=True)\n    signals.allow"
        )
    )
    with subprocess.Popen([sys.executable, str(script), "0"], stdout=subprocess.PIPE, text=True) as process:
        await_line(process, "ready")
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGINT
        assert process.stdout is not None
        assert process.stdout.read() == "left 2\n"


def test_under_nohup_a_hang_up_is_nothing() -> None:
    with subprocess.Popen(["nohup", sys.executable, "-c", FROZEN, "0"], stdout=subprocess.PIPE, text=True) as process:
        await_line(process, "ready")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        process.send_signal(signal.SIGHUP)
        assert process.poll() is None
        process.kill()


@pytest.mark.slow
def test_a_signal_while_the_engines_are_imported_is_remembered(recipe: Path, tmp_path: Path) -> None:
    """Of one rank alone, of a run that begins and of one that goes on; the third start has all steps to do, once."""
    run = recipe.parent / "early"
    path = at_import(tmp_path / "hook", "os.kill(os.getpid(), signal.SIGTERM)", ("1",))
    early = ("training.steps=3", "checkpoint.interval=2", "tracking.enabled=false")
    with start(recipe, run, *early, path=str(path)) as process:
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == STOPPED, said
    status = read_status(run)
    assert status is not None
    assert (status.state, status.reason, status.step) == ("STOPPED", "SIGTERM", 0)
    assert not (run / "checkpoints" / "latest").exists()
    with start(recipe, run, *early) as process:
        process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "zero_fraction" in line] == [0, 3]
    longer = ("training.steps=9", *early[1:])
    with start(recipe, run, *longer, path=str(path)) as process:
        process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == STOPPED
    status = read_status(run)
    assert status is not None
    assert (status.state, status.reason, status.step) == ("STOPPED", "SIGTERM", 3)
    assert [step for step, _ in losses(run)] == [1, 2, 3]


EARLIEST = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGTERM)
from megatron_sbn.launch.stop_signals import StopSignals
with StopSignals() as signals:
    sys.exit(75 if signals.noted == {signal.SIGTERM} else 1)
"""


def test_a_signal_before_a_rank_listens_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "earliest_rank.py").write_text(EARLIEST)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch([], 2, module="earliest_rank") == STOPPED


DELIVERING = """
import os, pathlib, sys, time
from megatron_sbn.launch.stop_signals import unblock
unblock()
if os.environ["RANK"] == "0":
    time.sleep(2)
    pathlib.Path(sys.argv[1]).touch()
sys.exit(75)
"""


def test_rank_0_has_time_to_deliver_when_the_others_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than ranks have that were asked to end because another failed."""
    (tmp_path / "delivering_rank.py").write_text(DELIVERING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("megatron_sbn.launch.local.GRACE_SECONDS", 0.2)
    assert launch([str(tmp_path / "delivered")], 2, module="delivering_rank") == STOPPED
    assert (tmp_path / "delivered").exists()


@pytest.mark.parametrize("place", cases([".", ".."], ["."]))
def test_the_kill_switch_stops_a_run(place: str, recipe: Path, tmp_path: Path) -> None:
    """In its folder, or beside all runs of a study."""
    run = tmp_path / "study" / "switched"
    with start(recipe, run, "training.steps=100000", "tracking.enabled=false") as process:
        await_line(process, "step 1/")
        (run / place / "STOP").touch()
        process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == STOPPED
    status = read_status(run)
    assert status is not None
    assert (status.state, status.reason) == ("STOPPED", "STOP_FILE")


FROZEN = """
import sys, time
from megatron_sbn.launch.stop_signals import StopSignals
with StopSignals() as signals:
    signals.allow(float(sys.argv[1]))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("deadline", "waits"), [("1.5", ()), ("0", (0.2, 5.5))])
def test_a_deadline_and_a_second_signal_force_the_exit(deadline: str, waits: tuple[float, ...]) -> None:
    """A process that never comes to a step boundary. A repetition at once is still the first request."""
    with subprocess.Popen([sys.executable, "-c", FROZEN, deadline], stdout=subprocess.PIPE, text=True) as process:
        await_line(process, "ready")
        process.send_signal(signal.SIGTERM)
        for seconds in waits:
            assert process.poll() is None
            time.sleep(seconds)
            process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM
