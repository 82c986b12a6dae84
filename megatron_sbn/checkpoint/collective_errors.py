"""Ranks that save and read together: when one of them fails, all of them know."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_sbn.errors import CheckpointError, InputError
from megatron_sbn.parallel.state import ParallelState


@dataclass
class Attempt:
    """What went wrong in a block, in one line; nothing where it went well."""

    problem: str = ""


@contextmanager
def capture_error() -> Iterator[Attempt]:
    """A block whose failure is kept, for all ranks to raise together."""
    outcome = Attempt()
    try:
        yield outcome
    except OSError as error:
        outcome.problem = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (CheckpointError, InputError, SafetensorError) as error:
        outcome.problem = str(error)


def first_error_on_any_rank(problem: str, parallel: ParallelState) -> str:
    """The problem of the first rank that has one, on every rank; nothing where there is none."""
    count = torch.tensor(int(bool(problem)), device=parallel.device)
    dist.all_reduce(count)
    if not count:
        return ""
    problems: list[str] = [""] * parallel.world_size
    dist.all_gather_object(problems, problem)
    rank = next(index for index, text in enumerate(problems) if text)
    return problems[rank] if parallel.world_size == 1 else f"rank {rank}: {problems[rank]}"
