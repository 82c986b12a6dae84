"""Kernels compiled for architectures that are not here, and their machine code read back: one build of every kernel for
Hopper, and (slow) all builds for all four.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sbn_kernels.inspection import ARCHITECTURES, all_builds
from time_limit import LIMIT_SECONDS

KERNELS = Path(__file__).parents[2] / "kernels"
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS)}
LINE = re.compile(r"^(?P<name>\w+\[.*\])\s+sm_(?P<architecture>\d+)\s+(?P<registers>\d+)\s+\d+\s+(?P<spills>\d+)\s+ok ")


def python(*arguments: str, limit: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=limit
    )


def test_every_kernel_has_builds_to_inspect() -> None:
    with_kernels = {path.stem for path in (KERNELS / "sbn_kernels").rglob("*.py") if "\nBUILDS" in path.read_text()}
    assert {build.name.partition("[")[0] for build in all_builds()} == with_kernels


@pytest.mark.slow
@pytest.mark.timeout(6 * LIMIT_SECONDS)  # dozens of builds
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_breaks_a_limit_or_misses_its_matrix_instruction(architecture: int) -> None:
    run = python("-m", "sbn_kernels.inspection", "--architectures", str(architecture), limit=5 * LIMIT_SECONDS)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [LINE.match(line) for line in run.stdout.splitlines()[1:-1]]
    assert all(lines), run.stdout
    builds = [build for build in all_builds() if not build.instruction or architecture in build.instruction]
    assert sorted(line["name"] for line in lines if line) == sorted(build.name for build in builds)
    assert {int(line["architecture"]) for line in lines if line} == {architecture}
    assert all(int(line["spills"]) == 0 for line in lines if line)


def test_one_build_of_every_kernel_keeps_the_rules_on_hopper() -> None:
    """What is slow above, in small: every kernel function's first build for sm_90."""
    code = """
from sbn_kernels.inspection import all_builds, inspect_all
first = {}
for build in all_builds():
    if not build.instruction or 90 in build.instruction:
        first.setdefault(build.function.__name__, build)
for report in inspect_all(first.values(), [90]):
    print(report.build.name, *report.complaints)
"""
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) > 20
    assert all(line.endswith("]") for line in lines), run.stdout  # a name and no complaint


def test_what_is_wrong_is_found() -> None:
    code = """
from dataclasses import replace
from sbn_kernels.gpu.accumulator_scale import BUILDS
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
