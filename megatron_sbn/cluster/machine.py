"""What a machine has, in a few lines: at the head of a node's log, and `sbn doctor --machine`.

What cannot be found out is "not found": no line is ever an error. Imports no torch.
"""

import ctypes
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import psutil

from megatron_sbn.engines import installed
from megatron_sbn.launch.environment import usable_cpus
from megatron_sbn.redaction import one_line
from megatron_sbn.text_table import size_text

NOT_FOUND = "not found"
SMI_SECONDS = 20.0
_INFINIBAND = Path("/sys/class/infiniband")
_SHOWN = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_VISIBLE", "CUDA_DEVICE", "MASTER_", "OMP_NUM_THREADS", "SLURM_JOB_ID")


def describe(folder: Path) -> list[str]:
    """The machine, a line for each part of it; `folder` is where a run would write."""
    gpus, driver = _gpus()
    memory = psutil.virtual_memory()
    rows = {
        "host": f"{socket.gethostname()}, {platform.system()} {platform.release()}",
        "CPUs": f"{usable_cpus()} usable of {os.cpu_count() or 1}",
        "memory": f"{size_text(memory.available)} available of {size_text(memory.total)}",
        "GPUs": gpus,
        "driver": driver,
        "NCCL": _nccl(),
        "engines": ", ".join(f"{name} {release}" for name, release in installed().items()) or NOT_FOUND,
        "Python": f"{platform.python_version()}, {sys.executable}",
        "network": _network(),
        "InfiniBand": _infiniband(),
        "disk": f"{_free(folder)} in {folder}",
        "/dev/shm": _free(Path("/dev/shm")),
        "variables": _variables(),
    }
    return [f"{name:<10}  {one_line(text)}" for name, text in rows.items()]


def _gpus() -> tuple[str, str]:
    """(GPUs with their memory, the driver's release), as nvidia-smi has them."""
    if shutil.which("nvidia-smi") is None:
        return f"{NOT_FOUND} (no nvidia-smi)", NOT_FOUND
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return f"{NOT_FOUND} (nvidia-smi does not answer)", NOT_FOUND
    lines = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    lines = [line for line in lines if len(line) == 3]
    if done.returncode or not lines:
        message = " ".join((done.stderr or done.stdout).split()) or "no message"
        return f"{NOT_FOUND} (nvidia-smi: {message})", NOT_FOUND
    kinds = Counter(f"{name}, {memory}" for name, memory, _ in lines)
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items()), lines[0][2]


def _nccl() -> str:
    """The release that PyTorch loads: of the wheel, else of the system's library."""
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-nccl"):
            return f"{distribution.version} ({name})"
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return NOT_FOUND
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100} (libnccl.so.2)"


def _network() -> str:
    """Interfaces that are up, with address and Mb/s."""
    try:
        addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    except OSError:
        return NOT_FOUND
    shown = []
    for name, state in sorted(states.items()):
        own = [address.address for address in addresses.get(name, []) if address.family == socket.AF_INET]
        if state.isup and name != "lo":
            shown.append(" ".join([name, *own, *([f"{state.speed} Mb/s"] if state.speed else [])]))
    return "; ".join(shown) or NOT_FOUND


def _infiniband() -> str:
    """Adapters, with state and rate of their first port."""
    shown = []
    for adapter in sorted(_INFINIBAND.glob("*")):
        words = []
        for name in ("state", "rate"):
            try:
                text = (adapter / "ports" / "1" / name).read_text().strip()
            except OSError:
                continue
            words.append(text.rpartition(": ")[2])  # "4: ACTIVE"
        shown.append(" ".join(filter(None, [adapter.name, *words])))
    return "; ".join(shown) or NOT_FOUND


def _free(folder: Path) -> str:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return NOT_FOUND
    return f"{size_text(usage.free)} free of {size_text(usage.total)}"


def _variables() -> str:
    own = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_SHOWN)]
    return " ".join(own) or "none of NCCL's are set"
