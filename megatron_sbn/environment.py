"""What the launcher says about this process: torchrun's variables, srun's in a job step, or neither (one rank).

Imports no torch.
"""

import os

from megatron_sbn.errors import RecipeError


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


def _number(name: str) -> int:
    try:
        return int(os.environ.get(name, "0"))
    except ValueError:
        raise RecipeError(f"environment variable {name} = {os.environ[name]!r} is not a number; unset it") from None
