"""Where a Slurm is required (.ci/run) its absence is a failure, and elsewhere a skip that says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

pytestmark = pytest.mark.slurm  # it needs none, but goes with those that do


def test_without_slurm(tmp_path: Path) -> None:
    tests = Path(__file__).with_name("test_batch.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "kill_switch"]
    asked = {
        required: subprocess.Popen(
            command, env=os.environ | {"PATH": str(tmp_path), "SBN_REQUIRE_SLURM": required},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for required in ("0", "1")
    }  # fmt: skip
    for (required, process), outcome in zip(asked.items(), ("1 skipped", "1 error"), strict=True):
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
        assert outcome in said, said
        assert "no Slurm here (sbatch, " in said
        assert process.returncode == int(required)
