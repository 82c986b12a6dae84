"""status.json: what is written is read; what somebody else wrote is no status."""

from pathlib import Path

import pytest

from megatron_sbn.checkpoint.directory import saved_step
from megatron_sbn.runs.status import RunStatus, read_status, write_status

GOOD = '{"state": "STOPPED", "exit_status": 75, "step": 40, "reason": "", "job": "12", "restart": 0, "time": 1}'


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, "FAILED", 3, 7, "step 8: loss is nan")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_status, status.step, status.reason) == ("FAILED", 3, 7, "step 8: loss is nan")
    (tmp_path / "status.json").write_text(GOOD)
    assert read_status(tmp_path) == RunStatus("STOPPED", 75, 40, "", "12", 0, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "\xff",
        GOOD.replace("40", '"40"'),
        GOOD.replace("40", "4.5"),
        GOOD.replace("STOPPED", "stopped"),
        GOOD.replace("0,", "null,"),
        GOOD.replace('"step": 40, ', ""),
        GOOD.replace("40", "9" * 5000),
        GOOD.replace("40", "[" * 3000),
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_what_is_no_status_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(text.encode("latin-1"))
    assert read_status(tmp_path) is None


@pytest.mark.parametrize(("text", "step"), [("step-00000040\n", 40), ("", 0), ("../x", 0), ("step-" + "9" * 5000, 0)])
def test_the_step_that_latest_names(text: str, step: int, tmp_path: Path) -> None:
    assert saved_step(tmp_path) == 0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(text)
    assert saved_step(tmp_path) == step
