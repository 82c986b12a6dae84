"""Tags of a run, and secrets that must not be among them."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from megatron_sbn.runs import provenance
from megatron_sbn.runs.provenance import describe_environment


def test_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/long/path/train.py", "r.yaml", "tracking.uri=http://me:hush@host", "a b"])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    tags = describe_environment()
    assert tags["command"] == "train.py r.yaml tracking.uri=http://***@host 'a b'"
    assert tags["version_torch"] == version("torch")
    assert tags["version_megatron_core"] == version("megatron-core")
    assert tags["version_python"] == ".".join(map(str, sys.version_info[:3]))
    assert (tags["slurm_job_id"], tags["slurm_restart_count"]) == ("77", "2")
    assert all(isinstance(value, str) and value for value in tags.values())
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not [name for name in describe_environment() if name.startswith("slurm")]


def test_commit_of_the_checkout_that_holds_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = tmp_path / "package" / "provenance.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert "git_commit" not in describe_environment()
    git("init", "-q")
    (tmp_path / "other").write_text("1")
    git("add", "other")
    git("commit", "-qm", "other")
    assert "git_commit" not in describe_environment()  # a repository around installed code is not its origin
    git("add", ".")
    git("commit", "-qm", "code")
    assert describe_environment()["git_commit"] == git("rev-parse", "HEAD")
    (tmp_path / "other").write_text("2")
    assert describe_environment()["git_commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_the_environment_is_listed_as_pip_reads_it() -> None:
    lines = provenance.installed_packages().splitlines()
    assert f"torch=={version('torch')}" in lines
    assert len(lines) == len(set(lines))
    assert all(line.count("==") == 1 for line in lines)


def test_batch_scripts_are_those_beside_a_copy_of_the_code(tmp_path: Path) -> None:
    code = tmp_path / "1" / "code"
    code.mkdir(parents=True)
    (tmp_path / "1" / "run.sbatch").write_text("#!/bin/sh\n")
    assert provenance.batch_scripts(code) == []
    (code / provenance.COMMIT_FILE).write_text("abc\n")
    assert provenance.batch_scripts(code) == [tmp_path / "1" / "run.sbatch"]
