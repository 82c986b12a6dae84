"""attempts.jsonl: what is recorded is read; lines of somebody else's are left out."""

from pathlib import Path

from megatron_sbn.cluster.attempts import read_attempts, record_attempt
from megatron_sbn.run_status import RunStatus


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
