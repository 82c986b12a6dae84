"""Bad input: the short form of `make fuzz`, and that the sandbox finds what it looks for."""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
import sandbox
from cases import cases
from sandbox import CANARY, SECRET, Case, Sandbox
from time_limit import LIMIT_SECONDS

CASE = Case("none", "cli", ())


@pytest.mark.parametrize("count", cases([50, 150], [50]))
def test_bad_input_of_every_kind_is_refused_or_works(count: int) -> None:
    command = [sys.executable, fuzz.__file__, "--cases", str(count), "--processes", "1", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: 0" in done.stdout
    for kind in ("recipe", "sweep", "arguments", "run", "shard", "tokenizer", "corpus", "checkpoint"):
        assert f" {kind}" in done.stdout


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path / "sandbox")
    made.prepare()
    return made


def complain(*lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return 2


def sleep() -> int:
    time.sleep(60)
    return 0


def start(*command: str) -> int:
    return subprocess.run(command, check=False).returncode


def write(path: str) -> int:
    Path(path).write_text("x")
    return 0


def touch(path: Path) -> int:
    path.touch()
    return 0


WRONG: dict[str, tuple[Callable[[], int], str]] = {
    "traceback": (lambda: int("x"), "traceback: ValueError: invalid literal"),
    "status": (lambda: 9, "status 9"),
    "silence": (lambda: 2, "says 0 lines for status 2"),
    "two lines": (lambda: complain("sbn: a", "sbn: b"), "says 2 lines"),
    "another line": (lambda: complain("sbn: a", "b"), "says more than its line"),
    "control": (lambda: complain("sbn: \x1b[2J"), "says control characters"),
    "long": (lambda: complain("sbn: " + "x" * 5000), "says 5005 characters"),
    "secret": (lambda: complain(f"sbn: http://me:{SECRET}@host"), "shows a secret in stderr"),
    "secret in a file": (
        lambda: write(f"{SECRET}.txt") or write("a.txt") or keep_secret(),
        "shows a secret in cwd/b.txt",
    ),
    "hang": (sleep, "hangs: "),
    "segfault": (lambda: ctypes.string_at(0) and 0, "killed by SIGSEGV"),
    "write": (lambda: write("../../beside/new.txt"), "open '../../beside/new.txt'"),
    "rename": (lambda: os.rename("../../beside/precious.yaml", "x") or 0, "os.rename"),  # noqa: PTH104
    "remove": (lambda: os.remove("../../beside/precious.yaml") or 0, "os.remove"),  # noqa: PTH107
    "mkdir": (lambda: os.mkdir("../../new") or 0, "os.mkdir"),  # noqa: PTH102
    "program": (lambda: start("true"), "starts 'true'"),
    "shell": (lambda: os.system("true"), "starts b'true'"),
    "planted": (lambda: touch(Path(CANARY)), "runs a planted command"),
}


def keep_secret() -> int:
    Path("b.txt").write_text(os.environ["MLFLOW_TRACKING_TOKEN"])
    return 0


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str, box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    does, expected = WRONG[name]
    monkeypatch.setattr(sandbox, "_enter", lambda _: does())
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert box.run(CASE).wrong.startswith(expected)


@pytest.mark.parametrize(
    "does",
    [
        lambda: 0,
        lambda: complain("sbn: a recipe is a mapping"),
        lambda: write("a.txt"),
        lambda: os.rename(write("a.txt") or "a.txt", "b.txt") or 0,  # noqa: PTH104
        lambda: complain("tokenizing: 100% of 0.0 MB, 1 documents", "sbn: empty corpus"),
        lambda: sys.exit(complain("usage: sbn [-h]", "sbn: error: unknown: x")),
    ],
)
def test_what_is_right_is_right(does: Callable[[], int], box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_enter", lambda _: does())
    assert box.run(CASE).wrong == ""


def test_a_process_of_its_own_is_judged_as_well(box: Sandbox) -> None:
    verdict = box.run_alone(Case("none", "cli", ("plan", "nowhere.yaml", "--nodes", "1", "--device", "h100")))
    assert (verdict.status, verdict.wrong) == (2, "")
    assert verdict.said.startswith("sbn: ")
