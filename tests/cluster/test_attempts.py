"""What a batch job does after an attempt: start again, or end, and with what status."""

from pathlib import Path

import pytest

from megatron_sbn.cluster import job
from megatron_sbn.cluster.attempts import (
    Attempt,
    Limits,
    Verdict,
    decide,
    failures_in_a_row,
    read_attempts,
    record_attempt,
)
from megatron_sbn.runs.status import RunStatus, read_status, write_status

ROOT = Path(__file__).parents[2]
STOPPED, FAILED = ("STOPPED", 75, "SIGUSR1"), ("FAILED", 1, "node 0: status 1")


@pytest.mark.parametrize(
    ("ended", "restart", "failures", "settings", "expected"),
    [
        (("FINISHED", 0, ""), 9, 0, {}, (False, 0, "all steps are done")),
        (STOPPED, 0, 0, {}, (True, 75, "asked to stop (SIGUSR1); saved at step 40")),
        (STOPPED, 2, 0, {}, (False, 75, "restarted 2 times, which is the limit (SBN_MAX_RESTARTS); saved at step 40")),
        (STOPPED, 0, 0, {"ending": True}, (False, 75, "the job was asked to end (SIGUSR1); saved at step 40")),
        (("STOPPED", 75, "SIGTERM"), 0, 0, {}, (False, 75, "the job was asked to end (SIGTERM)")),
        (STOPPED, 0, 0, {"switched_off": True}, (False, 75, "there is a STOP file: remove it to go on")),
        (
            ("STOPPED", 75, "STOP_FILE"),
            0,
            0,
            {},
            (False, 75, "there was a STOP file; saved at step 40; submit it again"),
        ),
        (FAILED, 0, 2, {}, (True, 75, "failure 2 of at most 3 in a row: node 0: status 1")),
        (FAILED, 0, 3, {}, (False, 1, "3 failures in a row (SBN_MAX_FAILURES); the last: node 0: status 1")),
        (FAILED, 2, 1, {}, (False, 1, "restarted 2 times, which is the limit (SBN_MAX_RESTARTS)")),
        (("FAILED", 3, "step 7: loss is nan"), 0, 1, {}, (False, 3, "status 3 would come again: step 7: loss is nan")),
        (("FAILED", None, "no word"), 0, 3, {}, (False, 1, "3 failures in a row")),
    ],
)
def test_what_follows(
    ended: tuple, restart: int, failures: int, settings: dict, expected: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    state, exit_status, reason = ended
    status = RunStatus(state, exit_status, 40, reason, "12", restart, 0.0)
    switches = {"ending": False, "switched_off": False} | settings
    verdict = decide(status, failures, Limits(2, 3), **switches)
    again, final, beginning = expected
    assert verdict == Verdict(again, final, verdict.reason)
    assert verdict.reason.startswith(beginning)


def test_failures_in_a_row_end_with_a_stop_and_with_progress() -> None:
    def attempts(*ended: tuple[str, str, int]) -> list[Attempt]:
        return [Attempt(job, 0, state, 1, checkpoint, "", 0.0) for job, state, checkpoint in ended]

    failed = ("1", "FAILED", 0)
    assert failures_in_a_row(attempts(failed, failed, failed), "1") == 3
    assert failures_in_a_row(attempts(failed, ("1", "STOPPED", 5), ("1", "FAILED", 5)), "1") == 1
    assert failures_in_a_row(attempts(failed, failed, ("1", "FAILED", 5)), "1") == 1
    assert failures_in_a_row(attempts(failed, ("2", "FAILED", 0), failed), "1") == 2
    assert failures_in_a_row([], "1") == 0


@pytest.mark.parametrize(
    ("srun_status", "asked", "state", "reason", "exit_status"),
    [
        (138, "USR1", "STOPPED", "SIGUSR1", 75),  # srun, or a node's launcher, before it could pass the signal on
        (143, "USR1", "STOPPED", "SIGUSR1", 75),  # one node's was killed by it, the others' by srun
        (143, "TERM", "STOPPED", "SIGTERM", 1),
        (143, "", "FAILED", "srun ended with status 143", 75),
        (1, "USR1", "FAILED", "srun ended with status 1", 75),
    ],
)
def test_a_run_whose_ranks_never_said_how_it_ended(
    srun_status: int, asked: str, state: str, reason: str, exit_status: int, tmp_path: Path
) -> None:
    write_status(tmp_path, "RUNNING", None, 0)
    words = ["--srun-status", str(srun_status), "--asked", asked, str(ROOT / "recipes" / "quickstart.yaml")]
    assert job.main(["end", *words, f"run_dir={tmp_path}"]) == exit_status
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason) == (state, reason)
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.state, attempt.reason) == (state, reason)


def test_starts_that_die_without_a_word_use_up_the_budget_of_their_own_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # no squeue

    def begin(number: str, restart: int) -> int:
        monkeypatch.setenv("SLURM_JOB_ID", number)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        return job.main(["begin", str(ROOT / "recipes" / "quickstart.yaml"), f"run_dir={tmp_path}"])

    # Slurm requeues a job by itself when its node dies.
    assert [begin("12", 0), begin("12", 1), begin("13", 0), begin("13", 1), begin("13", 2)] == [0] * 5
    reason = [(attempt.job, attempt.restart, attempt.state) for attempt in read_attempts(tmp_path)]
    assert reason == [(number, restart, "FAILED") for number, restart in (("12", 0), ("12", 1), ("13", 0), ("13", 1))]
    assert begin("13", 3) == 1
    assert (
        "ends: 3 failures in a row (SBN_MAX_FAILURES); the last: job 13 ended without a word" in capsys.readouterr().out
    )
    status = read_status(tmp_path)
    assert status is not None
    assert status.state == "FAILED"
    assert begin("14", 0) == 0


def test_a_run_that_another_job_has_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "squeue").write_text("#!/bin/bash\necho '12 12'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    words = [str(ROOT / "recipes" / "quickstart.yaml"), f"run_dir={tmp_path}"]
    assert job.main(["begin", *words]) == 0
    before = read_status(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert job.main(["begin", *words]) == 2
    assert f"{tmp_path}: job 12 has this run; wait for it, or scancel it first" in capsys.readouterr().err
    assert read_status(tmp_path) == before
    assert read_attempts(tmp_path) == []
    (tmp_path / "squeue").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert job.main(["begin", *words]) == 0


def test_what_is_no_attempt_is_left_out(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    status = RunStatus("FAILED", 1, 20, "node died", "12", 0, 5.0)
    record_attempt(tmp_path, status)
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(
            b'\n[1]\n\xff\xfe\n{"job": 12}\n' + b"[" * 3000 + b'\n{"job": "12", "restart": "0", "state": "FAILED",'
        )
        file.write(b' "exit_status": 1, "checkpoint": 0, "reason": "", "time": 1}\n')
    record_attempt(tmp_path, status)
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(b'{"job": "12", "rest')
    assert [(attempt.job, attempt.state, attempt.reason) for attempt in read_attempts(tmp_path)] == [
        ("12", "FAILED", "node died")
    ] * 2
