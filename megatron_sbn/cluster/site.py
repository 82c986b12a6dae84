"""What is known of a site before a job: slurm/env.sh, and what sinfo says of the nodes. Imports no torch."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from megatron_sbn.cluster.snapshot import find_code
from megatron_sbn.errors import InputError
from megatron_sbn.redaction import excerpt

SETTINGS = ("SBN_GPUS_PER_NODE", "SBN_CPUS_PER_RANK", "SBN_GPU")
_GPU = re.compile(r"\bgpu(?::([A-Za-z][\w.-]*))?:(\d+)")
_PARTITION = re.compile(r"(?:--partition[= ]|-p ?)(\S+)")


@dataclass(frozen=True)
class Site:
    """What env.sh says.

    Attributes:
        file: where it is.
        options: SBN_SBATCH_OPTIONS, of every job.
        gpus: of a node; None where the file does not say. 0: there are none.
        cpus: of a rank, by the file.
        gpu: what the GPUs are called, "" where the file does not say.
    """

    file: Path
    options: tuple[str, ...]
    gpus: int | None = None
    cpus: int | None = None
    gpu: str = ""


@dataclass(frozen=True)
class Nodes:
    """What sinfo says of a partition's nodes: GPUs and CPUs of one (the fewest), and what the GPUs are called."""

    gpus: int
    cpus: int
    gpu: str = ""


def site_file() -> Path:
    """SBN_ENV, else the slurm/env.sh that goes with the code."""
    return Path(os.environ.get("SBN_ENV") or find_code().scripts / "env.sh").absolute()


def read_site(file: Path, nodes: int, per_node: int | None = None) -> Site:
    """The site's file, which may use SBN_NODES and SBN_NPROC_PER_NODE. Raises InputError."""
    settings = " ".join(f'"${{{name}:-}}"' for name in SETTINGS)
    script = f'source "$1" >&2 && printf "%s\\0" {settings} "${{SBN_SBATCH_OPTIONS[@]}}"'
    sizes = {"SBN_NODES": str(nodes)} | ({} if per_node is None else {"SBN_NPROC_PER_NODE": str(per_node)})
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(file)],
        env=os.environ | sizes, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        message = " ".join(done.stderr.split()) or "no message"
        raise InputError(f"{file}: bash cannot read it ({message}); mend it or set SBN_ENV")
    gpus, cpus, gpu, *options = done.stdout.split("\0")
    numbers = [_number(file, name, text) for name, text in zip(SETTINGS, (gpus, cpus), strict=False)]
    return Site(file, tuple(filter(None, options)), numbers[0], numbers[1] or None, gpu)


def nodes_of(options: Sequence[str]) -> Nodes | None:
    """The nodes of the partition that sbatch's options name, else of the default one; None where sinfo does not say."""
    if which("sinfo") is None:
        return None
    named = _PARTITION.findall(" ".join(options)) or [os.environ.get("SBATCH_PARTITION", "")]
    command = ["sinfo", "--noheader", "--format=%P|%c|%G", *([f"--partition={named[-1]}"] if named[-1] else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    lines = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    if not named[-1]:
        lines = [line for line in lines if line[0].endswith("*")]
    kinds = [_kind(cpus, resources) for _, cpus, resources in lines]
    # Of a partition of several kinds a job with GPUs gets those that have some.
    kinds = [kind for kind in kinds if kind.gpus] or kinds
    if done.returncode or not kinds:
        return None
    names = {kind.gpu for kind in kinds}
    gpu = names.pop() if len(names) == 1 else ""
    return Nodes(min(kind.gpus for kind in kinds), min(kind.cpus for kind in kinds), gpu)


def gpus_in(text: str) -> tuple[int, str]:
    """How many GPUs a list of generic resources names, and what they are called: gpu:h100:8(S:0-1) -> (8, "h100")."""
    found = _GPU.findall(text)
    names = {name for name, _ in found if name}
    return sum(int(count) for _, count in found), names.pop() if len(names) == 1 else ""


def _kind(cpus: str, resources: str) -> Nodes:
    gpus, gpu = gpus_in(resources)
    return Nodes(gpus, int(re.sub(r"\D", "", cpus) or 1), gpu)


def _number(file: Path, name: str, text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or len(text) > 6:
        raise InputError(f"{file}: {name} = {excerpt(text)} is not a number; mend it or leave it out")
    return int(text)
