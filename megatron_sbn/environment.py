"""What the launcher says about this process: torchrun's variables, srun's in a job step, or neither (one rank).

Imports no torch.
"""

import ctypes
import os
import signal
import sys
import warnings

from megatron_sbn.errors import RecipeError

LAUNCHED = "SBN_LAUNCHED"
_PR_SET_PDEATHSIG = 1


def rank() -> int:
    """This process's global rank."""
    if "RANK" in os.environ:
        return _number("RANK")
    return _number("SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else 0


def world_size() -> int:
    """How many ranks the launcher started."""
    if "WORLD_SIZE" in os.environ:
        return _number("WORLD_SIZE")
    return _number("SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else 1


def local_rank() -> int:
    """This process's rank on its node."""
    if "LOCAL_RANK" in os.environ:
        return _number("LOCAL_RANK")
    return _number("SLURM_LOCALID") if "SLURM_STEP_ID" in os.environ else 0


def end_with_launcher() -> None:
    """Asks the kernel to kill this rank when the launcher that started it is killed.

    Otherwise the ranks of a killed launcher train on unseen, in the folder that the next start continues. Only under
    `sbn train` and torchrun: a process started by hand may outlive its shell. Linux only; elsewhere it does nothing.
    """
    if sys.platform == "linux" and (LAUNCHED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def silence_engines() -> None:
    """Drops warnings that no user of a recipe can act on: optional packages that this project does without."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def _number(name: str) -> int:
    try:
        return int(os.environ.get(name, "0"))
    except ValueError:
        raise RecipeError(f"environment variable {name} = {os.environ[name]!r} is not a number; unset it") from None
