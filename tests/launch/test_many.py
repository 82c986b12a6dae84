"""Several commands at a time: how many, in which order, what becomes of failures, of signals and of a lost parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sbn.launch import many
from megatron_sbn.launch.many import Command, Outcome, run_all

STOPS = "from megatron_sbn.launch.stop_signals import unblock; unblock(); "
WAITS = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); log('up'); " + STOPS + "time.sleep(600)"


def commands(folder: Path, **codes: str) -> dict[str, Command]:
    """Python programs by name; `log(text)` appends a line to FOLDER/log."""
    log = f"log = lambda text: open({str(folder / 'log')!r}, 'a').write(text + '\\n')\nimport os, sys, time, signal\n"
    return {name: Command([sys.executable, "-c", log + code]) for name, code in codes.items()}


def logged(folder: Path) -> list[str]:
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def when(ready: Callable[[], bool], then: Callable[[], None]) -> None:
    """`then` from another thread, as soon as `ready`."""

    def wait() -> None:
        while not ready():
            time.sleep(0.05)
        then()

    threading.Thread(target=wait, daemon=True).start()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_as_many_as_allowed_run_at_once_and_every_outcome_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    step = "log('+'); print('noise'); time.sleep(0.5); log('-')"
    codes = {f"run{i}": step for i in range(4)} | {"run2": step + "; sys.exit('sbn: no such shard')"}
    assert run_all(commands(tmp_path, **codes), 2) == {
        "run0": Outcome(0), "run1": Outcome(0), "run2": Outcome(1, "no such shard"), "run3": Outcome(0),
    }  # fmt: skip
    at_once, most = 0, 0
    for line in logged(tmp_path):
        at_once += 1 if line == "+" else -1
        most = max(most, at_once)
    assert most == 2
    out = capfd.readouterr().out
    assert "noise" not in out
    assert "status 1: run2: no such shard" in out
    assert out.index("begins: run0") < out.index("begins: run2") < out.index("begins: run3")


@pytest.mark.parametrize(
    ("at_most", "runs", "ranks", "expected"), [(3, 3, 1, "3"), (3, 1, 1, "9"), (2, 2, 2, "2"), (9, 2, 8, "1")]
)
def test_threads_are_shared_out_unless_they_are_set(
    at_most: int, runs: int, ranks: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = commands(tmp_path, **{f"a{i}": "log(os.environ['OMP_NUM_THREADS'])" for i in range(runs)})
    given = {name: Command(command.words, ranks) for name, command in given.items()}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(many, "usable_cpus", lambda: 9)
    run_all(given, at_most)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_all(given, at_most)
    assert logged(tmp_path) == [expected] * runs + ["7"] * runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_end_stops_what_runs_and_nothing_new_begins(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    when(lambda: logged(tmp_path) == ["up"], lambda: send(number))
    outcomes = run_all(commands(tmp_path, first=WAITS, second="log('never')"), 1)
    assert outcomes == {"first": Outcome(75), "second": Outcome(75, begun=False)}
    assert logged(tmp_path) == ["up"]
    assert signal.getsignal(number) == before


def test_a_signal_before_the_run_listens_waits_for_it(tmp_path: Path) -> None:
    """It begins with signals blocked, as ranks do."""
    slow = "time.sleep(1); " + WAITS
    send_at_once = threading.Timer(0.3, lambda: send(signal.SIGTERM))
    send_at_once.start()
    assert run_all(commands(tmp_path, slow=slow), 1) == {"slow": Outcome(75)}


def test_a_second_request_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "_REPEAT_SECONDS", 0.2)
    deaf = "signal.signal(signal.SIGTERM, lambda *_: log('asked')); log('up'); " + STOPS
    deaf += "[time.sleep(0.1) for _ in range(6000)]"
    when(lambda: logged(tmp_path) == ["up"], lambda: send(signal.SIGTERM))
    when(lambda: "asked" in logged(tmp_path), lambda: (time.sleep(0.5), send(signal.SIGTERM)))
    assert run_all(commands(tmp_path, deaf=deaf), 1) == {"deaf": Outcome(128 + signal.SIGKILL)}


def test_a_closed_console_ends_what_runs(tmp_path: Path) -> None:
    """The parent's next line finds no reader; nothing is left training."""
    code = (
        "import sys; from megatron_sbn.launch.many import Command, run_all\n"
        f"words = [sys.executable, '-c', {commands(tmp_path, a=WAITS)['a'].words[2]!r}]\n"
        "short = [sys.executable, '-c', 'import time; time.sleep(2)']\n"
        "run_all({'a': Command(words), 'b': Command(short), 'c': Command(short)}, 2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.stdout.close()
    _, errors = parent.communicate(timeout=600)
    assert b"BrokenPipeError" in errors
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "log")], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_nothing_new_begins_once_a_study_is_switched_off(tmp_path: Path) -> None:
    """What runs ends by itself: it looks for the file too."""
    codes = {"a": "log('a'); time.sleep(0.5)", "b": "log('b')", "c": "log('c')"}
    outcomes = run_all(commands(tmp_path, **codes), 1, lambda: "a" in logged(tmp_path))
    assert outcomes == {"a": Outcome(0), "b": Outcome(75, begun=False), "c": Outcome(75, begun=False)}
    assert logged(tmp_path) == ["a"]
