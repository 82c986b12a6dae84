"""Runs that are killed: the short form of `make kill`, and that its checks find what they look for."""

import json
import subprocess
import sys
from pathlib import Path

import kill
import pytest
from fire import Attempt, FireError, Outcome
from time_limit import LIMIT_SECONDS

WHOLE = [{"step": step, "loss": 1.0 + 2.0**-52 * step} for step in range(1, kill.STEPS + 1)]


def test_a_run_killed_at_every_kind_of_moment_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    kills = len(kill.EACH_MOMENT)
    command = [sys.executable, kill.__file__, "--kills", str(kills), "--folder", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills in 1 runs" in done.stdout
    for moment in (
        "in the middle of a step",
        "save",
        "before the rename",
        "before latest is replaced",
        "after latest is replaced",
        "during resume",
    ):
        assert moment in done.stdout
    assert "1 runs finished, each with the undisturbed run's" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_at_other_layouts(tmp_path: Path) -> None:
    words = ["--kills", "3", "--seed", "3", "--change-layout", "--no-damage", "--folder", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, kill.__file__, *words], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills in 1 runs" in done.stdout
    assert "losses within " in done.stdout


def test_runs_at_other_layouts_are_compared_by_their_losses(finished: Path) -> None:
    off = [line | {"loss": line["loss"] * (1 + 3e-6)} for line in WHOLE]
    assert kill.apart(off, WHOLE) == pytest.approx(3e-6, rel=1e-3)
    assert kill.apart(off[:-1], WHOLE) == float("inf")
    kill.check_finished(finished, off, 4e-6)
    with pytest.raises(FireError, match=r"a loss is 3\.0e-06 off, at most 2\.0e-06 may be"):
        kill.check_finished(finished, off, 2e-6)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run's metrics and checkpoints, as far as they are looked at."""
    lines = [json.dumps(line | {"time": 5.0, "tokens_per_second": 7.0}) for line in WHOLE]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in (kill.STEPS - kill.INTERVAL, kill.STEPS):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text(f"step-{kill.STEPS:08d}\n")
    kill.check_finished(tmp_path, WHOLE)
    return tmp_path


def test_a_loss_that_differs_in_its_last_bit_is_found(finished: Path) -> None:
    text = (finished / "metrics.jsonl").read_text()
    (finished / "metrics.jsonl").write_text(text.replace(repr(WHOLE[9]["loss"]), repr(WHOLE[9]["loss"] + 2.0**-52)))
    with pytest.raises(FireError, match=r"'step': 10, .* is not \{'step': 10"):
        kill.check_finished(finished, WHOLE)


def test_a_step_that_is_there_twice_or_not_at_all_is_found(finished: Path) -> None:
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    for wrong in (lines[:5] + lines[4:], lines[:-1]):
        (finished / "metrics.jsonl").write_text("".join(wrong))
        with pytest.raises(FireError, match="is not the undisturbed run's"):
            kill.check_finished(finished, WHOLE)


def test_checkpoints_that_pile_up_are_found(finished: Path) -> None:
    for name in ("step-00000004", "step-00000008"):
        (finished / "checkpoints" / name).mkdir()
    with pytest.raises(FireError, match="2 are to be kept"):
        kill.check_finished(finished, WHOLE)


def test_lost_steps_are_counted_and_limited(tmp_path: Path) -> None:
    def killed(done: int, saving: bool) -> Outcome:
        return Outcome("in the middle of a step", 0, done, saving)

    assert kill.check_lost(tmp_path, killed(7, saving=False), 4) == 3
    assert kill.check_lost(tmp_path, killed(12, saving=True), 4) == 8
    for wrong in (killed(9, saving=False), killed(13, saving=True)):
        with pytest.raises(FireError, match="steps are lost"):
            kill.check_lost(tmp_path, wrong, 4)


def test_a_start_from_another_step_and_silence_about_damage_are_found(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "tiny.yaml", (), tmp_path / "run", 1, tmp_path)
    (tmp_path / "rank-0.txt").write_text("step-00000008 is damaged: step-00000004 is used\n")
    kill.check_begin(attempt, Outcome("", 4, 24, False), kill.Expected(4, "step-00000008"))
    kill.check_begin(attempt, Outcome("during resume", None, 0, False), kill.Expected(4, "step-00000012"))
    with pytest.raises(FireError, match="went on after step 4"):
        kill.check_begin(attempt, Outcome("", 4, 24, False), kill.Expected(8))
    with pytest.raises(FireError, match="no word of step-00000012"):
        kill.check_begin(attempt, Outcome("", 4, 24, False), kill.Expected(4, "step-00000012"))
