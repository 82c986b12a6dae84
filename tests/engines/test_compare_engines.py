"""What `make engines` names is there, and the interpreter that an environment is made with is new enough."""

import stat
from pathlib import Path

import compare
import pytest
from releases import OTHERS, PINNED, ROOT


def test_its_tests_and_recipes_are_there() -> None:
    assert [name for name in (*compare.TESTS, *compare.RECIPES) if not (ROOT / name).is_file()] == []


def test_an_environment_pins_its_own_releases_and_all_others_as_they_are() -> None:
    pinned = set(PINNED.constraints().splitlines())
    for releases in OTHERS:
        own = set(releases.constraints().splitlines())
        assert own - pinned == {f"{package}=={release}" for package, release in releases.pins}


def test_the_first_interpreter_that_is_new_enough_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, status in (("python3", 1), ("python3.12", 127), ("python3.13", 0)):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\nexit {status}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHON", raising=False)
    assert compare.interpreter((3, 12)) == "python3.13"
    (tmp_path / "python3.13").unlink()
    with pytest.raises(SystemExit, match="no Python >= 3.12 among python3, python3.12"):
        compare.interpreter((3, 12))
