"""Where a Slurm is required (.ci/run) its absence is a failure, and elsewhere a skip that says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 error"), ("0", "1 skipped")])
def test_without_slurm(required: str, outcome: str, tmp_path: Path) -> None:
    tests = Path(__file__).with_name("test_batch.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "kill_switch"],
        env=os.environ | {"PATH": str(tmp_path), "SBN_REQUIRE_SLURM": required},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome in done.stdout, done.stdout + done.stderr
    assert "no Slurm here (sbatch, " in done.stdout
    assert done.returncode == int(required)
