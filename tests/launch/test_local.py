"""Ranks import the package that starts them, wherever that is. Statuses and signals: training/test_signals.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_sbn
from megatron_sbn.launch import local

WHERE = "import megatron_sbn; print(megatron_sbn.__file__)"


def test_a_copy_in_the_working_folder_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "megatron_sbn").mkdir()
    (tmp_path / "megatron_sbn" / "__init__.py").write_text("raise SystemExit('another copy')\n")
    for command in (["-c", WHERE], ["-m", "megatron_sbn.cli", "--version"]):
        run = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, **local.same_code()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    assert megatron_sbn.__version__ in run.stdout


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/a/megatron_sbn/launch/local.py", {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/a:/b"}),
        ("/x/site-packages/megatron_sbn/launch/local.py", {"PYTHONSAFEPATH": "1"}),
        ("/a:c/megatron_sbn/launch/local.py", {}),
    ],
)
def test_what_an_installed_package_and_a_checkout_need(
    file: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/b")
    monkeypatch.setattr(local, "__file__", file)
    assert local.same_code() == expected
