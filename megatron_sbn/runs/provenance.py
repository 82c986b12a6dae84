"""Where a run comes from: commit, versions, machine, job, command; and how secrets are kept out of all of it.

Every value is text, made to be an MLflow tag. Versions are read from package metadata, so nothing is imported for
them. Whatever leaves the process passes `mask_secrets` (redaction.py), because tracking URIs may hold a password and
turn up in recipes, command lines and error messages.
"""

import getpass
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from megatron_sbn.redaction import mask_secrets

PACKAGES = ("megatron_sbn", "torch", "megatron-core", "deepspeed", "triton", "mlflow")
SLURM = {"SLURM_JOB_ID": "slurm_job_id", "SLURM_ARRAY_TASK_ID": "slurm_array_task_id"}
COMMIT_FILE = ".sbn-commit"  # in a copy of the code (cluster/snapshot.py): its commit


def describe_environment() -> dict[str, str]:
    """Tags: git_commit ("-dirty" with uncommitted changes), versions, host, Slurm job, command line.

    What does not apply (no git checkout, no Slurm, a package that is not installed) is left out.
    """
    tags = {"host": socket.gethostname(), "version_python": platform.python_version()}
    tags["command"] = mask_secrets(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    # MLflow's own names, which its pages have columns for.
    tags |= {"mlflow.source.name": tags["command"], "mlflow.user": getpass.getuser()}
    tags["mlflow.source.type"] = "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL"
    commit = code_commit()
    if commit is not None:
        tags["git_commit"] = commit
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    for package in PACKAGES:
        try:
            tags[f"version_{package.replace('-', '_')}"] = version(package)
        except PackageNotFoundError:
            continue
    tags |= {tag: os.environ[name] for name, tag in SLURM.items() if name in os.environ}
    if "SLURM_JOB_ID" in os.environ:
        tags["slurm_restart_count"] = os.environ.get("SLURM_RESTART_COUNT", "0")
    return tags


def installed_packages() -> str:
    """Every installed distribution as NAME==VERSION, a line each, by name: what pip would need to install it again."""
    found = {(item.metadata["Name"] or "", item.version) for item in distributions()}
    return "".join(f"{name}=={release}\n" for name, release in sorted(found, key=lambda pair: pair[0].lower()) if name)


def code_commit() -> str | None:
    """The commit of this code: of its checkout, or of the checkout that this is a copy of; None where neither is so."""
    try:
        return (Path(__file__).parents[2] / COMMIT_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return _git_commit(Path(__file__).parent)


def batch_scripts(code: Path = Path(__file__).parents[2]) -> list[Path]:
    """The batch scripts that `sbn submit` put beside this copy of the code; none where it is no copy."""
    return sorted(code.parent.glob("*.sbatch")) if (code / COMMIT_FILE).is_file() else []


def _git_commit(folder: Path) -> str | None:
    """The commit that the code was checked out from; None outside a checkout or without git."""
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # not the repository around a site-packages
        commit = _git(folder, "rev-parse", "HEAD").strip()
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
