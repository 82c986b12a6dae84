"""Does a package index have what setup.py and constraints.txt ask for together? Asked by metadata; no wheel is loaded.

An installed environment cannot tell: it may hold a build of torch that asks for less than the index's own.
"""

import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from releases import CONSTRAINTS, OTHERS, PINNED, ROOT, Releases

INDEX = "https://pypi.org/simple"
X86, ARM = "x86_64-manylinux_2_28", "aarch64-manylinux_2_28"
# CUDA's libraries are pinned by torch itself.
PINNED_BY_TORCH = ("nvidia-", "cuda-")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _index() -> None:
    """Skips where there is no network."""
    try:
        with urllib.request.urlopen(f"{INDEX}/uv/", timeout=30):
            pass
    except (urllib.error.URLError, TimeoutError) as error:
        pytest.skip(f"{INDEX} cannot be reached: {error}")


def resolve(releases: Releases, python: str, platform: str, folder: Path) -> list[str]:
    """NAME==RELEASE of everything that an install with all extras takes."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    assert uv is not None, "the extra dev brings uv"
    constraints = folder / "constraints.txt"
    constraints.write_text(releases.constraints())
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate", "--all-extras"]
    command += ["--default-index", INDEX, "--python-version", python, "--python-platform", platform]
    run = subprocess.run(
        [*command, "-c", str(constraints), "setup.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def canonical(line: str) -> str:
    return line.partition(";")[0].strip().lower().replace("_", "-")


@pytest.mark.parametrize("platform", [X86, ARM])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_pinned_releases_go_together_and_nothing_is_unpinned(python: str, platform: str, tmp_path: Path) -> None:
    pinned = {canonical(line) for line in CONSTRAINTS.read_text().splitlines()}
    found = resolve(PINNED, python, platform, tmp_path)
    assert any(line.startswith("torch==") for line in found)
    assert [f for f in found if not f.startswith(PINNED_BY_TORCH) and canonical(f) not in pinned] == []


@pytest.mark.parametrize("releases", OTHERS, ids=lambda releases: releases.name)
def test_the_compared_releases_go_together(releases: Releases, tmp_path: Path) -> None:
    found = {canonical(line) for line in resolve(releases, "3.12", X86, tmp_path)}
    assert {f"{package}=={release}" for package, release in releases.pins} <= found


def test_a_set_that_no_index_has_is_found(tmp_path: Path) -> None:
    """torch 2.13.0 asks for triton 3.7.1; beside 3.9.0 nobody but a build without that demand could be installed."""
    wrong = Releases("wrong", (("torch", "2.13.0"), ("triton", "3.9.0")))
    with pytest.raises(AssertionError, match="triton"):
        resolve(wrong, "3.11", X86, tmp_path)
