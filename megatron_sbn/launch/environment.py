"""What the launcher says about this process: torchrun's variables, srun's in a job step, or neither (one rank).

Imports no torch.
"""

import ctypes
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

from megatron_sbn.errors import RecipeError

LAUNCHED = "SBN_LAUNCHED"
SLURM_CPUS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")  # not all sites bind a task to its CPUs
_PR_SET_PDEATHSIG = 1
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # slurm.h: interactive, batch and extern steps


def rank() -> int:
    """This process's global rank."""
    if "RANK" in os.environ:
        return _number("RANK")
    return _number("SLURM_PROCID") if in_srun_task() else 0


def world_size() -> int:
    """How many ranks the launcher started. Raises RecipeError where the variables contradict each other."""
    size = 1
    if "WORLD_SIZE" in os.environ:
        size = _number("WORLD_SIZE")
    elif in_srun_task():
        size = _number("SLURM_STEP_NUM_TASKS")
    if not 0 <= rank() < size:
        raise RecipeError(
            f"rank {rank()} of {size}: RANK and WORLD_SIZE (or srun's variables) contradict each other; "
            "start with torchrun, srun or sbn train, or unset them"
        )
    return size


def local_world_size() -> int:
    """Ranks of a node, where each has as many; else the whole world."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return max(1, _number("LOCAL_WORLD_SIZE"))
    nodes = _number("SLURM_STEP_NUM_NODES") if in_srun_task() else 1
    return max(1, world_size() // max(1, nodes))


def local_rank() -> int:
    """This process's rank on its node."""
    if "LOCAL_RANK" in os.environ:
        return _number("LOCAL_RANK")
    return _number("SLURM_LOCALID") if in_srun_task() else 0


def in_srun_task() -> bool:
    """Whether srun started this process as one of a step's tasks.

    A batch script and the shell of salloc have SLURM_NTASKS, and some SLURM_PROCID, but no step; the interactive step
    of a site that uses one has a number above all real ones.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_STEP_NUM_TASKS" in os.environ


def master_address() -> str:
    """Where rank 0 is: MASTER_ADDR, else the first node of the step; on one node nobody's name has to be resolved."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    one_node = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    return "127.0.0.1" if one_node else first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))


def master_port() -> int:
    """MASTER_PORT, else one made of job, step and restart: the same on all nodes, another for a job beside this one.

    Between 15000 and 29999, below the ports that Linux gives to outgoing connections.
    """
    if "MASTER_PORT" in os.environ:
        return _number("MASTER_PORT")
    own = _number("SLURM_JOB_ID") + 1009 * _number("SLURM_STEP_ID") + 4003 * _number("SLURM_RESTART_COUNT")
    return 15000 + own % 15000


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: gpu[003-005,9],login -> gpu003."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise RecipeError(f"SLURM_STEP_NODELIST = {nodes!r} is no list of nodes; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def end_with_launcher() -> None:
    """Asks the kernel to kill this rank when the launcher that started it is killed.

    Otherwise the ranks of a killed launcher train on unseen, in the folder that the next start continues. Only under
    `sbn train` and torchrun: a process started by hand may outlive its shell. Linux only; elsewhere it does nothing.
    """
    if sys.platform == "linux" and (LAUNCHED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ensure_caches() -> None:
    """Gives the engines caches in the temporary folder where the home folder cannot be written; before imports."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - there may be none
    if os.access(home, os.W_OK | os.X_OK) and home.is_dir():
        return
    place = Path(tempfile.gettempdir()) / f"megatron_sbn-caches-{os.getuid()}"
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(name, str(place / name.lower()))


def usable_cpus() -> int:
    """CPUs that this process may use: those it is bound to, and no more than Slurm gave to its task or job."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = next((os.environ[name] for name in SLURM_CPUS if os.environ.get(name, "").isdecimal()), "0")
    return max(1, min(bound, int(given) or bound))


def hide_gpus() -> None:
    """Makes this a CPU rank on any machine (`device: cpu`). Comes before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _number(name: str) -> int:
    try:
        return int(os.environ.get(name, "0"))
    except ValueError:
        raise RecipeError(f"environment variable {name} = {os.environ[name]!r} is not a number; unset it") from None


def store_outlives_ranks() -> bool:
    """Whether the launcher keeps the ranks' store, over restarts too, as torchrun does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
