"""Every kernel compiled for four architectures that are not here, and its machine code read back."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS)}
LINE = re.compile(r"^(?P<name>\w+)\[.*\]\s+sm_(?P<architecture>\d+)\s+(?P<registers>\d+)\s+\d+\s+(?P<spills>\d+)\s+ok ")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=1500
    )


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_no_kernel_spills_breaks_a_limit_or_misses_its_matrix_instruction() -> None:
    run = python("-m", "sbn_kernels.inspection")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [LINE.match(line) for line in run.stdout.splitlines()[1:-1]]
    assert all(lines), run.stdout
    seen = {line["name"] for line in lines if line}
    with_kernels = {path.stem for path in (KERNELS / "sbn_kernels").glob("*.py") if "\nBUILDS" in path.read_text()}
    assert seen == with_kernels
    assert {int(line["architecture"]) for line in lines if line} == {80, 90, 100, 120}
    assert all(int(line["spills"]) == 0 for line in lines if line)


def test_what_is_wrong_is_found() -> None:
    code = """
from dataclasses import replace
from sbn_kernels.accumulator_scale import BUILDS
from sbn_kernels.inspection import inspect_build
print(inspect_build(BUILDS[0], 90).complaints)
print(inspect_build(replace(BUILDS[0], instruction={90: "IGMMA"}), 90).complaints)
"""
    run = python("-c", code)
    assert run.stdout.splitlines() == ["()", "('no IGMMA',)"], run.stderr


def test_interpreted_kernels_and_unknown_names_are_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sbn_kernels.inspection"],
        env={**ENVIRONMENT, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "unset it" in run.stderr
    assert "no build's name starts with it" in python("-m", "sbn_kernels.inspection", "--kernel", "nonesuch").stderr
