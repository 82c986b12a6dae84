"""Several commands at a time: how many, in which order, what becomes of failures and of signals."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_sbn.launch.many import run_all


def commands(folder: Path, **codes: str) -> dict[str, list[str]]:
    """Python programs by name; `log(text)` appends a line to FOLDER/log."""
    log = f"log = lambda text: open({str(folder / 'log')!r}, 'a').write(text + '\\n')\nimport os, sys, time, signal\n"
    return {name: [sys.executable, "-c", log + code] for name, code in codes.items()}


def test_as_many_as_allowed_run_at_once_and_every_status_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    step = "log('+'); print('noise'); time.sleep(0.5); log('-'); sys.exit(int(os.environ['X{0}']))"
    names = {f"run{i}": step.replace("os.environ['X{0}']", str(i == 2) + " * 3") for i in range(4)}
    assert run_all(commands(tmp_path, **names), 2) == {"run0": 0, "run1": 0, "run2": 3, "run3": 0}
    at_once, most = 0, 0
    for line in (tmp_path / "log").read_text().splitlines():
        at_once += 1 if line == "+" else -1
        most = max(most, at_once)
    assert most == 2
    out = capfd.readouterr().out
    assert "noise" not in out
    assert "status 3: run2" in out
    assert out.index("begins: run0") < out.index("begins: run2") < out.index("begins: run3")


def test_threads_are_shared_out_unless_they_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"a": "log(os.environ['OMP_NUM_THREADS'])"}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    run_all(commands(tmp_path, **told), 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_all(commands(tmp_path, **told), 3)
    assert (tmp_path / "log").read_text().split() == ["3", "7"]


def test_a_signal_reaches_what_runs_and_nothing_new_begins(tmp_path: Path) -> None:
    waits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); log('up'); time.sleep(600)"
    before = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        while not (tmp_path / "log").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert run_all(commands(tmp_path, first=waits, second="log('never')"), 1) == {"first": 75, "second": 75}
    assert (tmp_path / "log").read_text().split() == ["up"]
    assert signal.getsignal(signal.SIGTERM) == before
