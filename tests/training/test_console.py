"""One remaining time, in the bar and in the lines."""

import re
from pathlib import Path

import pytest

from megatron_sbn.training import console
from megatron_sbn.training.console import Console, Eta
from megatron_sbn.training.step import StepResult

RESULT = StepResult(loss=2.5, grad_norm=1.0, lr=1e-3, weight_decay=0.1)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, in seconds, as the console sees it."""
    moment = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: moment[0])
    return moment


def test_the_first_step_of_a_job_is_no_part_of_the_pace(now: list[float]) -> None:
    eta = Eta(10, 100)
    now[0] = 50.0
    assert eta.note(11) == "?"
    for step in range(12, 15):
        now[0] += 2.0
        assert eta.note(step) == f"0:02:{2 * (100 - step) - 120:02d}"
    now[0] += 32.0  # two steps with a checkpoint: 5 in 38 s
    assert eta.note(16) == "0:10:38"


def test_a_job_of_one_step_has_none_left() -> None:
    assert Eta(4, 5).note(5) == "0:00:00"


def test_steps_that_are_done_again_do_not_break_it(now: list[float]) -> None:
    eta = Eta(0, 10)
    for step, seconds in ((1, 1.0), (2, 1.0), (1, 1.0), (2, 1.0)):
        now[0] += seconds
        shown = eta.note(step)
    assert shown == "0:00:08"


def test_the_bar_and_the_line_agree(
    now: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Console(tmp_path / "log", 100, True)
    shown.begin(0)
    for step in (1, 2, 3):
        now[0] += 3.0 if step > 1 else 60.0
        shown.step(step, RESULT, 1000.0, True)
    shown.close()
    bar = re.findall(r"eta ([\d:]+)", capsys.readouterr().err)
    line = re.findall(r"step 3/100 .* eta ([\d:]+)", (tmp_path / "log").read_text())
    assert line == ["0:04:51"]
    assert bar[-1:] == line
